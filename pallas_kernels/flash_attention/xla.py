# SPDX-License-Identifier: Apache-2.0
"""flash_attention in plain XLA: linear memory forward and backward, any shape, any device.

One loop over the live tiles of the T x S plane (tiles.work_list). Arrays are laid out heads first, grouped by the
key/value head that they share; a tile of logits is [B, K, G, block_q, block_k] and the only quadratic thing alive.

    forward                          backward (Dao et al., "FlashAttention", 2022, algorithm 4)
      m, l, acc [.., T]  <--+          P  = exp(logit - lse)
      for tile (i, j):      |          dV[j] += P^T dO[i]
        rows i of m, l, acc-+          dS = P * (dO[i] V[j]^T - delta[i] + dlse[i])
      out = acc / l                    dQ[i] += dS K[j],  dK[j] += dS^T Q[i],  dbias[i, j] += dS

An asynchronous softmax (core/softmax.py) has phi in place of m, so that a tile only adds to l and acc; if a row turns
out to be out of bounds, the online loop runs as well, and such rows are taken from it.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.core.softmax import UnifiedMax
from pallas_kernels.core.varying import vary_like
from pallas_kernels.flash_attention import tiles
from pallas_kernels.flash_attention.config import XlaConfig
from pallas_kernels.masks import Mask
from pallas_kernels.masks.base import Array


def supports(call: Call, device: Device) -> Refusal | None:
    return None  # any shape, mask, dtype and device


@dataclasses.dataclass(frozen=True)
class _Plane:
    """Everything a tile needs besides its own rows and columns; T and S are the true, unpadded lengths."""

    query: jax.Array  # [B, K, G, T', H]   T' = T rounded up to block_q
    key: jax.Array  # [B, K, S', H]        S' = S rounded up to block_k
    value: jax.Array  # [B, K, S', Hv]
    bias: jax.Array | None  # [B|1, N|1, T'|1, S'|1]
    mask: Mask | None
    scale: float
    soft_cap: float | None
    T: int
    S: int
    config: XlaConfig

    @property
    def accumulator(self) -> jnp.dtype:
        return jnp.promote_types(self.query.dtype, jnp.float32)

    def query_rows(self, array: jax.Array, i: jax.Array) -> jax.Array:
        """Rows of query block i of an array [B, K, G, T', ...]."""
        return lax.dynamic_slice_in_dim(array, i * self.config.block_q, self.config.block_q, axis=3)

    def put_query_rows(self, array: jax.Array, rows: jax.Array, i: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(array, rows, i * self.config.block_q, axis=3)

    def key_rows(self, array: jax.Array, j: jax.Array) -> jax.Array:
        """Rows of key block j of an array [B, K, S', ...]."""
        return lax.dynamic_slice_in_dim(array, j * self.config.block_k, self.config.block_k, axis=2)

    def add_key_rows(self, array: jax.Array, rows: jax.Array, j: jax.Array) -> jax.Array:
        start = j * self.config.block_k
        return lax.dynamic_update_slice_in_dim(array, self.key_rows(array, j) + rows, start, axis=2)

    def logits(self, i: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Masked logits of tile (i, j), -inf where hidden, and the slope of the soft cap (None without one)."""
        q, k = self.query_rows(self.query, i), self.key_rows(self.key, j)
        s = self.products(q, k) * self.scale
        slope = None
        if self.soft_cap is not None:
            tanh = jnp.tanh(s / self.soft_cap)
            s, slope = self.soft_cap * tanh, 1 - tanh * tanh
        if self.bias is not None:
            s = s + self._grouped(self.bias_tile(self.bias, i, j)).astype(s.dtype)
        rows = i * self.config.block_q + jnp.arange(self.config.block_q, dtype=jnp.int32)
        cols = j * self.config.block_k + jnp.arange(self.config.block_k, dtype=jnp.int32)
        if self.S % self.config.block_k:  # the ragged last block of keys
            s = jnp.where(cols < self.S, s, -jnp.inf)
        if self.mask is not None:
            s = jnp.where(self._grouped(self.mask.allowed(rows, cols, self.T, self.S)), s, -jnp.inf)
        return s, slope

    def products(self, rows: jax.Array, cols: jax.Array) -> jax.Array:
        """Dot product of each row [B, K, G, t, H] with each column [B, K, s, H], [B, K, G, t, s]."""
        if rows.shape[3] > 1:
            return jnp.einsum("bkgth,bksh->bkgts", rows, cols, preferred_element_type=self.accumulator)
        # One query: with the keys as the tall operand CPUs sum over H in vectors, not one by one: half the time and
        # half the rounding error.
        return jnp.einsum("bksh,bkgth->bksgt", cols, rows, preferred_element_type=self.accumulator).transpose(
            0, 1, 3, 4, 2
        )

    def _grouped(self, tile: Array) -> Array:
        """[B|1, N|1, R, C] -> [B|1, K|1, G|1, R, C], as the logits are laid out."""
        K, G = self.query.shape[1:3]
        heads = (1, 1) if tile.shape[1] == 1 else (K, G)
        return tile.reshape(tile.shape[0], *heads, *tile.shape[2:])

    def _bias_window(self, bias: jax.Array, i: jax.Array, j: jax.Array) -> tuple[list, list[int]]:
        """Start and size of tile (i, j) in a bias whose axes may be broadcast (size 1)."""
        sizes = (self.config.block_q, self.config.block_k)
        full = [n != 1 for n in bias.shape[2:]]
        starts = [0, 0, *(x * size if is_full else 0 for x, size, is_full in zip((i, j), sizes, full, strict=True))]
        # One integer type for all: with 64-bit types enabled a Python 0 would be another one than i and j.
        starts = [jnp.asarray(start, jnp.int32) for start in starts]
        return starts, [*bias.shape[:2], *(n if f else 1 for n, f in zip(sizes, full, strict=True))]

    def bias_tile(self, bias: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        return lax.dynamic_slice(bias, *self._bias_window(bias, i, j))

    def add_bias_tile(self, dbias: jax.Array, ds: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        """Adds dS of tile (i, j), summed over the axes along which the bias is broadcast."""
        starts, sizes = self._bias_window(dbias, i, j)
        ds = ds.reshape(ds.shape[0], -1, *ds.shape[3:])
        broadcast = [axis for axis, (n, m) in enumerate(zip(ds.shape, sizes, strict=True)) if n != m]
        tile = lax.dynamic_slice(dbias, starts, sizes) + ds.sum(broadcast, keepdims=True)
        return lax.dynamic_update_slice(dbias, tile, starts)


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    sink: jax.Array | None,
    mask: Mask | None,
    *,
    scale: float,
    soft_cap: float | None,
    config: XlaConfig,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, Hv] in the input dtype and LSE [B, N, T] in float32 (float64 for float64)."""
    plane = _plane(query, key, value, bias, mask, scale, soft_cap, config)
    return _finish(plane, _online(plane), sink, query.dtype)


def forward_asynchronously(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    sink: jax.Array | None,
    mask: Mask | None,
    unified_max: UnifiedMax,
    *,
    scale: float,
    soft_cap: float | None,
    config: XlaConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `forward`, and how many rows of each batch element were out of bounds and computed again, int32 [B]."""
    plane = _plane(query, key, value, bias, mask, scale, soft_cap, config)
    sums, bad = _asynchronous(plane, unified_max)
    again = lax.cond(jnp.any(bad), lambda: _online(plane), lambda: sums)
    sums = jax.tree.map(lambda new, old: jnp.where(bad, new, old), again, sums)
    return *_finish(plane, sums, sink, query.dtype), jnp.sum(bad, axis=(1, 2, 3, 4), dtype=jnp.int32)


class _Sums(NamedTuple):
    """Of each row: what exponents are less than by, the sum of weights, [B, K, G, T', 1] both, and that of weighted
    values [B, K, G, T', Hv]."""

    m: jax.Array
    l: jax.Array
    acc: jax.Array


def _online(plane: _Plane) -> _Sums:
    """Online softmax: m is the row's maximum."""
    B, K, G, T_padded, _ = plane.query.shape
    dtype = plane.accumulator

    def tile(i, j, sums):
        m, l, acc = (plane.query_rows(x, i) for x in sums)
        s, _ = plane.logits(i, j)
        m_new = jnp.maximum(m, s.max(-1, keepdims=True))
        # While a row has seen no visible key its maximum is -inf; 0 in its place keeps exp(-inf - m) = 0.
        m_safe = jnp.where(jnp.isneginf(m_new), 0, m_new)
        p = jnp.exp(s - m_safe)
        rescale = jnp.exp(m - m_safe)
        l = l * rescale + p.sum(-1, keepdims=True)
        v = plane.key_rows(plane.value, j)
        acc = acc * rescale + jnp.einsum("bkgts,bksh->bkgth", p.astype(v.dtype), v, preferred_element_type=dtype)
        return _Sums(*(plane.put_query_rows(x, rows, i) for x, rows in zip(sums, (m_new, l, acc), strict=True)))

    rows = (B, K, G, T_padded)
    nothing = jnp.zeros((*rows, 1), dtype)
    start = _Sums(nothing - jnp.inf, nothing, jnp.zeros((*rows, plane.value.shape[-1]), dtype))
    return _for_each_tile(plane, tile, start)


def _asynchronous(plane: _Plane, unified_max: UnifiedMax) -> tuple[_Sums, jax.Array]:
    """Asynchronous softmax: m is phi, and -inf in rows that see nothing. And which rows are out of bounds."""
    B, K, G, T_padded, _ = plane.query.shape
    dtype, rows = plane.accumulator, (B, K, G, T_padded)
    phi = unified_max.per_head(K * G).astype(dtype).reshape(K, G, 1, 1)
    # Weights up to exp(60) are beyond the range of float16, unlike those of an online softmax, which are 1 at most.
    wide = dtype if plane.value.dtype == jnp.float16 else plane.value.dtype

    def tile(i, j, state):
        l, acc, bad = (plane.query_rows(x, i) for x in state)
        s, _ = plane.logits(i, j)
        x = s - phi
        p = jnp.exp(x)
        bad = bad | jnp.any(~jnp.isneginf(s) & unified_max.out_of_bounds(x), axis=-1, keepdims=True)
        v = plane.key_rows(plane.value, j)
        more = jnp.einsum("bkgts,bksh->bkgth", p.astype(wide), v, preferred_element_type=dtype)
        rows = l + p.sum(-1, keepdims=True), acc + more, bad
        return tuple(plane.put_query_rows(x, new, i) for x, new in zip(state, rows, strict=True))

    nothing = jnp.zeros((*rows, 1), dtype)
    l, acc, bad = _for_each_tile(
        plane, tile, (nothing, jnp.zeros((*rows, plane.value.shape[-1]), dtype), nothing > 0), phi
    )
    padding = jnp.arange(T_padded)[:, None] >= plane.T
    return _Sums(jnp.where(l == 0, -jnp.inf, phi), l, acc), bad & ~padding


def _finish(plane: _Plane, sums: _Sums, sink: jax.Array | None, dtype) -> tuple[jax.Array, jax.Array]:
    """Output and LSE; the sink is one more logit without a value."""
    m, l, acc = sums
    _, K, G, *_ = plane.query.shape
    if sink is not None:
        sink = sink.astype(m.dtype).reshape(1, K, G, 1, 1)
        m_new = jnp.maximum(m, sink)
        l, acc, m = l * jnp.exp(m - m_new) + jnp.exp(sink - m_new), acc * jnp.exp(m - m_new), m_new
    empty = l == 0
    l = jnp.where(empty, 1, l)
    lse = jnp.where(empty, -jnp.inf, m + jnp.log(l))
    out = _from_heads_first((acc / l).astype(dtype), plane.T)
    return out, lse.reshape(len(lse), K * G, -1)[:, :, : plane.T]


class Gradients(NamedTuple):
    """Cotangents of the differentiable inputs; None where the input is None."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None
    sink: jax.Array | None


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    sink: jax.Array | None,
    mask: Mask | None,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
    *,
    scale: float,
    soft_cap: float | None,
    config: XlaConfig,
) -> Gradients:
    """Gradients from the residuals (q, k, v, out, lse); deterministic, one pass over the live tiles."""
    plane = _plane(query, key, value, bias, mask, scale, soft_cap, config)
    dtype = plane.accumulator
    B, K, G, T_padded, _ = plane.query.shape

    def rows_of(x):  # [B, N, T] -> [B, K, G, T', 1]
        x = _pad_axis(x.astype(dtype), 2, T_padded)
        return x.reshape(B, K, G, T_padded, 1)

    dout_rows = _heads_first(dout, K, T_padded)
    # dS = P * (dP - delta) with delta = sum_h dO O; a gradient that enters through the LSE adds P * dlse.
    delta = jnp.einsum("btnh,btnh->bnt", dout, out, preferred_element_type=dtype)
    shift = rows_of(dlse.astype(dtype) - delta)
    lse_rows = rows_of(jnp.where(jnp.isneginf(lse), 0, lse))  # an empty row has P = exp(-inf) = 0

    def tile(i, j, grads):
        dq, dk, dv, dbias = grads
        s, slope = plane.logits(i, j)
        p = jnp.exp(s - plane.query_rows(lse_rows, i))
        do, v = plane.query_rows(dout_rows, i), plane.key_rows(plane.value, j)
        dp = plane.products(do, v)
        ds = p * (dp + plane.query_rows(shift, i))
        if dbias is not None:
            dbias = plane.add_bias_tile(dbias, ds, i, j)
        ds = ds * scale if slope is None else ds * slope * scale
        ds, p = ds.astype(query.dtype), p.astype(do.dtype)
        q, k = plane.query_rows(plane.query, i), plane.key_rows(plane.key, j)
        dq_rows = jnp.einsum("bkgts,bksh->bkgth", ds, k, preferred_element_type=dtype)
        dk_rows = jnp.einsum("bkgts,bkgth->bksh", ds, q, preferred_element_type=dtype)
        dv_rows = jnp.einsum("bkgts,bkgth->bksh", p, do, preferred_element_type=dtype)
        return (
            plane.put_query_rows(dq, plane.query_rows(dq, i) + dq_rows, i),
            plane.add_key_rows(dk, dk_rows, j),
            plane.add_key_rows(dv, dv_rows, j),
            dbias,
        )

    start = (
        jnp.zeros(plane.query.shape, dtype),
        jnp.zeros(plane.key.shape, dtype),
        jnp.zeros(plane.value.shape, dtype),
        None if plane.bias is None else jnp.zeros(plane.bias.shape, dtype),
    )
    dq, dk, dv, dbias = _for_each_tile(plane, tile, start)
    dsink = None
    if sink is not None:
        # The sink is a key without a value row: dP = 0 there.
        sink_rows = sink.astype(dtype).reshape(1, K, G, 1, 1)
        p_sink = jnp.where(jnp.isneginf(sink_rows), 0, jnp.exp(sink_rows - lse_rows))
        dsink = jnp.sum(p_sink[..., : plane.T, :] * shift[..., : plane.T, :], axis=(0, 3, 4))
        dsink = dsink.reshape(-1).astype(sink.dtype)
    if bias is not None and dbias is not None:
        dbias = dbias[:, :, : plane.T, : plane.S].reshape(bias.shape).astype(bias.dtype)
    return Gradients(
        _from_heads_first(dq.astype(query.dtype), plane.T),
        jnp.swapaxes(dk, 1, 2)[:, : plane.S].astype(key.dtype),
        jnp.swapaxes(dv, 1, 2)[:, : plane.S].astype(value.dtype),
        dbias,
        dsink,
    )


def _plane(query, key, value, bias, mask, scale, soft_cap, config) -> _Plane:
    T, S, K = query.shape[1], key.shape[1], key.shape[2]
    T_padded, S_padded = T + -T % config.block_q, S + -S % config.block_k
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
        bias = bias if bias.shape[2] == 1 else _pad_axis(bias, 2, T_padded)
        bias = bias if bias.shape[3] == 1 else _pad_axis(bias, 3, S_padded)
    return _Plane(
        query=_heads_first(query, K, T_padded),
        key=_pad_axis(jnp.swapaxes(key, 1, 2), 2, S_padded),
        value=_pad_axis(jnp.swapaxes(value, 1, 2), 2, S_padded),
        bias=bias,
        mask=mask,
        scale=scale,
        soft_cap=soft_cap,
        T=T,
        S=S,
        config=config,
    )


def _for_each_tile(plane: _Plane, tile, state, *more: jax.Array):
    """Runs `state = tile(i, j, state)` over the live tiles; `more` is what else the tile computes with."""
    work = tiles.work_list(plane.mask, plane.T, plane.S, plane.config.block_q, plane.config.block_k)
    if isinstance(work.count, int) and work.count == 1:
        return tile(int(work.rows[0]), int(work.cols[0]), state)
    rows, cols = jnp.asarray(work.rows), jnp.asarray(work.cols)
    # Inside shard_map the state must vary over the same mesh axes before the loop as after a step.
    state = vary_like(state, (plane.query, plane.mask, more))
    return lax.fori_loop(0, work.count, lambda n, carry: tile(rows[n], cols[n], carry), state)


def _pad_axis(x: jax.Array, axis: int, size: int) -> jax.Array:
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - n if a == axis else 0) for a, n in enumerate(x.shape)])


def _heads_first(x: jax.Array, K: int, T_padded: int) -> jax.Array:
    """[B, T, N, H] -> [B, K, G, T', H]."""
    B, T, N, H = x.shape
    x = jnp.transpose(x.reshape(B, T, K, N // K, H), (0, 2, 3, 1, 4))
    return _pad_axis(x, 3, T_padded)


def _from_heads_first(x: jax.Array, T: int) -> jax.Array:
    """[B, K, G, T', H] -> [B, T, N, H]."""
    B, K, G, _, H = x.shape
    return jnp.transpose(x[:, :, :, :T], (0, 3, 1, 2, 4)).reshape(B, T, K * G, H)
