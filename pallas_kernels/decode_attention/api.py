# SPDX-License-Identifier: Apache-2.0
"""The public function: checks and dispatch. No arithmetic here."""

import dataclasses
import functools
import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core import dispatch, tuning
from pallas_kernels.core.check import Axes, check_dtype, check_floating, check_number, check_same_dtype
from pallas_kernels.core.dispatch import Argument, Call, Choice, Implementation
from pallas_kernels.core.softmax import SoftmaxStats, UnifiedMax, check_unified_max
from pallas_kernels.core.varying import vary_like
from pallas_kernels.decode_attention import config as config_lib
from pallas_kernels.decode_attention.cache import Cache

OP = "decode_attention"
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_QUANTIZED = ("int8", "float8_e4m3fn", "float8_e5m2")


def decode_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    *,
    page_table: jax.Array | None = None,
    key_scale: jax.Array | None = None,
    value_scale: jax.Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    window: int | None = None,
    sink: jax.Array | None = None,
    unified_max: UnifiedMax | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
    implementation: Implementation = "auto",
    config: Any = None,
) -> Any:
    r"""Attention of the newest tokens of each sequence to a cache that holds their keys and values already.

    Letters: B sequences, T new tokens of each, N query heads, K key/value heads (N a multiple of K; query head n reads
    key/value head n // (N / K)), H head dimension, Hv that of the values, S keys that a sequence may have.

    Query t of sequence b stands at position lengths[b] - T + t and sees the keys up to there, at most `window` of them:

        lengths = [5, 2], S = 6, T = 2, window = 3        0 1 2 3 4 5
                                  sequence 0, query 0     . 1 1 1 . .
                                              query 1     . . 1 1 1 .
                                  sequence 1, query 0     1 . . . . .
                                              query 1     1 1 . . . .

    A query that sees nothing (a sequence of length 0) returns 0, LSE -inf (with a sink, the LSE is the sink).

    >>> import jax, jax.numpy as jnp
    >>> from pallas_kernels import decode_attention
    >>> q = jax.random.normal(jax.random.key(0), (2, 8, 64), jnp.bfloat16)             # [B, N, H]
    >>> cache = jax.random.normal(jax.random.key(1), (2, 100, 2, 64), jnp.bfloat16)    # [B, S, K, H]
    >>> decode_attention(q, cache, cache, jnp.asarray([100, 37])).shape
    (2, 8, 64)
    >>> pages = cache.reshape(10, 20, 2, 64)                                           # [P, page, K, H]
    >>> table = jnp.arange(10).reshape(2, 5)
    >>> decode_attention(q, pages, pages, jnp.asarray([100, 37]), page_table=table).shape
    (2, 8, 64)

    Args:
      query: [B, N, H], or [B, T, N, H] for a few tokens at once (drafted ones to verify, say); float32, bfloat16,
        float16 or float64. Products accumulate in float32 (float64).
      key: [B, S, K, H], or with a page table [P, page, K, H]: P pages that all sequences share. Of the query's dtype,
        or int8, float8_e4m3fn or float8_e5m2 with `key_scale`.
      value: [B, S, K, Hv] or [P, page, K, Hv]; of the key's dtype.
      lengths: integer [B], keys of each sequence, those of its new tokens included; at most S.
      page_table: integer [B, pages of a sequence]. Key s of sequence b is row s % page of page
        page_table[b, s // page]. Entries beyond a sequence's length may be anything.
      key_scale: [K]; a quantized cache times this is the keys.
      value_scale: [K]; likewise.
      scale: multiplies q.k; a Python number, 1 / sqrt(H) by default.
      soft_cap: bounds the logits to (-soft_cap, soft_cap); a Python number > 0.
      window: how many keys a query sees, its own among them; a Python integer >= 1. None means all.
      sink: [N], one more logit a head that joins the denominator and the LSE, and has no value row.
      unified_max: asynchronous softmax (`pallas_kernels.UnifiedMax`): no chunk of keys waits for another's maximum, and
        rows whose logits are out of its bounds are computed again. It changes the result by rounding only.
      num_splits: in how many pieces of one size the keys of S are worked on, each summed up by itself, whatever B and
        the lengths are: the same sequence then gets the same bits in any batch. None leaves it to the implementation.
      return_lse: also return log(sum_s exp(logit) + exp(sink)), natural logarithm, float32 [B, N] or [B, N, T].
      return_stats: also return a `SoftmaxStats`.
      implementation: "auto", "mosaic_gpu", "mosaic_tpu", "xla", "reference", or names in order of preference. A
        named one runs or raises. `pallas_kernels.explain` shows what runs and why.
      config: chunk sizes (an object of pallas_kernels.decode_attention.config); None looks in the tuning tables.

    Returns:
      [B, N, Hv] or [B, T, N, Hv] in the dtype of query, and then, in this order, what was asked for. It has no
      gradient: train with `flash_attention`.

    Raises:
      ValueError: shapes that do not fit, named by argument and axis letter; options out of range.
      TypeError: dtypes that do not fit; a gradient is asked for.
      UnsupportedError: the named implementation cannot run this call; says why and what to try.

    Source: Dao et al., "Flash-Decoding for long-context inference", 2023, for the splits; Hong et al.,
    "FlashDecoding++", 2023, section 3, for the asynchronous softmax.
    """
    inputs = _Inputs(query, key, value, lengths, page_table, key_scale, value_scale, sink, unified_max)
    call = _describe(inputs, scale, soft_cap, window, num_splits)
    if query.ndim == 3:
        inputs = inputs._replace(query=query[:, None])
    choice = dispatch.choose(call, implementation)
    plan = _Plan(choice, _config(choice, config))
    outputs: Any = _attend(plan, vary_like(inputs, inputs))
    out, lse, recomputed = outputs
    if query.ndim == 3:
        out, lse = out[:, 0], lse[:, :, 0]
    more = ([lse] if return_lse else []) + ([SoftmaxStats(recomputed)] if return_stats else [])
    return (out, *more) if more else out


class _Inputs(NamedTuple):
    query: jax.Array
    key: jax.Array
    value: jax.Array
    lengths: jax.Array
    page_table: jax.Array | None
    key_scale: jax.Array | None
    value_scale: jax.Array | None
    sink: jax.Array | None
    unified_max: UnifiedMax | None


def _describe(
    inputs: _Inputs, scale: float | None, soft_cap: float | None, window: int | None, num_splits: int | None
) -> Call:
    """Checks the arguments and puts them in the words of dispatch; of a query [B, N, H], T is 1."""
    query, key, value, lengths, page_table, key_scale, value_scale, sink, unified_max = inputs
    axes = Axes(OP)
    axes.bind("query", query.shape, "B N H" if query.ndim == 3 else "B T N H")
    kind = "P page" if page_table is not None else "B S"
    axes.bind("key", key.shape, f"{kind} K H")
    axes.bind("value", value.shape, f"{kind} K Hv")
    axes.check_not_empty()
    N, K = axes["N"], axes["K"]
    if N % K:
        raise ValueError(f"{OP}: query heads N={N} must be a multiple of key heads K={K}.")
    check_dtype(OP, "query", query.dtype, _DTYPES)
    check_same_dtype(OP, {"key": key.dtype, "value": value.dtype})
    _check_cache_dtypes(query, {"key": key, "value": value}, {"key": key_scale, "value": value_scale})
    _check_integers("lengths", lengths)
    axes.bind("lengths", lengths.shape, "B")
    arguments = [
        Argument("q", query.dtype.name, tuple((letter, axes.get(letter, 1)) for letter in "BTNH")),
        Argument("k", key.dtype.name, tuple(zip((*kind.split(), "K", "H"), key.shape, strict=True))),
        Argument("v", value.dtype.name, tuple(zip((*kind.split(), "K", "Hv"), value.shape, strict=True))),
    ]
    S = key.shape[1]
    if page_table is not None:
        _check_integers("page_table", page_table)
        axes.bind("page_table", page_table.shape, "B pages")
        arguments.append(Argument("page_table", page_table.dtype.name, (("B", axes["B"]), ("pages", axes["pages"]))))
        S *= axes["pages"]
    for name, array, letter in (("key_scale", key_scale, "K"), ("value_scale", value_scale, "K"), ("sink", sink, "N")):
        if array is not None:
            axes.bind(name, array.shape, letter)
            check_floating(OP, name, array)
            arguments.append(Argument(name, array.dtype.name, ((letter, axes[letter]),)))
    scale = 1 / math.sqrt(axes["H"]) if scale is None else check_number(OP, "scale", scale)
    if soft_cap is not None and check_number(OP, "soft_cap", soft_cap) <= 0:
        raise ValueError(f"{OP}: soft_cap must be > 0 or None, got {soft_cap!r}.")
    for name, number in (("window", window), ("num_splits", num_splits)):
        if number is not None and (not isinstance(number, numbers.Integral) or number < 1):
            raise ValueError(f"{OP}: {name} must be a Python integer >= 1 or None, got {number!r}.")
    options: dict[str, Any] = {"S": S, "scale": scale, "soft_cap": soft_cap, "window": window, "num_splits": num_splits}
    options["unified_max"] = check_unified_max(OP, unified_max, N)
    return Call(OP, tuple(arguments), tuple(options.items()))


def _check_cache_dtypes(query: jax.Array, cache: dict[str, jax.Array], scales: dict[str, Any]) -> None:
    for name, array in cache.items():
        if array.dtype == query.dtype:
            continue
        check_dtype(OP, name, array.dtype, (query.dtype.name, *_QUANTIZED))
        if scales[name] is None:
            raise ValueError(f"{OP}: a {name} of {array.dtype.name} needs {name}_scale, [K] in floating point.")


def _check_integers(name: str, array: jax.Array) -> None:
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{OP}: {name} must be an integer array, got {array.dtype}.")


@dataclasses.dataclass(frozen=True)
class _Plan:
    choice: Choice
    config: Any


def _config(choice: Choice, given: Any) -> Any:
    """The given config, if it is of the implementation that runs, else what the tuning tables or the heuristic say."""
    kinds = config_lib.kinds(choice.call, choice.device, choice.implementation)
    if given is not None and not isinstance(given, kinds):
        takes = " or ".join(f"a {kind.__name__}" for kind in kinds) or "no config"
        raise ValueError(f'{OP}: implementation "{choice.name}" takes {takes}, got {given!r}.')
    return tuning.resolve(choice, kinds[0], config_lib.heuristic, given) if kinds else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, inputs: _Inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value, lengths, page_table, key_scale, value_scale, sink, unified_max = inputs
    cache = Cache(key, value, lengths, page_table, key_scale, value_scale)
    call = plan.choice.call
    options = {name: call.option(name) for name in ("scale", "soft_cap", "window")}
    module = plan.choice.module
    if plan.choice.name == "reference":
        out, lse, recomputed = module.attention(query, cache, sink, unified_max, **options)
        return out.astype(query.dtype), lse, recomputed
    options |= {"num_splits": call.option("num_splits"), "config": plan.config}
    return vary_like(module.forward(query, cache, sink, unified_max, **options), inputs)


def _no_gradient(plan: _Plan, inputs: _Inputs):
    raise TypeError(f"{OP} has no gradient: it reads a cache. Train with pallas_kernels.flash_attention.")


_attend.defvjp(_no_gradient, _no_gradient)
