# SPDX-License-Identifier: Apache-2.0
"""flash_attention for Ampere and Ada: mma.sync products, cp.async copies; runs on Hopper too, with TMA copies.

Kernels of one warpgroup (128 threads) a block, all in registers but the operands, which sit in shared memory:

    forward   block = block_q query rows    loop over k tiles   S = Q K^T       online softmax       O  += P V
    dK, dV    block = block_k key columns   loop over q tiles   S^T = K Q^T     dP^T = V dO^T        dV += P^T dO
              (and over the G query heads that share them)      dS^T = P^T * (dP^T - delta)          dK += dS^T Q
    dQ        block = block_q query rows    loop over k tiles   S, dP = dO V^T, dS as above          dQ += dS K
    dbias     block = a tile of the bias    loop over the tiles that share it                        dbias += dS

Each result is summed by one block in one order, so that it repeats bit for bit. A warp owns whole rows of its tile: the
accumulator of one product is, register by register, the left operand of the next (`_to_left`), and nothing is
exchanged between warps. Tiles come in the order of `tiles.schedule`: mixed ones in a loop that masks, full ones in a
loop that has no masking code, empty ones never.

Source: Dao, "FlashAttention-2", 2023, algorithms 1 and 2; the backward pass is split in two kernels.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core.device import MMA_ARCHS, Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.core.mma import Ring, copies_of_device, product, store, tile_memory
from pallas_kernels.flash_attention import tiles
from pallas_kernels.flash_attention.config import Sm80Config
from pallas_kernels.flash_attention.mosaic_gpu.plane import (
    LOG2E,
    At,
    Operands,
    Plane,
    along_columns,
    along_rows,
    broadcast_index,
    cost_estimate,
    deltas,
    pad,
    prepare,
    row_stats,
    sink_gradient,
    slopes,
)
from pallas_kernels.flash_attention.xla import Gradients
from pallas_kernels.masks import Mask

# Keys and values that blocks running together should share: less than half of the L2 cache of A100 and H100.
_L2_BYTES = 2**24
Ref = Any


def supports(call: Call, device: Device) -> Refusal | None:
    if device.platform != "gpu" or device.arch not in MMA_ARCHS:
        return Refusal(f"it is for NVIDIA GPUs of Ampere, Ada and Hopper, and this is {device}")
    s = call.sizes
    dtype = call.arguments[0].dtype
    if dtype not in ("bfloat16", "float16"):
        return Refusal(f"its tensor-core products take bfloat16 and float16, not {dtype}; cast the inputs")
    if max(s["H"], s["Hv"]) > 256:
        return Refusal(f"head dim {max(s['H'], s['Hv'])} > 256 does not fit the registers of a warpgroup")
    return None


# ---- Products ----


def _to_left(x: jax.Array, dtype) -> list[jax.Array]:
    """x [rows, cols] as left operands [rows, 16] in `dtype`, which needs no data to move between threads.

    A thread holds elements (g, 2t), (g, 2t+1) and (g+8, ...) of each 8 columns of an accumulator, and of each 8
    columns of a left operand: only the order in which its registers are listed differs.
    """
    acc, left = plgpu.Layout.MMA_ACC(dtype), plgpu.Layout.MMA_LHS(dtype)
    rows, cols = x.shape
    piece = plgpu.ShapeDtypeStruct((rows, 16), dtype, layout=left)

    def relabel(ctx, x):
        del ctx
        layout = left.to_mgpu()
        x = x.astype(mgpu.utils.dtype_to_ir_type(dtype))
        registers = [x[:, start : start + 16].registers for start in range(0, cols, 16)]
        shape = layout.registers_shape((rows, 16))
        return [mgpu.FragmentedArray(_registers=r.reshape(shape), _layout=layout, _is_signed=None) for r in registers]

    inline: Any = plgpu.inline_mgpu(arg_types=(acc,), return_type=[piece] * (cols // 16))
    return inline(relabel)(x)


def _product_of_registers(acc: jax.Array, left: Sequence[jax.Array], right: Ref) -> jax.Array:
    """acc + left @ right, left [m, k] from `_to_left`, right [k, n] in shared memory."""
    for n, piece in enumerate(left):
        acc = plgpu.mma(acc, piece, plgpu.load(right.at[pl.ds(16 * n, 16)], layout=plgpu.Layout.MMA_RHS(right.dtype)))
    return acc


# ---- What the three kernels share ----


class _Visits(NamedTuple):
    """The live tiles of one row of tiles, as a kernel asks for them."""

    mixed: Any
    live: Any
    column: Callable[[Any], Any]
    schedule: tiles.Schedule

    @classmethod
    def of(cls, schedule: tiles.Schedule, ops: Operands, b: Any, n: Any, row: Any) -> "_Visits":
        def entry(ref: Ref, *rest: Any) -> Any:
            return ref[(broadcast_index(b, ref.shape[0]), broadcast_index(n, ref.shape[1]), row, *rest)]

        runs = () if schedule.runs is None else [ops.where[row, x] for x in range(4)]
        column = functools.partial(schedule.column, runs=runs, order=lambda step: entry(ops.where, step))
        return cls(entry(ops.mixed), entry(ops.live), column, schedule)

    def sweep(self, tile: Callable[[bool, Any, Any], Any], carry: Any) -> Any:
        """carry after tile(masked, step, carry) for all live tiles: mixed ones, then full ones."""
        known = isinstance(self.schedule.mixed, np.ndarray)
        if not known or self.schedule.mixed.any():
            carry = lax.fori_loop(0, self.mixed, functools.partial(tile, True), carry)
        if not known or (self.schedule.live > self.schedule.mixed).any():
            carry = lax.fori_loop(self.mixed, self.live, functools.partial(tile, False), carry)
        return carry


class _Grid(NamedTuple):
    """One block per head and row of tiles, numbered so that blocks that run together share keys in the L2 cache.

    Heads come in groups; within a group the last rows of tiles come first: under a causal mask they are the longest,
    and short ones at the end fill the multiprocessors evenly.
    """

    heads: int
    rows: int
    group: int

    @classmethod
    def of(cls, heads: int, rows: int, bytes_per_head: int) -> "_Grid":
        most = max(1, _L2_BYTES // bytes_per_head)
        return cls(heads, rows, max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most))

    def here(self) -> tuple[Any, Any]:
        """Head and row of tiles of this block."""
        index = lax.axis_index("block")
        outer, inner = index // self.group, index % self.group
        return outer // self.rows * self.group + inner, self.rows - 1 - outer % self.rows


def _launch(
    name: str,
    body: Callable,
    ops: Operands,
    out: Sequence,
    grid: _Grid,
    scratch: dict[str, Any],
    cost: dict[str, Any],
) -> Any:
    """Runs body(references of ops, references of out, **scratch) with one warpgroup for each block of `grid`."""
    leaves, tree = jax.tree.flatten(ops)

    def kernel(*refs, **scratch):
        body(tree.unflatten(refs[: len(leaves)]), refs[len(leaves) :], **scratch)

    kernel.__name__ = name
    return plgpu.kernel(
        kernel,
        out_type=tuple(out),
        grid=(grid.heads * grid.rows,),
        grid_names=("block",),
        scratch_types={key: value for key, value in scratch.items() if value is not None},
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **cost,
    )(*leaves)


# ---- Forward ----


def _forward(plane: Plane, schedule: tiles.Schedule, ops: Operands, config: Sm80Config) -> tuple[jax.Array, jax.Array]:
    """Output [B, T', N * Hv] and LSE [B, N, tiles * block_q]."""
    bq, bk, stages = config.block_q, config.block_k, config.stages
    H, Hv, dtype, copies = plane.H, plane.Hv, plane.dtype, copies_of_device()
    rows = math.ceil(plane.T / bq)
    grid = _Grid.of(plane.B * plane.N, rows, 2 * plane.S * (H + Hv) * plane.K // plane.N)
    # The slots of k and v are refilled when the products that read them are done, S = Q K^T half a step before P V:
    # so many copies are under way while a step waits for its own.
    ahead = 2 * stages - 1

    def body(ops, outs, *, q, k, v, out=None, q_arrived=None, k_arrived=None, v_arrived=None):
        head, i = grid.here()
        b, n = head // plane.N, head % plane.N
        group = n // (plane.N // plane.K)
        visits = _Visits.of(schedule, ops, b, n, i)
        live = visits.live

        def tile_of(array, width):
            return lambda step: array.at[b, pl.ds(visits.column(step) * bk, bk), pl.ds(group * width, width)]

        keys = Ring(copies, stages, [(tile_of(ops.key, H), k)], k_arrived)
        values = Ring(copies, stages, [(tile_of(ops.value, Hv), v)], v_arrived)

        def tile(masked: bool, step, carry):
            m, l, acc = carry
            values.start(step + stages - 1, live)
            (k_tile,) = keys.wait(step, ahead, step + stages - 1 < live)
            x = product(plane.zeros(bq, bk), q, k_tile)
            keys.start(step + stages, live)
            x, _ = plane.logits(x, ops, At(b, n, i * bq, visits.column(step) * bk), masked)
            # Online softmax: m and l are the running maximum and sum of each row.
            m_new = jnp.maximum(m, jnp.max(x, axis=1))
            # While a row has seen no visible key its maximum is -inf; 0 in its place keeps exp(-inf - m) = 0.
            shift = jnp.where(m_new == -jnp.inf, 0.0, m_new) if masked or plane.has_bias else m_new
            p = jnp.exp2(x * plane.unit - along_rows(shift * plane.unit, (bq, bk)))
            rescale = jnp.exp2((m - shift) * plane.unit)
            l = l * rescale + jnp.sum(p, axis=1)
            p = _to_left(p, dtype)
            acc = acc * along_rows(rescale, (bq, Hv))
            (v_tile,) = values.wait(step, ahead, step + stages < live)
            return m_new, l, _product_of_registers(acc, p, v_tile)

        copies.start(ops.query.at[b, pl.ds(i * bq, bq), pl.ds(n * H, H)], q, q_arrived)
        for copy in range(ahead):
            (keys, values)[copy % 2].start(copy // 2, live)
        copies.wait(q_arrived, 0, True)
        m, l, acc = visits.sweep(tile, (plane.fill(-jnp.inf, bq), plane.zeros(bq), plane.zeros(bq, Hv)))
        m = m * plane.unit
        if ops.sink is not None:
            # The sink is one more logit without a value.
            sink = ops.sink[n].astype(jnp.float32) * LOG2E
            m_new = jnp.maximum(m, sink)
            shift = jnp.where(m_new == -jnp.inf, 0.0, m_new)
            rescale = jnp.exp2(m - shift)
            l, acc, m = l * rescale + jnp.exp2(sink - shift), acc * along_rows(rescale, (bq, Hv)), m_new
        empty = l == 0
        l = jnp.where(empty, 1.0, l)
        out_gmem, lse_gmem = outs
        lse_gmem[b, n, pl.ds(i * bq, bq)] = jnp.where(empty, -jnp.inf, (m + jnp.log2(l)) * (1 / LOG2E))
        target = out_gmem.at[b, pl.ds(i * bq, bq), pl.ds(n * Hv, Hv)]
        copies.store(acc * along_rows(1 / l, (bq, Hv)), q if out is None else out, target)

    return _launch(
        "flash_attention_sm80",
        body,
        ops,
        (
            jax.ShapeDtypeStruct((*ops.query.shape[:2], plane.N * Hv), dtype),
            jax.ShapeDtypeStruct((plane.B, plane.N, rows * bq), jnp.float32),
        ),
        grid,
        {
            "q": tile_memory(bq, H, dtype=dtype),
            "k": tile_memory(stages, bk, H, dtype=dtype),
            "v": tile_memory(stages, bk, Hv, dtype=dtype),
            "out": None if Hv == H else tile_memory(bq, Hv, dtype=dtype),  # else it takes the place of q
            "q_arrived": copies.barrier(1),
            "k_arrived": copies.barrier(1, stages),
            "v_arrived": copies.barrier(1, stages),
        },
        cost_estimate(plane, products=2),
    )


# ---- Backward ----


def _backward_keys(plane: Plane, schedule: tiles.Schedule, ops: Operands, config: Sm80Config) -> Any:
    """dK [B, S', K * H] and dV [B, S', K * Hv]; the tiles of `plane` have keys as rows."""
    bq, bk, stages = config.dkv_block_q, config.dkv_block_k, config.dkv_stages
    H, Hv, dtype, copies, G = plane.H, plane.Hv, plane.dtype, copies_of_device(), plane.N // plane.K
    rows = math.ceil(plane.S / bk)
    grid = _Grid.of(plane.B * plane.K, rows, 2 * plane.T * (H + Hv) * G)

    def body(ops, outs, *, q, k, v, dout, stats, kv_arrived=None, arrived=None):
        head, j = grid.here()
        b, group = head // plane.K, head % plane.K
        own_rows = pl.ds(j * bk, bk)

        def head_of_group(g, carry):
            n = group * G + g
            visits = _Visits.of(schedule, ops, b, n, j)

            def tile_of(array, width):
                return lambda step: array.at[b, pl.ds(visits.column(step) * bq, bq), pl.ds(n * width, width)]

            parts = [
                (tile_of(ops.query, H), q),
                (tile_of(ops.dout, Hv), dout),
                (lambda step: ops.stats.at[b, n, visits.column(step)], stats),
            ]
            ring = Ring(copies, stages, parts, arrived)

            def tile(masked: bool, step, carry):
                dk, dv = carry
                ring.start(step + stages - 1, visits.live)
                q_tile, dout_tile, stats_tile = ring.wait(step, 3 * (stages - 1), step + stages - 1 < visits.live)
                x = product(plane.zeros(bk, bq), k, q_tile)
                x, slope = plane.logits(x, ops, At(b, n, j * bk, visits.column(step) * bq), masked)
                lse, delta = (stats_tile.at[pl.ds(half * bq, bq)] for half in (0, 1))
                lse, delta = (plgpu.load(x, layout=plane.acc.reduce(0)) for x in (lse, delta))
                p = jnp.exp2(x * plane.unit - along_columns(lse, (bk, bq)))
                dp = product(plane.zeros(bk, bq), v, dout_tile)
                dv = _product_of_registers(dv, _to_left(p, dtype), dout_tile)
                ds = slopes(p, dp, along_columns(delta, (bk, bq)), slope)
                return _product_of_registers(dk, _to_left(ds, dtype), q_tile), dv

            for step in range(stages - 1):
                ring.start(step, visits.live)
            return visits.sweep(tile, carry)

        copies.start(ops.key.at[b, own_rows, pl.ds(group * H, H)], k, kv_arrived)
        copies.start(ops.value.at[b, own_rows, pl.ds(group * Hv, Hv)], v, kv_arrived)
        copies.wait(kv_arrived, 0, True)
        carry = plane.zeros(bk, H), plane.zeros(bk, Hv)
        dk, dv = head_of_group(0, carry) if G == 1 else lax.fori_loop(0, G, head_of_group, carry)
        dk_gmem, dv_gmem = outs
        copies.store(dk * plane.scale, k, dk_gmem.at[b, own_rows, pl.ds(group * H, H)])
        copies.store(dv, v, dv_gmem.at[b, own_rows, pl.ds(group * Hv, Hv)])

    return _launch(
        "flash_attention_sm80_dkv",
        body,
        ops,
        [jax.ShapeDtypeStruct(x.shape, dtype) for x in (ops.key, ops.value)],
        grid,
        {
            "k": tile_memory(bk, H, dtype=dtype),
            "v": tile_memory(bk, Hv, dtype=dtype),
            "q": tile_memory(stages, bq, H, dtype=dtype),
            "dout": tile_memory(stages, bq, Hv, dtype=dtype),
            "stats": plgpu.SMEM((stages, ops.stats.shape[-1]), jnp.float32),
            "kv_arrived": copies.barrier(2),
            "arrived": copies.barrier(3, stages),
        },
        cost_estimate(plane, products=4),
    )


def _backward_queries(plane: Plane, schedule: tiles.Schedule, ops: Operands, config: Sm80Config) -> Any:
    """dQ [B, T', N * H]."""
    bq, bk, stages = config.dq_block_q, config.dq_block_k, config.dq_stages
    H, Hv, dtype, copies = plane.H, plane.Hv, plane.dtype, copies_of_device()
    rows = math.ceil(plane.T / bq)
    grid = _Grid.of(plane.B * plane.N, rows, 2 * plane.S * (H + Hv) * plane.K // plane.N)

    def body(ops, outs, *, q, dout, k, v, q_arrived=None, arrived=None):
        head, i = grid.here()
        b, n = head // plane.N, head % plane.N
        group = n // (plane.N // plane.K)
        visits = _Visits.of(schedule, ops, b, n, i)

        def tile_of(array, width):
            return lambda step: array.at[b, pl.ds(visits.column(step) * bk, bk), pl.ds(group * width, width)]

        ring = Ring(copies, stages, [(tile_of(ops.key, H), k), (tile_of(ops.value, Hv), v)], arrived)
        own_rows = pl.ds(i * bq, bq)
        lse, delta = (
            plgpu.load(ops.stats.at[b, n, i, pl.ds(half * bq, bq)], layout=plane.acc.reduce(1), optimized=False)
            for half in (0, 1)
        )

        def tile(masked: bool, step, dq):
            ring.start(step + stages - 1, visits.live)
            k_tile, v_tile = ring.wait(step, 2 * (stages - 1), step + stages - 1 < visits.live)
            x = product(plane.zeros(bq, bk), q, k_tile)
            x, slope = plane.logits(x, ops, At(b, n, i * bq, visits.column(step) * bk), masked)
            p = jnp.exp2(x * plane.unit - along_rows(lse, (bq, bk)))
            dp = product(plane.zeros(bq, bk), dout, v_tile)
            ds = slopes(p, dp, along_rows(delta, (bq, bk)), slope)
            return _product_of_registers(dq, _to_left(ds, dtype), k_tile)

        copies.start(ops.query.at[b, own_rows, pl.ds(n * H, H)], q, q_arrived)
        copies.start(ops.dout.at[b, own_rows, pl.ds(n * Hv, Hv)], dout, q_arrived)
        copies.wait(q_arrived, 0, True)
        for step in range(stages - 1):
            ring.start(step, visits.live)
        dq = visits.sweep(tile, plane.zeros(bq, H))
        copies.store(dq * plane.scale, q, outs[0].at[b, own_rows, pl.ds(n * H, H)])

    return _launch(
        "flash_attention_sm80_dq",
        body,
        ops,
        [jax.ShapeDtypeStruct(ops.query.shape, dtype)],
        grid,
        {
            "q": tile_memory(bq, H, dtype=dtype),
            "dout": tile_memory(bq, Hv, dtype=dtype),
            "k": tile_memory(stages, bk, H, dtype=dtype),
            "v": tile_memory(stages, bk, Hv, dtype=dtype),
            "q_arrived": copies.barrier(2),
            "arrived": copies.barrier(2, stages),
        },
        cost_estimate(plane, products=3),
    )


def bias_gradient(
    query, key, value, bias, mask, dout, lse, delta, *, scale: float, soft_cap: float | None
) -> jax.Array | None:
    """dbias, in the shape and dtype of bias: dS, before its scale and the slope of the soft cap, summed over all that
    share an entry. XLA leaves the kernel out where nobody asks for this gradient."""
    if bias is None:
        return None
    bq, bk = (64, 64) if max(query.shape[3], value.shape[3]) <= 128 else (64, 32)
    inputs = query, key, value, bias, None, mask, scale, soft_cap, bq, bk
    plane, _, ops = _prepare(*inputs, dout=dout, rows=(lse, delta))
    T, S, H, Hv, dtype, copies = plane.T, plane.S, plane.H, plane.Hv, plane.dtype, copies_of_device()
    classes = jnp.asarray(tiles.classify(mask, T, S, bq, bk)).astype(jnp.int32)
    ops = ops._replace(where=classes)
    # How many tiles each axis has in the bias, and how many of the plane share one of those.
    shape = (1,) * (4 - bias.ndim) + bias.shape
    whole = plane.B, plane.N, math.ceil(T / bq), math.ceil(S / bk)
    kept = [1 if size == 1 else n for size, n in zip(shape, whole, strict=True)]
    summed = [n // m for n, m in zip(whole, kept, strict=True)]

    def body(ops, outs, *, q, k, v, dout, arrived=None):
        of_bias = _coordinates(lax.axis_index("block"), kept)

        def tile(step, acc):
            b, n, i, j = (x + y for x, y in zip(of_bias, _coordinates(step, summed), strict=True))
            group, rows, keys = n // (plane.N // plane.K), pl.ds(i * bq, bq), pl.ds(j * bk, bk)

            def compute():
                copies.start(ops.query.at[b, rows, pl.ds(n * H, H)], q, arrived)
                copies.start(ops.key.at[b, keys, pl.ds(group * H, H)], k, arrived)
                copies.start(ops.value.at[b, keys, pl.ds(group * Hv, Hv)], v, arrived)
                copies.start(ops.dout.at[b, rows, pl.ds(n * Hv, Hv)], dout, arrived)
                lse, delta = (
                    plgpu.load(ops.stats.at[b, n, i, pl.ds(half * bq, bq)], layout=plane.acc.reduce(1), optimized=False)
                    for half in (0, 1)
                )
                copies.wait(arrived, 0, True)
                x = product(plane.zeros(bq, bk), q, k)
                x, _ = plane.logits(x, ops, At(b, n, i * bq, j * bk), masked=True)
                p = jnp.exp2(x * plane.unit - along_rows(lse, (bq, bk)))
                dp = product(plane.zeros(bq, bk), dout, v)
                return acc + slopes(p, dp, along_rows(delta, (bq, bk)), None)

            if mask is None:
                return compute()
            here = ops.where[broadcast_index(b, classes.shape[0]), broadcast_index(n, classes.shape[1]), i, j]
            return lax.cond(here != tiles.EMPTY, compute, lambda: acc)

        (dbias_gmem,) = outs
        dbias = lax.fori_loop(0, math.prod(summed), tile, plane.zeros(bq, bk))
        b, n, i, j = of_bias
        store(dbias_gmem.at[b, n, pl.ds(i * bq, bq), pl.ds(j * bk, bk)], dbias)

    (dbias,) = _launch(
        "flash_attention_sm80_dbias",
        body,
        ops,
        [jax.ShapeDtypeStruct((kept[0], kept[1], kept[2] * bq, kept[3] * bk), jnp.float32)],
        _Grid(math.prod(kept), 1, 1),
        {
            "q": tile_memory(bq, H, dtype=dtype),
            "k": tile_memory(bk, H, dtype=dtype),
            "v": tile_memory(bk, Hv, dtype=dtype),
            "dout": tile_memory(bq, Hv, dtype=dtype),
            "arrived": copies.barrier(4),
        },
        cost_estimate(plane, products=2),
    )
    # Of axes along which the bias is broadcast, a tile of sums is left.
    dbias = dbias.sum([axis for axis in (2, 3) if shape[axis] == 1], keepdims=True)[:, :, :T, :S]
    return dbias.reshape(bias.shape).astype(bias.dtype)


def _coordinates(index: Any, sizes: Sequence[int]) -> list[Any]:
    """Of an index into an array of `sizes`, row-major."""
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    return [index // stride % size for stride, size in zip(strides, sizes, strict=True)]


# ---- From arrays as the API has them to arrays as the kernels want them, and back ----


def _prepare(*arguments, transposed: bool = False, hide_tail: bool = True, dout=None, rows=()):
    """`plane.prepare` for this file's kernels; the last two of `arguments` are block_q and block_k. `rows` are the LSE
    and delta of a backward pass."""
    plane, schedule, ops = prepare(
        *arguments,
        acc=plgpu.Layout.MMA_ACC(arguments[0].dtype),
        copies_fill=copies_of_device().fill,
        transposed=transposed,
        hide_tail=hide_tail,
        dout=dout,
    )
    stats = _flat(row_stats(*rows, block_q=arguments[-2])) if rows else None
    return plane, schedule, ops._replace(stats=stats)


def _flat(stats: jax.Array) -> jax.Array:
    """[B, N, tiles, width]: cp.async copies whole vectors, and at least one number a thread."""
    stats = stats.reshape(*stats.shape[:3], -1)
    return pad(stats, {3: max(stats.shape[3], 128)})


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
    config: Sm80Config,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, Hv] in the input dtype and LSE [B, N, T] in float32."""
    B, T, N, _ = query.shape
    inputs = query, key, value, bias, sink, mask, scale, soft_cap
    plane, schedule, ops = _prepare(*inputs, config.block_q, config.block_k)
    out, lse = _forward(plane, schedule, ops, config)
    return out.reshape(B, -1, N, plane.Hv)[:, :T, :, : value.shape[3]], lse[:, :, :T]


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
    config: Sm80Config,
) -> Gradients:
    """Gradients from the residuals (q, k, v, out, lse), each summed in one fixed order."""
    (B, T, N, H), (_, S, K, Hv) = query.shape, value.shape
    delta = deltas(out, lse, dout, dlse)
    inputs = query, key, value, bias, None, mask, scale, soft_cap
    rest: dict[str, Any] = {"dout": dout, "rows": (lse, delta)}
    # As rows of dK and dV, keys from S on are not stored.
    by_keys = _prepare(*inputs, config.dkv_block_q, config.dkv_block_k, transposed=True, hide_tail=False, **rest)
    dk, dv = _backward_keys(*by_keys, config)
    (dq,) = _backward_queries(*_prepare(*inputs, config.dq_block_q, config.dq_block_k, **rest), config)
    H_padded, Hv_padded = H + -H % 16, Hv + -Hv % 16
    return Gradients(
        dq.reshape(B, -1, N, H_padded)[:, :T, :, :H],
        dk.reshape(B, -1, K, H_padded)[:, :S, :, :H],
        dv.reshape(B, -1, K, Hv_padded)[:, :S, :, :Hv],
        bias_gradient(query, key, value, bias, mask, dout, lse, delta, scale=scale, soft_cap=soft_cap),
        sink_gradient(sink, lse, delta),
    )
