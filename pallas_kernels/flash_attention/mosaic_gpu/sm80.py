# SPDX-License-Identifier: Apache-2.0
"""flash_attention for Ampere and Ada: mma.sync products, cp.async copies; runs on Hopper too, with TMA copies.

Three kernels of one warpgroup (128 threads) a block, all in registers but the operands, which sit in shared memory:

    forward   block = block_q query rows    loop over k tiles   S = Q K^T       online softmax       O  += P V
    dK, dV    block = block_k key columns   loop over q tiles   S^T = K Q^T     dP^T = V dO^T        dV += P^T dO
              (and over the G query heads that share them)      dS^T = P^T * (dP^T - delta)          dK += dS^T Q
    dQ        block = block_q query rows    loop over k tiles   S, dP = dO V^T, dS as above          dQ += dS K

Each result is summed by one block in one order, so that it repeats bit for bit. A warp owns whole rows of its tile: the
accumulator of one product is, register by register, the left operand of the next (`_to_left`), and nothing is
exchanged between warps. Tiles come in the order of `tiles.schedule`: mixed ones in a loop that masks, full ones in a
loop that has no masking code, empty ones never.

Source: Dao, "FlashAttention-2", 2023, algorithms 1 and 2; the backward pass is split in two kernels.
"""

import dataclasses
import functools
import inspect
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

from pallas_kernels.core import device as device_lib
from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.flash_attention import tiles
from pallas_kernels.flash_attention.config import Sm80Config
from pallas_kernels.flash_attention.xla import Gradients
from pallas_kernels.masks import Mask
from pallas_kernels.masks import lowered as lowered_lib

_LOG2E = math.log2(math.e)
# Keys and values that blocks running together should share: less than half of the L2 cache of A100 and H100.
_L2_BYTES = 2**24
_ARCHS = ("sm80", "sm86", "sm87", "sm89", "sm90")
Ref = Any


def supports(call: Call, device: Device) -> Refusal | None:
    if device.platform != "gpu" or device.arch not in _ARCHS:
        return Refusal(f"it is for NVIDIA GPUs of Ampere, Ada and Hopper, and this is {device}")
    s = call.sizes
    dtype = call.arguments[0].dtype
    if dtype not in ("bfloat16", "float16"):
        return Refusal(f"its tensor-core products take bfloat16 and float16, not {dtype}; cast the inputs")
    if max(s["H"], s["Hv"]) > 256:
        return Refusal(f"head dim {max(s['H'], s['Hv'])} > 256 does not fit the registers of a warpgroup")
    if call.direction == "backward" and call.argument("bias") is not None:
        return Refusal("its backward pass has no gradient for bias; without bias, or with a mask instead, it runs")
    return None


# ---- The three instructions that no other place knows about. Tests replace them by their meaning in jnp. ----


def _mma(acc: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """acc + left @ right by mma.sync m16n8k16, accumulated in float32."""
    return plgpu.mma(acc, left, right)


def _exp2(x: jax.Array) -> jax.Array:
    return jnp.exp2(x)


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


def _product(acc: jax.Array, left: Ref, right: Ref, *, transpose: bool = True) -> jax.Array:
    """acc + left @ right^T (or right), both in shared memory, left [m, k].

    By slices of 64 of the depth, the width of a swizzled tile: loaded at once, operands would fill the registers.
    """
    depth = left.shape[1]
    for start in range(0, depth, 64):
        d = pl.ds(start, min(64, depth - start))
        operand = right.at[:, d].transpose((1, 0)) if transpose else right.at[d]
        a = plgpu.load(left.at[:, d], layout=plgpu.Layout.MMA_LHS(left.dtype))
        acc = _mma(acc, a, plgpu.load(operand, layout=plgpu.Layout.MMA_RHS(left.dtype)))
    return acc


def _product_of_registers(acc: jax.Array, left: Sequence[jax.Array], right: Ref) -> jax.Array:
    """acc + left @ right, left [m, k] from `_to_left`, right [k, n] in shared memory."""
    for n, piece in enumerate(left):
        acc = _mma(acc, piece, plgpu.load(right.at[pl.ds(16 * n, 16)], layout=plgpu.Layout.MMA_RHS(right.dtype)))
    return acc


# ---- Copies ----


class _Tma:
    """Copies of Hopper: one thread asks, the copy engine arrives at a barrier, and fills what is out of bounds by 0."""

    def rows(self, n: int, block: int) -> int:
        """How many rows of an array with n rows have to exist: whole swizzle patterns of 8."""
        del block
        return n + -n % 8

    def barrier(self, copies: int, slots: int = 1) -> Any:
        return plgpu.Barrier(num_arrivals=copies, num_barriers=slots)

    def start(self, source: Ref, target: Ref, barrier: Ref) -> None:
        plgpu.copy_gmem_to_smem(source, target, barrier)

    def wait(self, barrier: Ref, in_flight: int, full: Any) -> None:
        del in_flight, full
        plgpu.barrier_wait(barrier)

    def store(self, x: jax.Array, smem: Ref, gmem: Ref) -> None:
        smem[...] = x.astype(smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, gmem)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


class _CpAsync:
    """Copies of Ampere: each thread asks for its 16 bytes, and waits until all but the last few groups are there."""

    def rows(self, n: int, block: int) -> int:
        """cp.async as Mosaic has it fills nothing: arrays have to be whole tiles."""
        return n + -n % block

    def barrier(self, copies: int, slots: int = 1) -> None:
        return None

    def start(self, source: Ref, target: Ref, barrier: None) -> None:
        plgpu.copy_gmem_to_smem(source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

    def wait(self, barrier: None, in_flight: int, full: Any) -> None:
        # Towards the end fewer copies follow than `in_flight`: there is no counting on them.
        pl.when(full)(lambda: plgpu.wait_gmem_to_smem(in_flight))
        pl.when(jnp.logical_not(full))(lambda: plgpu.wait_gmem_to_smem(0))

    def store(self, x: jax.Array, smem: Ref, gmem: Ref) -> None:
        # The accumulator's layout does not write whole sectors; 16 adjacent bytes a thread do.
        smem[...] = x.astype(smem.dtype)
        layout = plgpu.Layout.SMEM_GMEM_COPY(smem.shape, smem.dtype, swizzle=_swizzle(smem.shape[-1]))
        x = plgpu.load(smem, layout=layout)
        store: Any = getattr(plgpu, "store", None)
        if store is None:
            gmem[...] = x
        else:  # JAX 0.12 would refuse rows of less than 128 bytes
            store(gmem, x, optimized=False)


def _swizzle(width: int) -> int:
    """Bytes of a swizzled row: the widest that divides `width` 16-bit elements. ldmatrix then meets no bank twice."""
    return next(swizzle for swizzle in (128, 64, 32) if 2 * width % swizzle == 0)


def _tile_memory(*shape: int, dtype) -> Any:
    """Shared memory for a tile (or several), swizzled for ldmatrix."""
    swizzle = _swizzle(shape[-1])
    tiling: Any = plgpu.TilingTransform
    swizzling: Any = plgpu.SwizzleTransform
    return plgpu.SMEM(shape, dtype, transforms=(tiling((8, swizzle // 2)), swizzling(swizzle)))


class _Ring(NamedTuple):
    """Slots of shared memory that successive tiles take in turn."""

    copies: _Tma | _CpAsync
    stages: int
    parts: Sequence[tuple[Callable[[Any], Ref], Ref]]  # where a step's part comes from, and its slots
    barriers: Ref | None

    def start(self, step: Any, live: Any) -> None:
        """Asks for the tiles of a step, if there is one. The slot's readers are done: Mosaic puts a barrier here."""

        @pl.when(step < live)
        def _():
            for source, slots in self.parts:
                self.copies.start(source(step), slots.at[step % self.stages], self._barrier(step))

    def wait(self, step: Any, in_flight: int, full: Any) -> list[Ref]:
        """The tiles of a step, once they are there. `in_flight` copies were started since, where `full` holds."""
        self.copies.wait(self._barrier(step), in_flight, full)
        return [slots.at[step % self.stages] for _, slots in self.parts]

    def _barrier(self, step: Any) -> Ref | None:
        return None if self.barriers is None else self.barriers.at[step % self.stages]


# ---- What the three kernels share ----


class _Operands(NamedTuple):
    """Arrays outside, their references inside a kernel. T' and S' are whole tiles, where copies need it."""

    query: Any  # [B, T', N * H]
    key: Any  # [B, S', K * H]
    value: Any  # [B, S', K * Hv]
    dout: Any  # [B, T', N * Hv]
    stats: Any  # [B, N, tiles, 2 * block_q or more]: LSE in base 2, then delta, of the rows of each tile
    sink: Any  # [N]
    bias: Any  # This and the next three have the axes of a tile last: [B|1, N|1, rows|1, columns|1], whole tiles.
    mask_rows: Any
    mask_cols: Any
    mask_dense: Any
    mixed: Any  # tiles.Schedule's
    live: Any
    where: Any  # its `runs` or `order`


class _At(NamedTuple):
    """Which tile: batch element, query head, and the first of its rows and columns."""

    b: Any
    n: Any
    row: Any
    col: Any


@dataclasses.dataclass(frozen=True)
class _Plane:
    """The T x S planes of logits, and how one of them is made from products of query and key."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    Hv: int
    dtype: Any
    scale: float
    soft_cap: float | None
    has_bias: bool
    visible: Callable | None
    transposed: bool  # a tile's rows are keys
    hide_tail: bool  # keys from S on have to be masked
    copies: _Tma | _CpAsync

    @property
    def acc(self) -> Any:
        return plgpu.Layout.MMA_ACC(self.dtype)

    @property
    def plain(self) -> bool:
        """Logits are products times a positive number, which then need not be multiplied before the maximum."""
        return self.soft_cap is None and not self.has_bias and self.scale > 0

    @property
    def unit(self) -> float:
        """What `logits` have to be multiplied with to be exponents of 2."""
        return self.scale * _LOG2E if self.plain else 1.0

    def zeros(self, *shape: int) -> jax.Array:
        return self.fill(0.0, *shape)

    def fill(self, value: float, *shape: int) -> jax.Array:
        """A float32 tile, or a vector along its rows."""
        layout = self.acc if len(shape) == 2 else self.acc.reduce(1)
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def logits(self, x: jax.Array, ops: _Operands, at: _At, masked: bool) -> tuple[jax.Array, jax.Array | None]:
        """Logits in units of `unit` from products `x`, -inf where hidden; and the slope of the soft cap."""
        slope = None
        if self.soft_cap is not None:
            # tanh(y) = 1 - 2 / (1 + exp(2 y)); the hardware's own tanh has 11 bits only.
            tanh = 1 - 2 / (1 + _exp2(x * (2 * _LOG2E * self.scale / self.soft_cap)))
            x, slope = tanh * (self.soft_cap * _LOG2E), 1 - tanh * tanh
        elif not self.plain:
            x = x * (self.scale * _LOG2E)
        if self.has_bias:
            x = x + self._piece(ops.bias, at, x.shape).astype(jnp.float32) * _LOG2E
        if masked and (visible := self._visible(ops, at, x.shape)) is not None:
            x = jnp.where(visible, x, -jnp.inf)
        return x, slope

    def _visible(self, ops: _Operands, at: _At, shape: tuple[int, ...]) -> jax.Array | None:
        row, col = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=self.acc) for axis in (0, 1))
        row, col = row + at.row, col + at.col
        i, j = (col, row) if self.transposed else (row, col)
        visible = j < self.S if self.hide_tail else None
        if self.visible is not None:
            pieces = [
                [self._piece(ref, at, shape).astype(jnp.int32) for ref in refs]
                for refs in (ops.mask_rows, ops.mask_cols, ops.mask_dense)
            ]
            allowed = self.visible(i, j, *pieces)
            visible = allowed if visible is None else visible & allowed
        return visible

    def _piece(self, ref: Ref, at: _At, shape: tuple[int, ...]) -> jax.Array:
        """A tile of an array [B|1, N|1, rows|1, columns|1], from global memory into the accumulator's layout."""
        ref = ref.at[_index(at.b, ref.shape[0]), _index(at.n, ref.shape[1])]
        rows, cols = pl.ds(at.row, shape[0]), pl.ds(at.col, shape[1])
        match ref.shape[0] > 1, ref.shape[1] > 1:
            case True, True:
                return plgpu.load(ref.at[rows, cols], layout=self.acc, optimized=False)
            case True, False:
                x = plgpu.load(ref.at[rows, 0], layout=self.acc.reduce(1), optimized=False)
                return _along_rows(x, shape)
            case False, True:
                x = plgpu.load(ref.at[0, cols], layout=self.acc.reduce(0), optimized=False)
                return _along_columns(x, shape)
            case _:
                return jnp.broadcast_to(ref[0, 0], shape)


def _index(index: Any, size: int) -> Any:
    """Along an axis that may be broadcast."""
    return index if size > 1 else 0


def _along_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One number a row."""
    return lax.broadcast_in_dim(x, shape, (0,))


def _along_columns(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, (1,))


class _Visits(NamedTuple):
    """The live tiles of one row of tiles, as a kernel asks for them."""

    mixed: Any
    live: Any
    column: Callable[[Any], Any]
    schedule: tiles.Schedule

    @classmethod
    def of(cls, schedule: tiles.Schedule, ops: _Operands, b: Any, n: Any, row: Any) -> "_Visits":
        def entry(ref: Ref, *rest: Any) -> Any:
            return ref[(_index(b, ref.shape[0]), _index(n, ref.shape[1]), row, *rest)]

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
    ops: _Operands,
    out: Sequence,
    grid: _Grid,
    scratch: dict[str, Any],
    cost: pl.CostEstimate,
) -> Any:
    """Runs body(references of ops, references of out, **scratch) with one warpgroup for each block of `grid`."""
    leaves, tree = jax.tree.flatten(ops)

    def kernel(*refs, **scratch):
        body(tree.unflatten(refs[: len(leaves)]), refs[len(leaves) :], **scratch)

    kernel.__name__ = name
    extra: dict[str, Any] = (
        {"cost_estimate": cost} if "cost_estimate" in inspect.signature(plgpu.kernel).parameters else {}
    )
    return plgpu.kernel(
        kernel,
        out_type=tuple(out),
        grid=(grid.heads * grid.rows,),
        grid_names=("block",),
        scratch_types={key: value for key, value in scratch.items() if value is not None},
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **extra,
    )(*leaves)


# ---- Forward ----


def _forward(
    plane: _Plane, schedule: tiles.Schedule, ops: _Operands, config: Sm80Config
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T', N * Hv] and LSE [B, N, tiles * block_q]."""
    bq, bk, stages = config.block_q, config.block_k, config.stages
    H, Hv, dtype, copies = plane.H, plane.Hv, plane.dtype, plane.copies
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

        keys = _Ring(copies, stages, [(tile_of(ops.key, H), k)], k_arrived)
        values = _Ring(copies, stages, [(tile_of(ops.value, Hv), v)], v_arrived)

        def tile(masked: bool, step, carry):
            m, l, acc = carry
            values.start(step + stages - 1, live)
            (k_tile,) = keys.wait(step, ahead, step + stages - 1 < live)
            x = _product(plane.zeros(bq, bk), q, k_tile)
            keys.start(step + stages, live)
            x, _ = plane.logits(x, ops, _At(b, n, i * bq, visits.column(step) * bk), masked)
            # Online softmax: m and l are the running maximum and sum of each row.
            m_new = jnp.maximum(m, jnp.max(x, axis=1))
            # While a row has seen no visible key its maximum is -inf; 0 in its place keeps exp(-inf - m) = 0.
            shift = jnp.where(m_new == -jnp.inf, 0.0, m_new) if masked or plane.has_bias else m_new
            p = _exp2(x * plane.unit - _along_rows(shift * plane.unit, (bq, bk)))
            rescale = _exp2((m - shift) * plane.unit)
            l = l * rescale + jnp.sum(p, axis=1)
            p = _to_left(p, dtype)
            acc = acc * _along_rows(rescale, (bq, Hv))
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
            sink = ops.sink[n].astype(jnp.float32) * _LOG2E
            m_new = jnp.maximum(m, sink)
            shift = jnp.where(m_new == -jnp.inf, 0.0, m_new)
            rescale = _exp2(m - shift)
            l, acc, m = l * rescale + _exp2(sink - shift), acc * _along_rows(rescale, (bq, Hv)), m_new
        empty = l == 0
        l = jnp.where(empty, 1.0, l)
        out_gmem, lse_gmem = outs
        lse_gmem[b, n, pl.ds(i * bq, bq)] = jnp.where(empty, -jnp.inf, (m + jnp.log2(l)) * (1 / _LOG2E))
        target = out_gmem.at[b, pl.ds(i * bq, bq), pl.ds(n * Hv, Hv)]
        copies.store(acc * _along_rows(1 / l, (bq, Hv)), q if out is None else out, target)

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
            "q": _tile_memory(bq, H, dtype=dtype),
            "k": _tile_memory(stages, bk, H, dtype=dtype),
            "v": _tile_memory(stages, bk, Hv, dtype=dtype),
            "out": None if Hv == H else _tile_memory(bq, Hv, dtype=dtype),  # else it takes the place of q
            "q_arrived": copies.barrier(1),
            "k_arrived": copies.barrier(1, stages),
            "v_arrived": copies.barrier(1, stages),
        },
        _cost(plane, products=2),
    )


# ---- Backward ----


def _slopes(plane: _Plane, p: jax.Array, dp: jax.Array, delta: jax.Array, slope: jax.Array | None) -> jax.Array:
    """dS / scale = P * (dP - delta), by the rule of softmax, times the slope of the soft cap."""
    ds = p * (dp - delta)
    return ds if slope is None else ds * slope


def _backward_keys(plane: _Plane, schedule: tiles.Schedule, ops: _Operands, config: Sm80Config) -> Any:
    """dK [B, S', K * H] and dV [B, S', K * Hv]; the tiles of `plane` have keys as rows."""
    bq, bk, stages = config.dkv_block_q, config.dkv_block_k, config.dkv_stages
    H, Hv, dtype, copies, G = plane.H, plane.Hv, plane.dtype, plane.copies, plane.N // plane.K
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
            ring = _Ring(copies, stages, parts, arrived)

            def tile(masked: bool, step, carry):
                dk, dv = carry
                ring.start(step + stages - 1, visits.live)
                q_tile, dout_tile, stats_tile = ring.wait(step, 3 * (stages - 1), step + stages - 1 < visits.live)
                x = _product(plane.zeros(bk, bq), k, q_tile)
                x, slope = plane.logits(x, ops, _At(b, n, j * bk, visits.column(step) * bq), masked)
                lse, delta = (stats_tile.at[pl.ds(half * bq, bq)] for half in (0, 1))
                lse, delta = (plgpu.load(x, layout=plane.acc.reduce(0)) for x in (lse, delta))
                p = _exp2(x * plane.unit - _along_columns(lse, (bk, bq)))
                dp = _product(plane.zeros(bk, bq), v, dout_tile)
                dv = _product_of_registers(dv, _to_left(p, dtype), dout_tile)
                ds = _slopes(plane, p, dp, _along_columns(delta, (bk, bq)), slope)
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
            "k": _tile_memory(bk, H, dtype=dtype),
            "v": _tile_memory(bk, Hv, dtype=dtype),
            "q": _tile_memory(stages, bq, H, dtype=dtype),
            "dout": _tile_memory(stages, bq, Hv, dtype=dtype),
            "stats": plgpu.SMEM((stages, _stats_width(bq)), jnp.float32),
            "kv_arrived": copies.barrier(2),
            "arrived": copies.barrier(3, stages),
        },
        _cost(plane, products=4),
    )


def _backward_queries(plane: _Plane, schedule: tiles.Schedule, ops: _Operands, config: Sm80Config) -> Any:
    """dQ [B, T', N * H]."""
    bq, bk, stages = config.dq_block_q, config.dq_block_k, config.dq_stages
    H, Hv, dtype, copies = plane.H, plane.Hv, plane.dtype, plane.copies
    rows = math.ceil(plane.T / bq)
    grid = _Grid.of(plane.B * plane.N, rows, 2 * plane.S * (H + Hv) * plane.K // plane.N)

    def body(ops, outs, *, q, dout, k, v, q_arrived=None, arrived=None):
        head, i = grid.here()
        b, n = head // plane.N, head % plane.N
        group = n // (plane.N // plane.K)
        visits = _Visits.of(schedule, ops, b, n, i)

        def tile_of(array, width):
            return lambda step: array.at[b, pl.ds(visits.column(step) * bk, bk), pl.ds(group * width, width)]

        ring = _Ring(copies, stages, [(tile_of(ops.key, H), k), (tile_of(ops.value, Hv), v)], arrived)
        own_rows = pl.ds(i * bq, bq)
        lse, delta = (
            plgpu.load(ops.stats.at[b, n, i, pl.ds(half * bq, bq)], layout=plane.acc.reduce(1), optimized=False)
            for half in (0, 1)
        )

        def tile(masked: bool, step, dq):
            ring.start(step + stages - 1, visits.live)
            k_tile, v_tile = ring.wait(step, 2 * (stages - 1), step + stages - 1 < visits.live)
            x = _product(plane.zeros(bq, bk), q, k_tile)
            x, slope = plane.logits(x, ops, _At(b, n, i * bq, visits.column(step) * bk), masked)
            p = _exp2(x * plane.unit - _along_rows(lse, (bq, bk)))
            dp = _product(plane.zeros(bq, bk), dout, v_tile)
            ds = _slopes(plane, p, dp, _along_rows(delta, (bq, bk)), slope)
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
            "q": _tile_memory(bq, H, dtype=dtype),
            "dout": _tile_memory(bq, Hv, dtype=dtype),
            "k": _tile_memory(stages, bk, H, dtype=dtype),
            "v": _tile_memory(stages, bk, Hv, dtype=dtype),
            "q_arrived": copies.barrier(2),
            "arrived": copies.barrier(2, stages),
        },
        _cost(plane, products=3),
    )


# ---- From arrays as the API has them to arrays as the kernels want them, and back ----


# fmt: off
def _prepare(
    query, key, value, bias, sink, mask, scale: float, soft_cap: float | None, block_q: int, block_k: int,
    *, transposed: bool = False, dout=None, lse=None, delta=None,
) -> tuple[_Plane, tiles.Schedule, _Operands]:
    """What a kernel with tiles of block_q x block_k (rows are keys if `transposed`) needs."""
    # fmt: on
    (B, T, N, H), (_, S, K, Hv) = query.shape, value.shape
    copies = _Tma() if device_lib.current().arch == "sm90" else _CpAsync()
    # Keys from S on are zeros. In forward they would still have weight exp(0); as rows of dK they are not stored.
    hide_tail = S % block_k != 0 and not transposed
    schedule = tiles.schedule(mask, T, S, block_q, block_k, transpose=transposed, mix_tail=hide_tail)
    lowered = None if mask is None else lowered_lib.lower(mask, T, S)
    H, Hv = H + -H % 16, Hv + -Hv % 16  # an mma takes 16 of the depth at a time

    def heads(x: jax.Array, width: int, block: int) -> jax.Array:
        """[B, L, heads, H] -> [B, L', heads * width], more of it being 0."""
        x = _pad(x, {1: copies.rows(x.shape[1], block), 3: width})
        return x.reshape(*x.shape[:2], -1)

    def whole_tiles(x: jax.Array) -> jax.Array:
        """[B|1, N|1, T|1, S|1], padded to whole tiles where it is not broadcast."""
        sizes = {axis: x.shape[axis] + -x.shape[axis] % block for axis, block in ((2, block_q), (3, block_k))}
        x = _pad(x, {axis: size for axis, size in sizes.items() if x.shape[axis] > 1})
        return jnp.swapaxes(x, 2, 3) if transposed else x

    ops = _Operands(
        query=heads(query, H, block_q),
        key=heads(key, H, block_k),
        value=heads(value, Hv, block_k),
        dout=None if dout is None else heads(dout, Hv, block_q),
        stats=None if lse is None or delta is None else _stats(lse, delta, block_q),
        sink=sink,
        bias=None if bias is None else whole_tiles(bias.reshape((1,) * (4 - bias.ndim) + bias.shape)),
        mask_rows=[whole_tiles(x[:, None, :, None]) for x in lowered.rows] if lowered else [],
        mask_cols=[whole_tiles(x[:, None, None, :]) for x in lowered.cols] if lowered else [],
        mask_dense=[whole_tiles(x) for x in lowered.dense] if lowered else [],
        mixed=jnp.asarray(schedule.mixed),
        live=jnp.asarray(schedule.live),
        where=jnp.asarray(schedule.order if schedule.runs is None else schedule.runs),
    )
    sizes = {"B": B, "T": T, "S": S, "N": N, "K": K, "H": H, "Hv": Hv}
    plane = _Plane(
        **sizes,
        dtype=query.dtype,
        scale=scale,
        soft_cap=soft_cap,
        has_bias=bias is not None,
        visible=lowered.visible if lowered else None,
        transposed=transposed,
        hide_tail=hide_tail,
        copies=copies,
    )
    return plane, schedule, ops


def _pad(x: jax.Array, sizes: dict[int, int]) -> jax.Array:
    """Zeros up to the given sizes of axes; no copy where nothing is missing."""
    widths = [(0, sizes.get(axis, n) - n) for axis, n in enumerate(x.shape)]
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def _stats_width(block_q: int) -> int:
    return max(2 * block_q, 128)  # cp.async copies at least one number a thread


def _stats(lse: jax.Array, delta: jax.Array, block_q: int) -> jax.Array:
    """LSE in base 2 and delta [B, N, T] side by side for each tile of rows: [B, N, tiles, 2 * block_q or more]."""
    B, N, T = lse.shape
    # P = exp2(logit - LSE) is 0 in rows that see no key, and in those beyond T, if their LSE is +inf.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * _LOG2E)
    width = ((0, 0), (0, 0), (0, -T % block_q))
    pair = jnp.pad(lse, width, constant_values=jnp.inf), jnp.pad(delta, width)
    stats = jnp.concatenate([x.reshape(B, N, -1, block_q) for x in pair], axis=3)
    return _pad(stats, {3: _stats_width(block_q)})


def _cost(plane: _Plane, products: int) -> pl.CostEstimate:
    """Of a plane without a mask."""
    pairs = plane.B * plane.N * plane.T * plane.S
    moved = plane.B * (plane.H + plane.Hv) * 2 * (plane.T * plane.N + plane.S * plane.K)
    flops = products * pairs * (plane.H + plane.Hv)
    return pl.CostEstimate(flops=flops, transcendentals=pairs, bytes_accessed=moved)


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
    if bias is not None:
        raise NotImplementedError("flash_attention sm80 has no gradient for bias; `supports` says so.")
    (B, T, N, H), (_, S, K, Hv) = query.shape, value.shape
    # dS = P * (dP - delta) with delta = sum_h dO O; a gradient that enters through the LSE adds P * dlse.
    empty = jnp.isneginf(lse)
    delta = jnp.einsum("btnh,btnh->bnt", dout, out, preferred_element_type=jnp.float32) - dlse
    delta = jnp.where(empty, 0, delta)
    inputs = query, key, value, None, None, mask, scale, soft_cap
    rest: dict[str, Any] = {"dout": dout, "lse": lse, "delta": delta}
    by_keys = _prepare(*inputs, config.dkv_block_q, config.dkv_block_k, transposed=True, **rest)
    dk, dv = _backward_keys(*by_keys, config)
    (dq,) = _backward_queries(*_prepare(*inputs, config.dq_block_q, config.dq_block_k, **rest), config)
    H_padded, Hv_padded = H + -H % 16, Hv + -Hv % 16
    dsink = None
    if sink is not None:
        # The sink is a key without a value row: dP = 0 there.
        p = jnp.where(empty, 0, jnp.exp(sink.astype(jnp.float32)[:, None] - lse))
        dsink = -jnp.sum(p * delta, axis=(0, 2)).astype(sink.dtype)
    return Gradients(
        dq.reshape(B, -1, N, H_padded)[:, :T, :, :H],
        dk.reshape(B, -1, K, H_padded)[:, :S, :, :H],
        dv.reshape(B, -1, K, Hv_padded)[:, :S, :, :Hv],
        None,
        dsink,
    )
