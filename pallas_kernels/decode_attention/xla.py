# SPDX-License-Identifier: Apache-2.0
"""decode_attention in plain XLA: any shape, any device, and no work beyond the longest sequence.

online softmax                          asynchronous softmax
  for chunk of keys:                      for chunk of keys:
    m' = max(m, max x)                      e   = exp(x - phi)
    l  = l exp(m - m') + sum exp(x - m')    l   = l + sum e
    acc = acc exp(m - m') + exp(x - m') V   acc = acc + e V
  out = acc / l,  lse = m + log l         out = acc / l,  lse = phi + log l;  bad rows: online softmax
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.core.softmax import UnifiedMax
from pallas_kernels.core.varying import vary_like
from pallas_kernels.decode_attention.cache import Cache
from pallas_kernels.decode_attention.config import XlaConfig
from pallas_kernels.decode_attention.reference import visible


def supports(call: Call, device: Device) -> Refusal | None:
    return None


class _Sums(NamedTuple):
    """What chunks of keys add to: [B, K, G, T] each, `acc` [B, K, G, T, Hv]."""

    m: jax.Array
    l: jax.Array
    acc: jax.Array
    bad: jax.Array


def forward(
    query: jax.Array,
    cache: Cache,
    sink: jax.Array | None,
    unified_max: UnifiedMax | None,
    *,
    scale: float,
    soft_cap: float | None,
    window: int | None,
    num_splits: int | None,
    config: XlaConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output [B, T, N, Hv] in the query's dtype, LSE [B, N, T] in float32, recomputed rows int32 [B]."""
    B, T, N, H = query.shape
    S, K, Hv = cache.S, *cache.value.shape[2:]
    G, dtype = N // K, jnp.promote_types(query.dtype, jnp.float32)
    page = 1 if cache.page_table is None else cache.key.shape[1]
    count = config.block_k if num_splits is None else -(-S // num_splits)
    count = min(S, -(-count // page) * page)
    grouped = query.reshape(B, T, K, G, H)
    # A quantized cache is exact in the query's dtype; its scales wait until products are summed up.
    unit: Any = scale if cache.key_scale is None else scale * cache.key_scale.astype(dtype)[:, None, None, None]

    def chunk(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Logits [B, K, G, T, count], which of them are seen, and the values of a chunk."""
        # The last chunk starts earlier, so as to lie in the cache; what it shares with the one before is hidden.
        first = jnp.minimum(i * count, S - count)
        s = first + jnp.arange(count)
        keys = cache.keys(first, count, query.dtype)
        x = jnp.einsum("btkgh,bskh->bkgts", grouped, keys, preferred_element_type=dtype) * unit
        x = x if soft_cap is None else soft_cap * jnp.tanh(x / soft_cap)
        seen = visible(cache.lengths, T, s, window) & (s >= i * count)
        values = jnp.where(seen.any(1)[:, :, None, None], cache.values(first, count, query.dtype), 0)
        return x, seen[:, None, None], values

    def weighted(p: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.einsum("bkgts,bskh->bkgth", p, values, preferred_element_type=dtype)

    def online(i: jax.Array, sums: _Sums) -> _Sums:
        x, seen, values = chunk(i)
        x = jnp.where(seen, x, -jnp.inf)
        m = jnp.maximum(sums.m, jnp.max(x, axis=-1))
        shift = jnp.where(jnp.isneginf(m), 0, m)  # a row that has seen no key yet
        p, alpha = jnp.exp(x - shift[..., None]), jnp.exp(sums.m - shift)
        l, acc = (
            sums.l * alpha + jnp.sum(p, axis=-1),
            sums.acc * alpha[..., None] + weighted(p.astype(query.dtype), values),
        )
        return _Sums(m, l, acc, sums.bad)

    # Weights up to exp(60) are beyond the range of float16, unlike those of an online softmax, which are 1 at most.
    wide = dtype if query.dtype == jnp.float16 else query.dtype

    def asynchronous(phi: jax.Array, bounds: UnifiedMax, i: jax.Array, sums: _Sums) -> _Sums:
        x, seen, values = chunk(i)
        x = x - phi[..., None]
        p = jnp.where(seen, jnp.exp(x), 0)
        bad = sums.bad | jnp.any(seen & bounds.out_of_bounds(x), axis=-1)
        return sums._replace(l=sums.l + jnp.sum(p, axis=-1), acc=sums.acc + weighted(p.astype(wide), values), bad=bad)

    def sweep(step: Callable[[jax.Array, _Sums], _Sums], m: jax.Array) -> _Sums:
        """All chunks that some sequence sees."""
        first = 0 if window is None else jnp.maximum(jnp.min(cache.lengths) - T + 1 - window, 0) // count
        last = -(-jnp.minimum(jnp.max(cache.lengths), S) // count)
        rows = jnp.zeros((B, K, G, T), dtype)
        start = _Sums(m, rows, jnp.zeros((B, K, G, T, Hv), dtype), rows > 0)
        start = vary_like(start, (query, cache.key, cache.lengths, sink))
        return lax.fori_loop(first, last, step, start)

    nothing = jnp.full((B, K, G, T), -jnp.inf, dtype)
    if unified_max is None:
        sums = sweep(online, nothing)
    else:
        phi = jnp.broadcast_to(unified_max.per_head(N).astype(dtype).reshape(K, G, 1), (B, K, G, T))
        sums = sweep(functools.partial(asynchronous, phi, unified_max), phi)
        again = lax.cond(jnp.any(sums.bad), lambda: sweep(online, nothing), lambda: sums)
        sums = jax.tree.map(functools.partial(_choose, sums.bad), again, sums)._replace(bad=sums.bad)
        # A row that has seen no key has no maximum, not phi: its sink may be far below.
        sums = sums._replace(m=jnp.where(sums.l == 0, -jnp.inf, sums.m))
    out, lse = _finish(sums, sink)
    if cache.value_scale is not None:
        out = out * cache.value_scale.astype(dtype)[:, None, None, None]
    out = jnp.moveaxis(out, 3, 1).reshape(B, T, N, Hv).astype(query.dtype)
    return out, lse.reshape(B, N, T), jnp.sum(sums.bad, axis=(1, 2, 3), dtype=jnp.int32)


def _choose(rows: jax.Array, yes: Any, no: Any) -> jax.Array:
    return jnp.where(rows.reshape(rows.shape + (1,) * (yes.ndim - rows.ndim)), yes, no)


def _finish(sums: _Sums, sink: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Output and LSE; the sink is one more logit without a value."""
    m, l, acc, _ = sums
    if sink is not None:
        sink = jnp.broadcast_to(sink.astype(m.dtype).reshape(*m.shape[1:3], 1), m.shape)
        m_new = jnp.maximum(m, sink)
        shift = jnp.where(jnp.isneginf(m_new), 0, m_new)
        alpha = jnp.exp(m - shift)
        m, l, acc = m_new, l * alpha + jnp.exp(sink - shift), acc * alpha[..., None]
    empty = l == 0
    l = jnp.where(empty, 1, l)
    return acc / l[..., None], jnp.where(empty, -jnp.inf, m + jnp.log(l))
