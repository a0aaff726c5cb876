# SPDX-License-Identifier: Apache-2.0
"""What one training step does: loss, gradients, optimizer, and the check that all of it is finite.

Letters: A microbatches, B rows, T tokens of a row, D model width, V vocabulary. Parameters and optimizer state are
float32 (the masters); the model casts them to its own dtype where it computes. Nothing here is random: a run is a
function of its initial parameters and its batches.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from models.layers import Attend
from models.llama import Llama

Batch = dict[str, Any]  # name -> array, as data.PackedRows names them
# (model, batch) -> (sum of weighted losses, sum of weights), both float32 scalars.
LossFunction = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]

# A chunk of logits has at most this many entries: 1 GiB in float32.
LOGITS_PER_CHUNK = 2**28


# --- Loss ----------------------------------------------------------------------------------------------------


def language_model_loss(
    model: Llama, batch: Batch, *, z_loss: float = 0.0, attend: Attend | None = None
) -> tuple[jax.Array, jax.Array]:
    """Next-token cross-entropy of packed rows (see data.PackedRows).

    Args:
      model: a Llama.
      batch: tokens, targets, segment_ids, positions int32 [B, T] and weights float32 [B, T].
      z_loss: weight of the square of log Z, which keeps logits from drifting (PaLM, arXiv:2204.02311, section 5).
      attend: as of Llama.hidden, where rows are parts of documents.

    Returns:
      (sum of weights * loss, sum of weights), in nats.
    """
    hidden = model.hidden(
        model.embed(batch["tokens"]), positions=batch["positions"], segment_ids=batch["segment_ids"], attend=attend
    )
    loss = cross_entropy(model.logits, hidden, batch["targets"], batch["weights"], z_loss=z_loss)
    return loss, batch["weights"].sum()


def cross_entropy(
    logits_of: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    logits_per_chunk: int = LOGITS_PER_CHUNK,
) -> jax.Array:
    """Sum of weights * -log softmax(logits_of(hidden))[targets] without ever holding all logits.

    The tokens are taken in chunks along T, so that rows stay on their devices; the backward pass computes each chunk's
    logits again. Memory is therefore one chunk of logits instead of B * T * V.

    Args:
      logits_of: [B, t, D] -> float32 [B, t, V].
      hidden: [B, T, D].
      targets: int32 [B, T].
      weights: float32 [B, T].
      z_loss: adds z_loss * weights * logsumexp(logits)^2.
      logits_per_chunk: the most logits held at a time.

    Returns:
      float32 scalar.
    """
    B, T, _ = hidden.shape

    def chunk_loss(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        logits = logits_of(hidden)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(weights * (log_z - chosen + z_loss * log_z**2))

    V = jax.eval_shape(logits_of, hidden[:, :1]).shape[-1]
    length = max(1, logits_per_chunk // (B * V))
    if length >= T:
        return chunk_loss(hidden, targets, weights)

    def chunks(array: jax.Array) -> jax.Array:
        """[B, T, ...] -> [chunks, B, length, ...], filled up with zeros (and so with weight 0)."""
        missing = -T % length
        array = jnp.pad(array, [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2))
        return jnp.moveaxis(array.reshape(B, -1, length, *array.shape[2:]), 1, 0)

    def add(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + jax.checkpoint(chunk_loss, prevent_cse=False)(*chunk), None

    total, _ = jax.lax.scan(add, jnp.float32(0), (chunks(hidden), chunks(targets), chunks(weights)))
    return total


# --- Optimizer -----------------------------------------------------------------------------------------------

SCHEDULES = ("cosine", "linear", "constant", "wsd")
OPTIMIZERS = ("adamw", "lamb")


def make_schedule(name: str, learning_rate: float, steps: int, warmup: int) -> optax.Schedule:
    """Learning rate by step: `warmup` steps of linear rise, the first already above 0, then

    "cosine" to a tenth, "linear" to 0, "constant", or "wsd" (warmup-stable-decay: constant, then linear to 0 in the
    last fifth of all steps; Hu et al. 2024, arXiv:2404.06395).
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup must be at least 0 and below the {steps} steps, got {warmup}")
    rest = steps - warmup
    if name == "cosine":
        schedule = optax.cosine_decay_schedule(learning_rate, rest, alpha=0.1)
    elif name == "linear":
        schedule = optax.linear_schedule(learning_rate, 0.0, rest)
    elif name == "constant":
        schedule = optax.constant_schedule(learning_rate)
    elif name == "wsd":
        decay = min(rest, max(1, steps // 5))
        falling = optax.linear_schedule(learning_rate, 0.0, decay)
        schedule = optax.join_schedules([optax.constant_schedule(learning_rate), falling], [rest - decay])
    else:
        raise ValueError(f"unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    if not warmup:
        return schedule
    rising = optax.linear_schedule(learning_rate / warmup, learning_rate, max(1, warmup - 1))
    return optax.join_schedules([rising, schedule], [warmup])


def make_optimizer(
    name: str, learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 0.1, clip: float | None = 1.0
) -> optax.GradientTransformation:
    """AdamW or LAMB (You et al. 2019, arXiv:1904.00962), both with betas (0.9, 0.95).

    Only matrices decay; norms and biases do not. Gradients are first scaled down to the global norm `clip`, unless it
    is None. LAMB takes one trust ratio for each layer's parameter, although layers are stacked in one array.
    """
    if name == "adamw":
        optimizer = optax.adamw(learning_rate, b1=0.9, b2=0.95, weight_decay=weight_decay, mask=is_matrix)
    elif name == "lamb":
        optimizer = optax.chain(
            optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-6),
            optax.add_decayed_weights(weight_decay, mask=is_matrix),
            _scale_by_trust_ratio_per_layer(),
            optax.scale_by_learning_rate(learning_rate),
        )
    else:
        raise ValueError(f"unknown optimizer {name!r}; choose one of {', '.join(OPTIMIZERS)}")
    if clip is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(clip), optimizer)


def is_stacked(path: tuple[Any, ...]) -> bool:
    """Whether a parameter, by its path in the tree, has a leading layer axis."""
    return any(getattr(key, "key", None) == "blocks" for key in path)


def is_matrix(params: Any) -> Any:
    """True for each parameter that is a matrix, the layer axis of stacked parameters not counted."""
    return jax.tree_util.tree_map_with_path(lambda path, x: x.ndim - is_stacked(path) >= 2, params)


def _scale_by_trust_ratio_per_layer() -> optax.GradientTransformation:
    trust_ratio = optax.scale_by_trust_ratio()

    def scale(path: tuple[Any, ...], update: jax.Array, param: jax.Array) -> jax.Array:
        def one_layer(update: jax.Array, param: jax.Array) -> jax.Array:
            return jnp.asarray(trust_ratio.update(update, optax.EmptyState(), param)[0])

        return (jax.vmap(one_layer) if is_stacked(path) else one_layer)(update, param)

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        return jax.tree_util.tree_map_with_path(scale, updates, params), state

    return optax.GradientTransformation(trust_ratio.init, update)


# --- State and step ------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
      params: nested dict of float32 arrays, as the model names them.
      opt_state: the optimizer's.
      step: int32 scalar, steps taken.
    """

    params: Any
    opt_state: Any
    step: jax.Array

    @property
    def shardings(self) -> Any:
        """A TrainState of the arrays' shardings."""
        return jax.tree.map(lambda x: x.sharding, self)


def initial_state(
    make_model: Callable[[], nnx.Module],
    optimizer: optax.GradientTransformation,
    *,
    params: Any = None,
    lay_out: Callable[[Any], Any] | None = None,
) -> tuple[nnx.GraphDef, TrainState]:
    """A model's definition and a fresh training state.

    Args:
      make_model: makes the model; it runs inside jit, so that each device only makes its own part of the parameters.
      optimizer: makes the optimizer state.
      params: start from these (nested dict, as `nnx.to_pure_dict` gives it) instead of random ones; they are copied.
      lay_out: maps a pytree of shapes to one of shardings (see parallel.mesh.parameter_shardings). Default: one
        device.
    """

    def place(make: Callable[..., Any], *args: Any) -> Any:
        shardings = lay_out(jax.eval_shape(make, *args)) if lay_out else None
        return jax.jit(make, out_shardings=shardings)(*args)

    graphdef = nnx.split(nnx.eval_shape(make_model))[0]
    if params is None:
        params = place(lambda: jax.tree.map(jnp.float32, nnx.to_pure_dict(nnx.split(make_model())[1])))
    else:
        # Copied: each step consumes its state, and the caller's arrays must stay alive.
        copy = functools.partial(jnp.array, dtype=jnp.float32, copy=True)
        params = place(functools.partial(jax.tree.map, copy), params)
    return graphdef, TrainState(params, place(optimizer.init, params), place(lambda: jnp.int32(0)))


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    loss: LossFunction = language_model_loss,
    shardings: Any = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """One step as a jitted function (state, batch) -> (state, metrics); it consumes (donates) the state.

    The arrays of the batch are [A, B, T]: A microbatches, whose gradients are summed before the optimizer runs. All
    weights count alike, so that A microbatches of B rows equal one of A * B. A step whose loss or gradient is not
    finite leaves the state as it was. `shardings` are those of the state (TrainState.shardings), which the compiler may
    otherwise change from one step to the next.

    The metrics are float32 scalars: loss (mean over all weights), gradient_norm (before clipping) and finite
    (0 or 1).
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        total = jnp.maximum(batch["weights"].sum(), 1)

        @jax.value_and_grad
        def mean_loss(params: Any, microbatch: Batch) -> jax.Array:
            return loss(nnx.merge(graphdef, params), microbatch)[0] / total

        def add(sums: tuple[jax.Array, Any], microbatch: Batch) -> tuple[tuple[jax.Array, Any], None]:
            return jax.tree.map(jnp.add, sums, mean_loss(state.params, microbatch)), None

        if len(batch["weights"]) == 1:
            value, gradients = mean_loss(state.params, jax.tree.map(lambda x: x[0], batch))
        else:
            zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params))
            (value, gradients), _ = jax.lax.scan(add, zeros, batch)

        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        new = TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        return state, {"loss": value, "gradient_norm": norm, "finite": finite.astype(jnp.float32)}

    return jax.jit(train_step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))


def make_evaluate(
    graphdef: nnx.GraphDef, loss: LossFunction = language_model_loss
) -> Callable[[Any, Iterable[Batch]], float]:
    """A function (params, batches of [B, T] arrays) -> mean loss over all weights; exp of it is the perplexity."""

    @jax.jit
    def batch_loss(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return loss(nnx.merge(graphdef, params), batch)

    def evaluate(params: Any, batches: Iterable[Batch]) -> float:
        sums = [batch_loss(params, batch) for batch in batches]
        loss_sum, weight = np.sum(jax.device_get(sums), axis=0, dtype=np.float64)
        return float(loss_sum / max(weight, 1))

    return evaluate


def microbatches(batch: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Cuts arrays [A * B, ...] into [A, B, ...] for `make_train_step`, A = count."""
    rows = len(batch["tokens"])
    if count < 1 or rows % count:
        raise ValueError(f"a batch of {rows} rows cannot be cut into {count} equal microbatches")
    return {name: array.reshape(count, rows // count, *array.shape[1:]) for name, array in batch.items()}
