# SPDX-License-Identifier: Apache-2.0
"""THE SPECIFICATION of decode_attention: plain jnp, all logits at once, no speed. If in doubt, this is right.

    position of query t   p = length - T + t
    visible               s < length,  s <= p,  s > p - window
    logit[t, s]           soft_cap * tanh(scale * q[t].k[s] / soft_cap)      (or scale * q[t].k[s])
    out[t]                sum_s exp(logit[t, s]) v[s] / (sum_s exp(logit[t, s]) + exp(sink))     0 where nothing is seen
    lse[t]                log of the denominator                                              -inf where nothing is seen

An asynchronous softmax changes no result; `out_of_bounds` says which rows it would compute again. `naively` is the
unfused way in the precision of the input: its error is what core/tolerance.py calls normal.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.core.softmax import UnifiedMax
from pallas_kernels.decode_attention.cache import Cache


def supports(call: Call, device: Device) -> Refusal | None:
    return None  # everything; "auto" never asks


def attention(
    query: jax.Array,
    cache: Cache,
    sink: jax.Array | None = None,
    unified_max: UnifiedMax | None = None,
    *,
    scale: float,
    soft_cap: float | None = None,
    window: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output [B, T, N, Hv] and LSE [B, N, T], float32 (float64 for float64 input), and how many rows of each sequence
    are out of the bounds of `unified_max`, int32 [B]."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    (B, T, N, H), S = query.shape, cache.S
    key, value = (
        rows if one is None else rows * one.astype(dtype)[:, None]
        for rows, one in (
            (cache.keys(0, S, dtype), cache.key_scale),
            (cache.values(0, S, dtype), cache.value_scale),
        )
    )
    K = key.shape[2]
    # Head n shares the keys of head n // G, so that the heads of a group are neighbors.
    logits = jnp.einsum("btkgh,bskh->bkgts", query.astype(dtype).reshape(B, T, K, N // K, H), key) * scale
    logits = logits.reshape(B, N, T, S)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    seen = visible(cache.lengths, T, jnp.arange(S), window)[:, None]
    logits = jnp.where(seen, logits, -jnp.inf)
    everything = logits
    if sink is not None:
        column = jnp.broadcast_to(sink.astype(dtype)[:, None, None], (B, N, T, 1))
        everything = jnp.concatenate([logits, column], axis=-1)
    lse = jax.nn.logsumexp(everything, axis=-1)
    p = jnp.exp(logits - jnp.where(jnp.isneginf(lse), 0, lse)[..., None])
    # A key that nobody sees may be anything: nothing times it is nothing.
    value = jnp.where(seen.any((1, 2))[:, :, None, None], value, 0)
    out = jnp.einsum("bkgts,bskh->btkgh", p.reshape(B, K, N // K, T, S), value).reshape(B, T, N, -1)
    return out, lse, out_of_bounds(logits, seen, unified_max)


def visible(lengths: jax.Array, T: int, s: jax.Array, window: int | None) -> jax.Array:
    """Which of the keys number `s` each query sees: bool [B, T, keys]."""
    position = (lengths[:, None] - T + jnp.arange(T))[:, :, None]
    seen = (s <= position) & (s < lengths[:, None, None])
    return seen if window is None else seen & (s > position - window)


def out_of_bounds(logits: jax.Array, seen: jax.Array, unified_max: UnifiedMax | None) -> jax.Array:
    """How many rows of each sequence, int32 [B]."""
    if unified_max is None:
        return jnp.zeros(len(logits), jnp.int32)
    phi = unified_max.per_head(logits.shape[1])[:, None, None]
    rows = jnp.any(seen & unified_max.out_of_bounds(logits - phi), axis=-1)
    return jnp.sum(rows, axis=(1, 2), dtype=jnp.int32)


def specified(arguments: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Output and LSE by `attention`, of the public function's arguments by name; what is not given has its default."""
    query = _four_axes(arguments["query"])
    names = ("key", "value", "lengths", "page_table", "key_scale", "value_scale")
    out, lse, _ = attention(
        query,
        Cache(**{name: arguments[name] for name in names if name in arguments}),
        arguments.get("sink"),
        scale=_scale(arguments),
        soft_cap=arguments.get("soft_cap"),
        window=arguments.get("window"),
    )
    return _as_asked(arguments, out, lse)


def naively(arguments: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """The same with a contiguous cache, logits and probabilities in the query's dtype, softmax in float32."""
    query, lengths = _four_axes(arguments["query"]), arguments["lengths"]
    (B, T, N, H), dtype = query.shape, query.dtype
    key, value = (_contiguous(arguments, name) for name in ("key", "value"))
    S, K = key.shape[1:3]
    x = jnp.einsum("btkgh,bskh->bkgts", query.reshape(B, T, K, N // K, H), key).reshape(B, N, T, S)
    x = x.astype(jnp.promote_types(dtype, jnp.float32)) * _scale(arguments)
    if (soft_cap := arguments.get("soft_cap")) is not None:
        x = soft_cap * jnp.tanh(x / soft_cap)
    x = jnp.where(visible(lengths, T, jnp.arange(S), arguments.get("window"))[:, None], x, -jnp.inf)
    everything = x
    if (sink := arguments.get("sink")) is not None:
        column = jnp.broadcast_to(sink[:, None, None].astype(x.dtype), (B, N, T, 1))
        everything = jnp.concatenate([x, column], axis=-1)
    lse = jax.nn.logsumexp(everything, axis=-1)
    p = jnp.exp(x - jnp.where(jnp.isneginf(lse), 0, lse)[..., None]).astype(dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", p.reshape(B, K, N // K, T, S), value).reshape(B, T, N, -1)
    return _as_asked(arguments, out, lse)


def _contiguous(arguments: dict[str, Any], name: str) -> jax.Array:
    array, dtype = arguments[name], arguments["query"].dtype
    scale, table = arguments.get(f"{name}_scale"), arguments.get("page_table")
    if table is not None:
        array = array[table].reshape(len(table), -1, *array.shape[2:])
    return array.astype(dtype) * (1 if scale is None else scale.astype(dtype)[:, None])


def _four_axes(query: jax.Array) -> jax.Array:
    return query if query.ndim == 4 else query[:, None]


def _as_asked(arguments: dict[str, Any], out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (out, lse) if arguments["query"].ndim == 4 else (out[:, 0], lse[:, :, 0])


def _scale(arguments: dict[str, Any]) -> float:
    return arguments.get("scale", arguments["query"].shape[-1] ** -0.5)
