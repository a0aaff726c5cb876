# SPDX-License-Identifier: Apache-2.0
"""THE SPECIFICATION of flash_attention: plain jnp, quadratic memory, no speed. If in doubt, this is right.

    logit[t, s] = soft_cap * tanh(scale * q[t].k[s] / soft_cap)   (or scale * q[t].k[s])   + bias[t, s]
    e[t, s]     = exp(logit[t, s] - m[t])  where the mask allows (t, s), else 0
    l[t]        = sum_s e[t, s] + exp(sink - m[t])
    out[t]      = sum_s e[t, s] v[s] / l[t]          0     where l[t] = 0
    lse[t]      = m[t] + log l[t]                    -inf  where l[t] = 0

An asynchronous softmax changes no result; `rows_out_of_bounds` says which rows it would compute again.

`attention` is that, and its gradient is what JAX makes of it. `naive` is the unfused way in the precision of the
input, with the backward pass written out from the residuals (q, k, v, out, lse) that every implementation keeps:
the error of `naive` against `attention` is what core/tolerance.py calls normal.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.core.softmax import UnifiedMax
from pallas_kernels.masks import Mask


def supports(call: Call, device: Device) -> Refusal | None:
    return None  # everything; "auto" never asks


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    *,
    mask: Mask | None = None,
    scale: float,
    soft_cap: float | None = None,
    sink: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, Hv] and LSE [B, N, T], both float32 (float64 for float64 input); arguments as in the API."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    logits, _ = _logits(query, key, bias, scale, soft_cap, dtype)
    visible = _visible(mask, query, key)
    m = jnp.max(logits, axis=-1, where=visible, initial=-jnp.inf)
    if sink is not None:
        sink = sink.astype(dtype)[None, :, None]
        m = jnp.maximum(m, sink)
    # The maximum cancels in the result, so it carries no gradient; an empty row has none, and 0 serves.
    m = jax.lax.stop_gradient(jnp.where(jnp.isfinite(m), m, 0))
    e = jnp.where(visible, jnp.exp(jnp.where(visible, logits - m[..., None], 0)), 0)
    l = jnp.sum(e, axis=-1) + (0 if sink is None else jnp.exp(sink - m))
    empty = l == 0
    l = jnp.where(empty, 1, l)
    out = _weighted_sum(e / l[..., None], value.astype(dtype))
    return out, jnp.where(empty, -jnp.inf, m + jnp.log(l))


def rows_out_of_bounds(
    query: jax.Array,
    key: jax.Array,
    bias: jax.Array | None = None,
    *,
    mask: Mask | None = None,
    scale: float,
    soft_cap: float | None = None,
    unified_max: UnifiedMax | None,
) -> jax.Array:
    """How many rows of each batch element have a visible logit out of the bounds of `unified_max`, int32 [B]."""
    B, _, N, _ = query.shape
    if unified_max is None:
        return jnp.zeros(B, jnp.int32)
    logits, _ = _logits(query, key, bias, scale, soft_cap, jnp.promote_types(query.dtype, jnp.float32))
    seen = _visible(mask, query, key) & ~jnp.isneginf(logits)  # a bias of -inf hides a key as a mask does
    shifted = logits - unified_max.per_head(N)[:, None, None]
    return jnp.sum(jnp.any(seen & unified_max.out_of_bounds(shifted), axis=-1), axis=(1, 2), dtype=jnp.int32)


def _naive(query, key, value, bias, sink, mask, scale: float, soft_cap: float | None):
    """Output and LSE with products and probabilities rounded to the input's dtype, softmax in float32."""
    p, lse = _naive_probabilities(query, key, bias, sink, mask, scale, soft_cap)[:2]
    return _weighted_sum(p.astype(query.dtype), value), lse


def _naive_probabilities(query, key, bias, sink, mask, scale, soft_cap):
    logits, slope = _logits(query, key, bias, scale, soft_cap, query.dtype)
    logits = jnp.where(_visible(mask, query, key), logits, -jnp.inf)
    everything = logits
    if sink is not None:
        column = jnp.broadcast_to(sink.astype(logits.dtype)[:, None, None], (*logits.shape[:3], 1))
        everything = jnp.concatenate([logits, column], axis=-1)
    lse = jax.nn.logsumexp(everything, axis=-1)
    finite = jnp.where(jnp.isneginf(lse), 0, lse)
    return jnp.exp(logits - finite[..., None]), lse, slope


def _naive_forward(query, key, value, bias, sink, mask, scale, soft_cap):
    out, lse = _naive(query, key, value, bias, sink, mask, scale, soft_cap)
    return (out, lse), (query, key, value, bias, sink, mask, out)


def _naive_backward(scale, soft_cap, residuals, cotangents):
    query, key, value, bias, sink, mask, out = residuals
    dout, dlse = cotangents
    B, T, N, _ = query.shape
    S, K = key.shape[1:3]
    p, lse, slope = _naive_probabilities(query, key, bias, sink, mask, scale, soft_cap)
    dp = _scores(dout, value).astype(p.dtype)
    shift = dlse - jnp.einsum("btnh,btnh->bnt", dout.astype(p.dtype), out.astype(p.dtype))
    dlogits = p * (dp + shift[..., None])
    ds = (dlogits * slope * scale).astype(query.dtype).reshape(B, K, N // K, T, S)
    p = p.astype(query.dtype).reshape(ds.shape)
    dq = jnp.einsum("bkgts,bskh->btkgh", ds, key).reshape(query.shape)
    dk = jnp.einsum("bkgts,btkgh->bskh", ds, query.reshape(B, T, K, N // K, -1))
    dv = jnp.einsum("bkgts,btkgh->bskh", p, dout.reshape(B, T, K, N // K, -1))
    dbias = None if bias is None else _sum_to(dlogits, bias.shape).astype(bias.dtype)
    dsink = None
    if sink is not None:
        dsink = jnp.sum(jnp.exp(sink.astype(lse.dtype)[:, None] - lse) * shift, axis=(0, 2)).astype(sink.dtype)
    return dq, dk, dv, dbias, dsink, None


naive: Any = jax.custom_vjp(_naive, nondiff_argnums=(6, 7))
naive.defvjp(_naive_forward, _naive_backward)


def specified(arguments: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """`attention` of the public function's arguments by name, where what is not given has its default."""
    arguments = {name: argument for name, argument in arguments.items() if name != "unified_max"}
    return attention(**{"scale": _default_scale(arguments), **arguments})


def naively(arguments: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """`naive` of the public function's arguments by name, where what is not given has its default."""
    names = ("query", "key", "value", "bias", "sink", "mask")
    scale = arguments.get("scale", _default_scale(arguments))
    return naive(*map(arguments.get, names), scale, arguments.get("soft_cap"))


def _default_scale(arguments: dict[str, Any]) -> float:
    return arguments["query"].shape[-1] ** -0.5


def _scores(rows: jax.Array, cols: jax.Array) -> jax.Array:
    """rows [B, T, N, H] . cols [B, S, K, H] -> [B, N, T, S]; head n meets head n // G, so a group is neighbors."""
    B, T, N, H = rows.shape
    S, K = cols.shape[1:3]
    return jnp.einsum("btkgh,bskh->bkgts", rows.reshape(B, T, K, N // K, H), cols).reshape(B, N, T, S)


def _weighted_sum(p: jax.Array, value: jax.Array) -> jax.Array:
    """p [B, N, T, S], value [B, S, K, Hv] -> [B, T, N, Hv]."""
    B, N, T, S = p.shape
    K = value.shape[2]
    out = jnp.einsum("bkgts,bskh->btkgh", p.reshape(B, K, N // K, T, S), value)
    return out.reshape(B, T, N, value.shape[-1])


def _logits(query, key, bias, scale, soft_cap, dtype):
    """Logits before the mask, with the product rounded to `dtype`, and the slope of the soft cap."""
    s = _scores(query.astype(dtype), key.astype(dtype)).astype(jnp.promote_types(dtype, jnp.float32)) * scale
    slope = 1.0
    if soft_cap is not None:
        tanh = jnp.tanh(s / soft_cap)
        s, slope = soft_cap * tanh, 1 - tanh * tanh
    return (s if bias is None else s + bias.astype(s.dtype)), slope


def _visible(mask: Mask | None, query: jax.Array, key: jax.Array) -> jax.Array | np.ndarray:
    T, S = query.shape[1], key.shape[1]
    return np.ones((1, 1, T, S), bool) if mask is None else mask.as_array(T, S)


def _sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums the axes along which `shape` was broadcast."""
    wide = (1,) * (x.ndim - len(shape)) + shape
    axes = tuple(axis for axis, n in enumerate(wide) if n != x.shape[axis])
    return x.sum(axes, keepdims=True).reshape(shape)
