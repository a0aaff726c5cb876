# SPDX-License-Identifier: Apache-2.0
"""From logits to one token per row: greedy, temperature, top-k, top-p, min-p; pure jnp, batched, float32.

The filters are applied in the order of Hugging Face `transformers`, each to what the one before it left:

    temperature   x = logits / temperature; 0 is greedy, and the filters no longer matter
    top-k         keep the k largest (Fan et al. 2018, arXiv:1805.04833)
    top-p         keep the smallest set of most likely tokens whose probabilities reach p together
                  (nucleus sampling; Holtzman et al. 2020, arXiv:1904.09751)
    min-p         keep what is at least min_p times as likely as the most likely token
                  (Nguyen et al. 2024, arXiv:2407.01082)

A filter cuts at a value: tokens that tie with the last one kept are kept too, so the outcome never depends on
the order in which a sort leaves ties. The most likely token always stays.

Every setting is a traced number and may differ from row to row, so changing one compiles nothing; only
switching a filter on (None to a number) does, because a sampler without filters does not pay for their sort.
"""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, the same for every row; ValueError for a setting that makes no sense.

    Attributes:
      temperature: at least 0. 0 is greedy, 1 the model's own distribution, more is flatter.
      top_k: at least 1, or None for no limit; more than the vocabulary is no limit either.
      top_p: in (0, 1], or None for no limit.
      min_p: in [0, 1], or None for no limit.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not (_is_real(self.temperature) and 0 <= self.temperature < math.inf):
            raise ValueError(f"temperature must be a finite number >= 0 (0 is greedy), got {self.temperature!r}")
        if self.top_k is not None and not (is_integer(self.top_k) and self.top_k >= 1):
            raise ValueError(f"top_k must be an integer >= 1, or None for no limit, got {self.top_k!r}")
        if self.top_p is not None and not (_is_real(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must be in (0, 1], or None for no limit, got {self.top_p!r}")
        if self.min_p is not None and not (_is_real(self.min_p) and 0 <= self.min_p <= 1):
            raise ValueError(f"min_p must be in [0, 1], or None for no limit, got {self.min_p!r}")

    def arrays(self) -> dict[str, Any]:
        """The keyword arguments of `sample`, as arrays, so that jit traces them."""
        top_k = None if self.top_k is None else np.asarray(min(self.top_k, np.iinfo(np.int32).max), np.int32)
        return {
            "temperature": np.asarray(self.temperature, np.float32),
            "top_k": top_k,
            "top_p": None if self.top_p is None else np.asarray(self.top_p, np.float32),
            "min_p": None if self.min_p is None else np.asarray(self.min_p, np.float32),
        }


def stacked_arrays(settings: Sequence[Sampling]) -> dict[str, Any]:
    """The keyword arguments of `sample` for rows that each have settings of their own, [B] each.

    Where no row has a filter there is none, as there is then no sort; otherwise a row without one gets one that keeps
    everything.
    """
    nothing = {"top_k": np.iinfo(np.int32).max, "top_p": 1.0, "min_p": 0.0}
    arrays: dict[str, Any] = {"temperature": np.asarray([each.temperature for each in settings], np.float32)}
    filtered = any(getattr(each, name) is not None for each in settings for name in nothing)
    for name, neutral in nothing.items():
        values = [each.arrays()[name] for each in settings]
        kind = np.int32 if name == "top_k" else np.float32
        arrays[name] = np.asarray([neutral if v is None else v for v in values], kind) if filtered else None
    return arrays


def request_keys(seed: jax.typing.ArrayLike, request_ids: jax.typing.ArrayLike) -> jax.Array:
    """A PRNG key for each request [B]; it depends on its seed ([B], or one for all) and its id, on nothing else."""
    request_ids = jnp.asarray(request_ids)
    seeds = jnp.broadcast_to(jnp.asarray(seed), request_ids.shape)
    return jax.vmap(lambda seed, request_id: jax.random.fold_in(jax.random.key(seed), request_id))(seeds, request_ids)


def step_keys(keys: jax.Array, step: jax.typing.ArrayLike) -> jax.Array:
    """The keys [B] with which the requests draw their token number `step`, a number or [B]."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(jnp.asarray(step), keys.shape))


def filter_logits(
    logits: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    top_k: jax.typing.ArrayLike | None = None,
    top_p: jax.typing.ArrayLike | None = None,
    min_p: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Logits [B, V] after temperature and filters: float32, 0 for the likeliest token, -inf if excluded.

    Each setting is a scalar or one value per row [B]. Temperature must be above 0.
    """
    logits = jnp.asarray(logits, jnp.float32)
    # The largest logit goes first, so that a tiny temperature gives -inf for the others and never inf - inf.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / _column(temperature)
    lowest = jnp.full((logits.shape[0], 1), -jnp.inf)  # the smallest logit that survives
    if top_k is not None or top_p is not None:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        if top_k is not None:
            rank = jnp.clip(_column(top_k), 1, logits.shape[-1]) - 1
            lowest = jnp.take_along_axis(ranked, jnp.broadcast_to(rank, lowest.shape), axis=-1)
        if top_p is not None:
            probabilities = jax.nn.softmax(jnp.where(ranked >= lowest, ranked, -jnp.inf), axis=-1)
            before = jnp.cumsum(probabilities, axis=-1) - probabilities  # what the likelier tokens hold together
            # p = 1 is spelled out: the float32 sum reaches 1 before the last unlikely tokens are counted.
            inside = ((before < _column(top_p)) | (_column(top_p) >= 1)) & (ranked >= lowest)
            lowest = jnp.maximum(lowest, jnp.min(jnp.where(inside, ranked, 0.0), axis=-1, keepdims=True))
    if min_p is not None:
        lowest = jnp.maximum(lowest, jnp.log(_column(min_p)))  # p / p_max >= min_p, with log p_max = 0 here
    return jnp.where(logits >= lowest, logits, -jnp.inf)


def greedy(logits: jax.Array) -> jax.Array:
    """The likeliest token per row: logits [B, V] -> int32 [B]."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def sample(
    logits: jax.Array,
    keys: jax.Array,
    step: jax.typing.ArrayLike | None = None,
    *,
    temperature: jax.typing.ArrayLike = 0.0,
    top_k: jax.typing.ArrayLike | None = None,
    top_p: jax.typing.ArrayLike | None = None,
    min_p: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """One token per row: logits [B, V], PRNG keys [B] -> int32 [B]; greedy where temperature is 0.

    With a `step`, the keys are those of requests (see `step_keys`). If all rows are greedy, all that runs is an argmax:
    no key is made, nothing is sorted.

    Each setting is a scalar or one value per row [B]; `Sampling.arrays()` gives them checked.
    """
    temperature = jnp.asarray(temperature, jnp.float32)

    def draw(logits: jax.Array) -> jax.Array:
        # Below 1e-6 float32 logits leave nothing to chance anyway; 0 is answered by greedy.
        positive = jnp.maximum(temperature, 1e-6)
        kept = filter_logits(logits, temperature=positive, top_k=top_k, top_p=top_p, min_p=min_p)
        own = keys if step is None else step_keys(keys, step)
        drawn = jax.vmap(jax.random.categorical)(own, kept).astype(jnp.int32)
        return jnp.where(temperature > 0, drawn, greedy(logits))

    # Greedy decoding is the common case and needs neither noise nor sort.
    return jax.lax.cond(jnp.any(temperature > 0), draw, greedy, logits)


def _column(setting: jax.typing.ArrayLike) -> jax.Array:
    """A scalar or [B] as [1, 1] or [B, 1], to stand beside logits [B, V]."""
    return jnp.reshape(jnp.asarray(setting), (-1, 1))


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
