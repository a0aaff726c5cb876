# SPDX-License-Identifier: Apache-2.0
"""flash_attention for TPUs: FastAttention's two-level tiling and tiling-mask (Lin et al., 2024, sections 4.1, 4.2).

A grid step takes a first-level block of logits, block_q x width (T rows, S columns), through three stages that meet
in on-chip memory; each unit cuts the block its own way, and the softmax is updated once a block:

    matrix unit   S[:, sub] = Q K[sub]^T             sub-blocks of block_k columns
    vector unit   s = mask(scale S[r, :]); m' = max(m, rowmax s); P[r, :] = exp(s - m')
                  l = l exp(m - m') + rowsum P; acc = acc exp(m - m')      slices of block_rows whole rows
    matrix unit   acc += P[:, sub] V[sub]            sub-blocks again

A statistic of a row is kept once in every lane of a register, [block_q, lanes], so that no broadcast is needed.

The backward passes recompute S and P from (q, k, v, out, lse) and sum in the order of the grid: bitwise repeatable.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.core.tpu import LANES, VMEM_BYTES
from pallas_kernels.flash_attention import tiles
from pallas_kernels.flash_attention.config import MosaicTpuConfig, mosaic_tpu_heuristic
from pallas_kernels.flash_attention.mosaic_tpu.grid import (
    Arrays,
    Output,
    Plane,
    Visits,
    Where,
    key_lanes,
    key_output,
    pad,
    plan_visits,
    prepare,
    query_lanes,
    query_output,
    row_by_row,
    run,
)
from pallas_kernels.flash_attention.xla import Gradients
from pallas_kernels.masks import Mask


def supports(call: Call, device: Device) -> Refusal | None:
    if device.platform != "tpu":
        return Refusal(f"its kernels are for TPUs, and this is {device.platform}")
    if not device.arch:
        return Refusal(f"its kernels are compiled for TPU v4 and later, and this is {device.kind}")
    if call.direction == "forward" and call.option("unified_max") is not None:
        return Refusal(
            "its softmax is online; unified_max has kernels for NVIDIA Hopper GPUs, and runs in xla anywhere"
        )
    dtype = call.arguments[0].dtype
    if dtype not in ("float32", "bfloat16"):
        return Refusal(f"TPUs compute in float32 and bfloat16, not in {dtype}")
    needed = mosaic_tpu_heuristic(call).vmem_bytes(call)
    if needed > VMEM_BYTES:
        H, Hv = call.sizes["H"], call.sizes["Hv"]
        mib = f"{needed / 2**20:.0f} MiB of on-chip memory, and it plans with {VMEM_BYTES // 2**20}"
        return Refusal(f"tiles of head dims H={H}, Hv={Hv} need {mib}")
    return None


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
    config: MosaicTpuConfig,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, Hv] in the input dtype and LSE [B, N, T] in float32."""
    plane, arrays = prepare(query, key, value, bias, mask, scale, soft_cap, config)
    if sink is not None:
        # [N, 1, lanes]: one register row for each head.
        arrays = arrays._replace(
            sink=jnp.broadcast_to(sink.astype(jnp.float32)[:, None, None], (*sink.shape, 1, LANES))
        )
    visits = plan_visits(plane, mask)
    out, lse = run(
        _forward,
        plane,
        visits,
        arrays,
        **row_by_row(plane, visits),
        outputs=(query_output(plane, plane.Hv), query_lanes(plane)),
        scratch=(
            pltpu.VMEM((plane.block_q, LANES), jnp.float32),  # m
            pltpu.VMEM((plane.block_q, LANES), jnp.float32),  # l
            pltpu.VMEM((plane.block_q, plane.Hv), jnp.float32),  # acc
            pltpu.VMEM((plane.block_q, plane.width), jnp.float32),  # S
            pltpu.VMEM((plane.block_q, plane.width), plane.dtype),  # P
            _columns(plane),
        ),
        products=(1, 1),
    )
    return jnp.swapaxes(out, 1, 2)[:, : plane.T], lse[:, :, 0, : plane.T]


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
    config: MosaicTpuConfig,
) -> Gradients:
    """Gradients from the residuals (q, k, v, out, lse): a pass over rows of tiles for dQ, one over columns for dK and
    dV, and a third one for a bias of T x S. A bias broadcast over rows or columns comes out of the first two."""
    plane, arrays = prepare(query, key, value, bias, mask, scale, soft_cap, config)
    # dS = P * (dP - delta) with delta = sum_h dO O; a gradient that enters through the LSE adds P * dlse.
    delta = jnp.einsum("btnh,btnh->bnt", dout, out, preferred_element_type=jnp.float32)
    shift = dlse.astype(jnp.float32) - delta
    # Rows that see nothing, and rows beyond T, get P = exp(s - inf) = 0 whatever their logits are.
    lse_rows = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
    arrays = arrays._replace(
        dout=pad(jnp.swapaxes(dout, 1, 2), 2, plane.T_padded),
        lse=pad(lse_rows, 2, plane.T_padded, jnp.inf)[:, :, None],
        shift=pad(shift, 2, plane.T_padded)[:, :, None],
    )
    # A bias that is broadcast over columns (rows) is as long as its gradient is: sums of dS along rows (columns).
    over_columns = arrays.bias is not None and arrays.bias.shape[2] != 1 and arrays.bias.shape[3] == 1
    over_rows = arrays.bias is not None and arrays.bias.shape[2] == 1
    dq, *row_sums = _query_gradient(plane, arrays, mask, sums=over_columns)
    dk, dv, *column_sums = _key_gradients(plane, arrays, mask, sums=over_rows)
    dbias = None
    if bias is not None:
        if over_columns:
            dbias = row_sums[0][:, :, 0, : plane.T, None]
        elif over_rows:
            dbias = column_sums[0][:, :, :, : plane.S]
        else:
            dbias = _bias_gradient(plane, arrays, mask)[:, :, : plane.T, : plane.S]
        dbias = _sum_to(dbias, bias.shape).astype(bias.dtype)
    dsink = None
    if sink is not None:  # a key without a value row: dP = 0 there
        sink_rows = sink.astype(jnp.float32)[:, None]
        p_sink = jnp.where(jnp.isneginf(sink_rows), 0, jnp.exp(sink_rows - lse_rows))
        dsink = jnp.sum(p_sink * shift, axis=(0, 2)).astype(sink.dtype)
    return Gradients(
        jnp.swapaxes(dq, 1, 2)[:, : plane.T],
        jnp.swapaxes(dk, 1, 2)[:, : plane.S],
        jnp.swapaxes(dv, 1, 2)[:, : plane.S],
        dbias,
        dsink,
    )


def _sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums the axes along which `shape` was broadcast."""
    wide = (1,) * (x.ndim - len(shape)) + shape
    axes = tuple(axis for axis, n in enumerate(wide) if n != x.shape[axis])
    return x.sum(axes, keepdims=True).reshape(shape)


# --- Inside a kernel ------------------------------------------------------------------------------------------------


def _dot(a, b, contract: tuple[int, int]):
    """A product on the matrix unit, accumulated in float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _by_class(visits: Visits, w: Where, tile: Callable[[bool], None]) -> None:
    """Runs `tile(masked)`, compiled twice: full tiles contain no masking code, empty ones none at all."""
    if visits.any_mixed:
        pl.when(w.live & w.mixed)(lambda: tile(True))
    if visits.any_full:
        pl.when(w.live & jnp.logical_not(w.mixed))(lambda: tile(False))


def _for_rows(plane: Plane, body: Callable[[Any], None]) -> None:
    """Second level of the vector unit: `body(r)` for the first row of each slice of whole rows."""

    def step(n, carry):
        body(pl.multiple_of(n * plane.block_rows, plane.block_rows))
        return carry

    lax.fori_loop(0, plane.block_q // plane.block_rows, step, None)


def _across(x, width: int):
    """[R, lanes], every lane alike, to [R, width]."""
    return jnp.concatenate([x] * -(-width // LANES), axis=1)[:, :width]


def _down(lanes_ref, column_ref) -> None:
    """A vector along lanes [1, R] to the layout of per-row statistics [R, lanes]."""
    column_ref[...] = jnp.broadcast_to(lanes_ref[...], (LANES, lanes_ref.shape[1])).T


def _piece(ref, rows, dtype):
    """Rows of a tile whose axes may be broadcast."""
    return (ref[...] if ref.shape[0] == 1 else ref[rows, :]).astype(dtype)


def _logits(plane: Plane, w: Where, x: Arrays, s_ref, columns_ref, r, masked: bool):
    """Masked logits of the row slice at r, -inf where hidden, and the slope of the soft cap (None without one)."""
    rows = pl.ds(r, plane.block_rows)
    s, slope = s_ref[rows, :] * plane.scale, None
    if plane.soft_cap is not None:
        tanh = jnp.tanh(s / plane.soft_cap)
        s, slope = plane.soft_cap * tanh, 1 - tanh * tanh
    if x.bias is not None:
        s = s + _piece(x.bias, rows, jnp.float32)
    if masked:
        s = jnp.where(_visible(plane, w, x, columns_ref, r), s, -jnp.inf)
    return s, slope


def _visible(plane: Plane, w: Where, x: Arrays, columns_ref, r):
    """What the mask shows of a row slice: [block_rows, width]."""
    R, width = plane.block_rows, plane.width
    row, col = w.i * plane.block_q, w.j * width
    if plane.use_window:
        # A window of the M-mask, at multiples of a register's 128 lanes. It hides the columns beyond S as well:
        # the last row sees column S - 1, and padding rows beyond it are thrown away.
        i, j = tiles.mask_window(row, col, plane.T, plane.S, plane.block_q, width, LANES)
        window = x.m_mask[pl.ds(pl.multiple_of(i + r, 32), R), pl.ds(pl.multiple_of(j, LANES), width)]
        return window.astype(jnp.int32) == 0
    i = row + r + lax.broadcasted_iota(jnp.int32, (R, width), 0)
    j = col + lax.broadcasted_iota(jnp.int32, (R, width), 1)
    visible = j < plane.S
    if plane.lowered is not None:
        rows = pl.ds(r, R)
        per_row = [_across(columns_ref[n, rows, :], width) for n in range(len(x.rows))]
        per_col = [jnp.broadcast_to(ref[...], (R, width)) for ref in x.cols]
        dense = [jnp.broadcast_to(_piece(ref, rows, jnp.int32), (R, width)) for ref in x.dense]
        visible = visible & plane.lowered.visible(lambda: i, lambda: j, per_row, per_col, dense)
    return visible


def _columns(plane: Plane):
    """Scratch for the mask's values along rows, in the layout of per-row statistics; a token of it where none are."""
    n = 0 if plane.lowered is None else len(plane.lowered.rows)
    return pltpu.VMEM((n, plane.block_q, LANES) if n else (1, 8, LANES), jnp.int32)


def _rows_down(x: Arrays, columns_ref) -> None:
    for n, lanes_ref in enumerate(x.rows):
        _down(lanes_ref, columns_ref.at[n])


# --- Forward --------------------------------------------------------------------------------------------------------


def _forward(plane: Plane, visits: Visits, w: Where, x: Arrays, outputs, scratch) -> None:
    out_ref, lse_ref = outputs
    m_ref, l_ref, acc_ref, s_ref, p_ref, columns_ref = scratch

    @pl.when(w.first)
    def _start():
        if x.sink is None:
            m_ref[...] = jnp.full_like(m_ref, -jnp.inf)
            l_ref[...] = jnp.zeros_like(l_ref)
        else:  # the sink is a key of weight exp(sink - sink) that was seen before all others
            m_ref[...] = jnp.broadcast_to(x.sink[...], m_ref.shape)
            l_ref[...] = jnp.where(m_ref[...] == -jnp.inf, 0.0, 1.0)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def tile(masked: bool) -> None:
        q = x.query[...]
        for sub in plane.sub_blocks:
            s_ref[:, sub] = _dot(q, x.key[sub, :], (1, 1))
        if masked:
            _rows_down(x, columns_ref)

        def update(r):
            rows = pl.ds(r, plane.block_rows)
            s, _ = _logits(plane, w, x, s_ref, columns_ref, r, masked)
            m = m_ref[rows, :]
            m_new = jnp.maximum(m, s.max(-1, keepdims=True))
            # While a row has seen no visible key its maximum is -inf; 0 in its place keeps exp(-inf - m) = 0.
            m_safe = jnp.where(m_new == -jnp.inf, 0.0, m_new)
            p = jnp.exp(s - _across(m_safe, plane.width))
            rescale = jnp.exp(m - m_safe)
            m_ref[rows, :] = m_new
            l_ref[rows, :] = l_ref[rows, :] * rescale + p.sum(-1, keepdims=True)
            acc_ref[rows, :] = acc_ref[rows, :] * _across(rescale, plane.Hv)
            p_ref[rows, :] = p.astype(p_ref.dtype)

        _for_rows(plane, update)
        acc_ref[...] += sum(_dot(p_ref[:, sub], x.value[sub, :], (1, 0)) for sub in plane.sub_blocks)

    _by_class(visits, w, tile)

    @pl.when(w.last)
    def _finish():
        empty = l_ref[...] == 0
        l = jnp.where(empty, 1.0, l_ref[...])
        out_ref[...] = (acc_ref[...] / _across(l, plane.Hv)).astype(out_ref.dtype)
        lse_ref[...] = jnp.where(empty, -jnp.inf, m_ref[...] + jnp.log(l)).T[:1]


# --- Backward: Dao et al., "FlashAttention", 2022, algorithm 4, one kernel for each loop order ----------------------


class _Work(NamedTuple):
    """Scratch of a backward pass: S and dP of a first-level block, and what belongs to its rows."""

    s: Any  # [block_q, width] float32
    dp: Any  # [block_q, width] float32
    lse: Any  # [block_q, lanes] float32
    shift: Any  # [block_q, lanes] float32
    columns: Any  # [n, block_q, lanes] int32


def _work(plane: Plane) -> list:
    block, column = (plane.block_q, plane.width), (plane.block_q, LANES)
    return [*(pltpu.VMEM(shape, jnp.float32) for shape in (block, block, column, column)), _columns(plane)]


def _tile_gradients(plane, w, x, work: _Work, masked: bool, use: Callable) -> None:
    """`use(rows, p, dlogits, ds)` for each row slice of a tile: P = exp(logit - lse), its gradient before and after
    the soft cap and the scale."""
    q, do = x.query[...], x.dout[...]
    for sub in plane.sub_blocks:
        work.s[:, sub] = _dot(q, x.key[sub, :], (1, 1))
        work.dp[:, sub] = _dot(do, x.value[sub, :], (1, 1))
    _down(x.lse, work.lse)
    _down(x.shift, work.shift)
    if masked:
        _rows_down(x, work.columns)

    def gradients(r):
        rows = pl.ds(r, plane.block_rows)
        s, slope = _logits(plane, w, x, work.s, work.columns, r, masked)
        p = jnp.exp(s - _across(work.lse[rows, :], plane.width))
        dlogits = p * (work.dp[rows, :] + _across(work.shift[rows, :], plane.width))
        ds = dlogits * plane.scale if slope is None else dlogits * slope * plane.scale
        use(rows, p, dlogits, ds)

    _for_rows(plane, gradients)


def _query_gradient(plane: Plane, arrays: Arrays, mask: Mask | None, *, sums: bool) -> Sequence[jax.Array]:
    """dQ [B, N, T', H]; with `sums` the sums of dS along rows, [B, N, 1, T']."""
    visits = plan_visits(plane, mask)
    column = pltpu.VMEM((plane.block_q, LANES), jnp.float32)
    return run(
        _query_pass,
        plane,
        visits,
        arrays,
        **row_by_row(plane, visits),
        outputs=[query_output(plane, plane.H), *([query_lanes(plane)] if sums else [])],
        scratch=[
            pltpu.VMEM((plane.block_q, plane.H), jnp.float32),  # dQ
            column,  # sums
            pltpu.VMEM((plane.block_q, plane.width), plane.dtype),  # dS
            *_work(plane),
        ],
        products=(2, 1),
    )


def _query_pass(plane: Plane, visits: Visits, w: Where, x: Arrays, outputs, scratch) -> None:
    """dQ[i] = sum_j dS K[j]."""
    dq_ref, *sums_ref = outputs
    acc_ref, sums_acc_ref, ds_ref, *work = scratch

    @pl.when(w.first)
    def _start():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        sums_acc_ref[...] = jnp.zeros_like(sums_acc_ref)

    def tile(masked: bool) -> None:
        def use(rows, p, dlogits, ds):
            ds_ref[rows, :] = ds.astype(ds_ref.dtype)
            if sums_ref:
                sums_acc_ref[rows, :] += jnp.broadcast_to(dlogits.sum(-1, keepdims=True), (plane.block_rows, LANES))

        _tile_gradients(plane, w, x, _Work(*work), masked, use)
        acc_ref[...] += sum(_dot(ds_ref[:, sub], x.key[sub, :], (1, 0)) for sub in plane.sub_blocks)

    _by_class(visits, w, tile)

    @pl.when(w.last)
    def _finish():
        dq_ref[...] = acc_ref[...].astype(dq_ref.dtype)
        for ref in sums_ref:
            ref[...] = sums_acc_ref[...].T[:1]


def _key_gradients(plane: Plane, arrays: Arrays, mask: Mask | None, *, sums: bool) -> Sequence[jax.Array]:
    """dK [B, K, S', H] and dV [B, K, S', Hv]; with `sums` the sums of dS along columns, [B, N, 1, S']."""
    visits = plan_visits(plane, mask, transpose=True)
    G, steps = plane.G, visits.steps

    def where(b, k, j, g, step, numbers):
        n = k * G + g
        i, live, mixed = visits.at(numbers, b, n, j, step)
        # The G query heads that share a key head are summed here, one after another.
        first, last = (g == 0) & (step == 0), (g == G - 1) & (step == steps - 1)
        return Where(b, n, i, j, live, mixed, first, last, head=(step == 0, step == steps - 1))

    block = (plane.block_q, plane.width)
    return run(
        _key_pass,
        plane,
        visits,
        arrays,
        grid=(plane.B, plane.K, plane.S_padded // plane.width, G, steps),
        where=where,
        parallel=3,
        streamed=plane.block_q,
        outputs=[
            key_output(plane, plane.H),
            key_output(plane, plane.Hv),
            *([key_lanes(plane)] if sums else []),
        ],
        scratch=[
            pltpu.VMEM((plane.width, plane.H), jnp.float32),  # dK
            pltpu.VMEM((plane.width, plane.Hv), jnp.float32),  # dV
            pltpu.VMEM((1, plane.width), jnp.float32),  # sums
            pltpu.VMEM(block, plane.dtype),  # P
            pltpu.VMEM(block, plane.dtype),  # dS
            *_work(plane),
        ],
        products=(2, 2),
    )


def _key_pass(plane: Plane, visits: Visits, w: Where, x: Arrays, outputs, scratch) -> None:
    """dV[j] = sum_i P^T dO[i], dK[j] = sum_i dS^T Q[i]."""
    dk_ref, dv_ref, *sums_ref = outputs
    dk_acc_ref, dv_acc_ref, sums_acc_ref, p_ref, ds_ref, *work = scratch

    @pl.when(w.first)
    def _start():
        dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
        dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

    @pl.when(w.head[0])
    def _start_head():  # each query head has its own sums
        sums_acc_ref[...] = jnp.zeros_like(sums_acc_ref)

    def tile(masked: bool) -> None:
        def use(rows, p, dlogits, ds):
            p_ref[rows, :] = p.astype(p_ref.dtype)
            ds_ref[rows, :] = ds.astype(ds_ref.dtype)
            if sums_ref:
                sums_acc_ref[...] += dlogits.sum(0, keepdims=True)

        _tile_gradients(plane, w, x, _Work(*work), masked, use)
        for sub in plane.sub_blocks:
            # Sums over rows are cut like those over columns: short ones round less.
            dv_acc_ref[sub, :] += sum(_dot(p_ref[rows, sub], x.dout[rows, :], (0, 0)) for rows in plane.row_blocks)
            dk_acc_ref[sub, :] += sum(_dot(ds_ref[rows, sub], x.query[rows, :], (0, 0)) for rows in plane.row_blocks)

    _by_class(visits, w, tile)

    if sums_ref:

        @pl.when(w.head[1])
        def _finish_head():
            sums_ref[0][...] = sums_acc_ref[...]

    @pl.when(w.last)
    def _finish():
        dk_ref[...] = dk_acc_ref[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_acc_ref[...].astype(dv_ref.dtype)


def _bias_gradient(plane: Plane, arrays: Arrays, mask: Mask | None) -> jax.Array:
    """dS of a bias [B|1, N|1, T, S], summed over the batch and heads that share it: nothing larger than the bias."""
    visits = plan_visits(plane, mask, hull=True)
    B, N = arrays.bias.shape[:2]

    def where(b_bias, n_bias, i, j, b, n, numbers):
        b, n, first = b_bias + b, n_bias + n, (b == 0) & (n == 0)
        return Where(b, n, i, j, visits.within(numbers, b, n, i, j), True, first, False)

    block = (plane.block_q, plane.width)
    output = Output(
        (B, N, plane.T_padded, plane.S_padded),
        jnp.float32,
        (None, None, *block),
        lambda w: (w.b if B > 1 else 0, w.n if N > 1 else 0, w.i, w.j),
    )
    (dbias,) = run(
        _bias_pass,
        plane,
        visits,
        arrays,
        grid=(B, N, plane.T_padded // block[0], plane.S_padded // block[1], plane.B // B, plane.N // N),
        where=where,
        parallel=4,
        streamed=sum(block),
        outputs=[output],
        scratch=_work(plane),
        products=(1, 1),
    )
    return dbias


def _bias_pass(plane: Plane, visits: Visits, w: Where, x: Arrays, outputs, scratch) -> None:
    (dbias_ref,) = outputs

    @pl.when(w.first)
    def _start():  # tiles that the mask skips keep these zeros
        dbias_ref[...] = jnp.zeros_like(dbias_ref)

    @pl.when(w.live)
    def _tile():
        def use(rows, p, dlogits, ds):
            dbias_ref[rows, :] += dlogits

        _tile_gradients(plane, w, x, _Work(*scratch), True, use)
