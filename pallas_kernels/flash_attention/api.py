# SPDX-License-Identifier: Apache-2.0
"""The public function: checks, dispatch and the custom gradient. No arithmetic here."""

import dataclasses
import functools
import math
import warnings
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.core import dispatch, tuning
from pallas_kernels.core.check import Axes, check_dtype, check_floating, check_number, check_same_dtype
from pallas_kernels.core.dispatch import Argument, Call, Choice, Implementation
from pallas_kernels.core.softmax import SoftmaxStats, UnifiedMax, check_unified_max
from pallas_kernels.core.varying import vary_like
from pallas_kernels.flash_attention import config as config_lib
from pallas_kernels.masks import Mask, as_mask

OP = "flash_attention"
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@overload
def flash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    *,
    mask: Mask | jax.Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sink: jax.Array | None = None,
    unified_max: UnifiedMax | None = None,
    return_lse: Literal[False] = False,
    return_stats: Literal[False] = False,
    implementation: Implementation = "auto",
    config: Any = None,
) -> jax.Array: ...
@overload
def flash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    *,
    mask: Mask | jax.Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sink: jax.Array | None = None,
    unified_max: UnifiedMax | None = None,
    return_lse: Literal[True],
    return_stats: Literal[False] = False,
    implementation: Implementation = "auto",
    config: Any = None,
) -> tuple[jax.Array, jax.Array]: ...
@overload
def flash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    *,
    mask: Mask | jax.Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sink: jax.Array | None = None,
    unified_max: UnifiedMax | None = None,
    return_lse: bool = False,
    return_stats: Literal[True],
    implementation: Implementation = "auto",
    config: Any = None,
) -> tuple[Any, ...]: ...
def flash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    *,
    mask: Mask | jax.Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sink: jax.Array | None = None,
    unified_max: UnifiedMax | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
    implementation: Implementation = "auto",
    config: Any = None,
) -> Any:
    r"""Softmax attention in memory linear in T and S, differentiable in query, key, value, bias and sink.

    Letters: B batch, T query length, S key length, N query heads, K key/value heads (N a multiple of K; query head
    n reads key/value head n // (N / K)), H head dimension, Hv head dimension of the values.

        logit[t, s] = soft_cap * tanh(scale * q[t].k[s] / soft_cap)  (or scale * q[t].k[s])  + bias[t, s]
        out[t]      = sum_s exp(logit[t, s]) v[s] / (sum_s exp(logit[t, s]) + exp(sink))     over visible s

    Masks are objects of `pallas_kernels.masks`, combined by `&` and `|`. Causal is aligned bottom-right (the last
    query sees the last key), and a row that sees no key returns 0, LSE -inf and zero gradient (with a sink, the LSE
    is the sink):

        masks.Causal(), T=2 S=5:    1 1 1 1 0       T=5 S=2:    0 0   <- returns 0
                                    1 1 1 1 1                   0 0
                                                                0 0
                                                                1 0
                                                                1 1

    >>> import jax, jax.numpy as jnp
    >>> from pallas_kernels import flash_attention, masks
    >>> q = jax.random.normal(jax.random.key(0), (1, 128, 8, 64), jnp.bfloat16)   # [B, T, N, H]
    >>> kv = jax.random.normal(jax.random.key(1), (1, 200, 2, 64), jnp.bfloat16)  # [B, S, K, H]
    >>> flash_attention(q, kv, kv, mask=masks.Causal()).shape
    (1, 128, 8, 64)

    Args:
      query: [B, T, N, H], float32, bfloat16, float16 or float64. Products accumulate in float32 (float64).
      key: [B, S, K, H], same dtype.
      value: [B, S, K, Hv], same dtype.
      bias: additive logits, broadcastable to [B, N, T, S] from the right. Its gradient is summed over the axes
        along which it was broadcast.
      mask: a mask, a boolean array broadcastable to [B, N, T, S] (True = visible), or None.
      scale: multiplies q.k; a Python number, 1 / sqrt(H) by default. (A learned scale: multiply query by it.)
      soft_cap: bounds the logits to (-soft_cap, soft_cap) before bias and mask; a Python number > 0.
      sink: [N], one more logit a head, after scaling, that joins the maximum, the denominator and the LSE, and has
        no value row (attention sinks of Xiao et al., 2023, in the form of gpt-oss).
      unified_max: asynchronous softmax in the forward pass (`pallas_kernels.UnifiedMax`): one constant in place of each
        row's running maximum, so that no tile rescales what others summed up; rows with logits out of its bounds are
        computed again. It changes results by rounding only, and gradients not at all.
      return_lse: also return log(sum_s exp(logit) + exp(sink)), natural logarithm, float32 [B, N, T]. It is
        differentiable too, so partial results over pieces of S can be merged and trained through.
      return_stats: also return a `pallas_kernels.SoftmaxStats`.
      implementation: "auto", "mosaic_gpu", "mosaic_tpu", "xla", "reference", or names in order of preference. A
        named one runs or raises. `pallas_kernels.explain` shows what runs and why.
      config: tile sizes (an object of pallas_kernels.flash_attention.config); None looks in the tuning tables.

    Returns:
      [B, T, N, Hv] in the dtype of query, and then, in this order, what was asked for.

    Raises:
      ValueError: shapes that do not fit, named by argument and axis letter; options out of range.
      TypeError: dtypes that do not fit.
      UnsupportedError: the named implementation cannot run this call; says why and what to try.

    Source: Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022; masks
    by tile class as in Lin et al., "FastAttention", 2024, section 4.2; asynchronous softmax as in Hong et al.,
    "FlashDecoding++", 2023, section 3.
    """
    mask = as_mask(mask)
    call = describe(
        query, key, value, bias, mask=mask, scale=scale, soft_cap=soft_cap, sink=sink, unified_max=unified_max
    )
    forward = dispatch.choose(call, implementation)
    _check_config(forward, config)
    inputs = _Inputs(query, key, value, bias, sink, mask, unified_max)
    options = _Options(call.option("scale"), soft_cap)
    if forward.name == "reference":
        arguments: dict[str, Any] = {"mask": mask, "scale": options.scale, "soft_cap": soft_cap}
        out, lse = forward.module.attention(query, key, value, bias, sink=sink, **arguments)
        out = out.astype(query.dtype)
        recomputed = forward.module.rows_out_of_bounds(query, key, bias, unified_max=unified_max, **arguments)
    else:
        backward = dispatch.choose(call.backward(), implementation)
        plan = _Plan(options, forward, _config(forward, config), backward, _config(backward, config))
        out, lse, recomputed = _attend(plan, vary_like(inputs, inputs))
    more = ([lse] if return_lse else []) + ([SoftmaxStats(recomputed)] if return_stats else [])
    return (out, *more) if more else out


def gradients_of_part(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What some of the keys add to the gradients, when `out` and `lse` are those over all keys: the backward pass of
    attention whose keys are visited in parts, of which none is kept (ring attention, parallel/context.py).

    Args:
      query, key, value, mask, scale, soft_cap, implementation: as of `flash_attention`, key, value, mask of the part.
      out: [B, T, N, Hv], the whole output.
      lse: float32 [B, N, T], of all keys.
      dout, dlse: gradients of these.

    Returns:
      Of key and value the gradients, of query the summand of this part, in the types of these.
    """
    call = describe(query, key, value, mask=mask, scale=scale, soft_cap=soft_cap)
    backward = dispatch.choose(call.backward(), implementation)
    inputs = vary_like(_Inputs(query, key, value, None, None, mask, None), (query, key, value, out, lse, dout, dlse))
    options = _Options(call.option("scale"), soft_cap)
    plan = _Plan(options, backward, None, backward, _config(backward, None))
    (gradients,) = _backward_rule(plan, (inputs, out, lse), (dout, dlse, None))
    return gradients.query, gradients.key, gradients.value


def describe(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sink: jax.Array | None = None,
    unified_max: UnifiedMax | None = None,
) -> Call:
    """Checks the arguments of `flash_attention` and puts them in the words of dispatch."""
    axes = Axes(OP)
    axes.bind("query", query.shape, "B T N H")
    axes.bind("key", key.shape, "B S K H")
    axes.bind("value", value.shape, "B S K Hv")
    axes.check_not_empty()
    N, K = axes["N"], axes["K"]
    if N % K:
        raise ValueError(f"{OP}: query heads N={N} must be a multiple of key heads K={K}.")
    check_dtype(OP, "query", query.dtype, _DTYPES)
    check_same_dtype(OP, {"query": query.dtype, "key": key.dtype, "value": value.dtype})
    _warn_if_heads_first(query.shape, key.shape)
    arguments = [
        Argument("q", query.dtype.name, tuple(zip("BTNH", query.shape, strict=True))),
        Argument("k", key.dtype.name, tuple(zip("BSKH", key.shape, strict=True))),
        Argument("v", value.dtype.name, tuple(zip(("B", "S", "K", "Hv"), value.shape, strict=True))),
    ]
    if bias is not None:
        axes.bind_broadcast("bias", bias.shape, "B N T S")
        check_floating(OP, "bias", bias, "; a boolean mask goes to mask=" if bias.dtype == jnp.bool_ else "")
        shape = (1,) * (4 - bias.ndim) + bias.shape
        # Letters of a broadcast axis are marked, so that `Call.sizes` keeps the true sizes.
        letters = (x if n == axes[x] else f"{x}*" for x, n in zip("BNTS", shape, strict=True))
        arguments.append(Argument("bias", bias.dtype.name, tuple(zip(letters, shape, strict=True))))
    if sink is not None:
        axes.bind("sink", sink.shape, "N")
        check_floating(OP, "sink", sink)
        arguments.append(Argument("sink", sink.dtype.name, (("N", N),)))
    if mask is not None:
        mask.check(axes)
    learned = " (for a learned scale multiply query by it)"
    scale = 1 / math.sqrt(axes["H"]) if scale is None else check_number(OP, "scale", scale, learned)
    if soft_cap is not None and check_number(OP, "soft_cap", soft_cap) <= 0:
        raise ValueError(f"{OP}: soft_cap must be > 0 or None, got {soft_cap!r}.")
    options: dict[str, Any] = {"mask": None if mask is None else str(mask), "scale": scale, "soft_cap": soft_cap}
    options["unified_max"] = check_unified_max(OP, unified_max, N)
    return Call(OP, tuple(arguments), tuple(options.items()))


def _warn_if_heads_first(query: tuple[int, ...], key: tuple[int, ...]) -> None:
    """Arrays laid out [B, N, T, H] often fit the shapes of [B, T, N, H] and give quietly wrong numbers."""
    _, T, N, _ = query
    if N > T > 1 and T % key[1] == 0:
        _warn_layout_once(query)


@functools.cache
def _warn_layout_once(shape: tuple[int, ...]) -> None:
    warnings.warn(
        f"{OP}: query has more heads than rows (N={shape[2]} > T={shape[1]}); the layout is [B, T, N, H]. If yours is "
        "[B, N, T, H], swap axes 1 and 2 of query, key and value.",
        stacklevel=5,
    )


class _Inputs(NamedTuple):
    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None
    sink: jax.Array | None
    mask: Mask | None
    unified_max: UnifiedMax | None


class _Options(NamedTuple):
    scale: float
    soft_cap: float | None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What runs; forward and backward are chosen apart, and meet only in (q, k, v, out, lse)."""

    options: _Options
    forward: Choice
    forward_config: Any
    backward: Choice
    backward_config: Any


def _kinds(choice: Choice) -> tuple[type, ...]:
    return config_lib.kinds(choice.call, choice.device, choice.implementation)


def _check_config(choice: Choice, config: Any) -> None:
    """A config is for one implementation; given with another it would be ignored, so it is refused."""
    kinds = _kinds(choice)
    if config is None or isinstance(config, kinds):
        return
    if not isinstance(config, config_lib.KINDS):
        names = ", ".join(c.__name__ for c in config_lib.KINDS)
        raise TypeError(f"{OP}: config must be one of {names}, got {type(config).__name__}.")
    takes = " or ".join(f"a {kind.__name__}" for kind in kinds) or "no config"
    raise ValueError(
        f'{OP}: implementation "{choice.name}" runs, which takes {takes}, but config is a {type(config).__name__}; '
        "name the implementation that the config is for."
    )


def _config(choice: Choice, given: Any) -> Any:
    """The given config if it is this implementation's, else what the tuning tables or the heuristic say."""
    kinds = _kinds(choice)
    if not kinds:
        return None
    return tuning.resolve(choice, kinds[0], config_lib.heuristic, given if isinstance(given, kinds) else None)


def _run_forward(plan: _Plan, inputs: _Inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output, LSE, and how many rows of each batch element an asynchronous softmax had to compute again."""
    module, (*arrays, unified_max) = plan.forward.module, inputs
    options = {"config": plan.forward_config, **plan.options._asdict()}
    if unified_max is None:
        out, lse = module.forward(*arrays, **options)
        outputs = out, lse, jnp.zeros(len(out), jnp.int32)
    else:
        outputs = module.forward_asynchronously(*arrays, unified_max, **options)
    return vary_like(outputs, inputs)  # inside shard_map a kernel's outputs come without the axes they vary over


def _forward_rule(plan: _Plan, inputs: _Inputs):
    # Named, so that a rematerialization policy can keep them and need not run the forward pass again:
    # jax.checkpoint_policies.save_only_these_names("flash_attention").
    out, lse, recomputed = checkpoint_name(_run_forward(plan, inputs), OP)
    return (out, lse, recomputed), (inputs, out, lse)


def _backward_rule(plan: _Plan, residuals: tuple, cotangents: tuple):
    (*inputs, _), out, lse = residuals
    dout, dlse, _ = cotangents
    gradients = plan.backward.module.backward(
        *inputs, out, lse, dout, dlse, config=plan.backward_config, **plan.options._asdict()
    )
    # Whatever phi is, output and LSE are the same: its gradient is 0.
    return (_Inputs(*vary_like(tuple(gradients), inputs), mask=None, unified_max=None),)


_attend: Any = jax.custom_vjp(_run_forward, nondiff_argnums=(0,))
_attend.defvjp(_forward_rule, _backward_rule)
