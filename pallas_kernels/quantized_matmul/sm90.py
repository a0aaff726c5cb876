# SPDX-License-Identifier: Apache-2.0
"""quantized_matmul on Hopper for more than a few rows: decoded weights go from registers into wgmma, whose other
operand, x, is shared by all warps of a block.

A block takes n outputs, 64 of each warpgroup at a time, and walks along the inputs, chunk by chunk:

    copies     W[i + 1]  s[i + 1]  X[i + 1]            TMA, into a ring of slots
    decode     W^ [64, 64]                             a strip of 16 inputs in each thread of a quad, in registers
    multiply   Z^T [64, M] += W^ [64, 64] X^T [64, M]  while other warpgroups decode

Thread c of a quad has strip c of four, and for wgmma that is columns 2 c, 2 c + 1, 2 c + 8, ... of a stretch of 64.
Which inputs a product sums over is free, as long as both operands agree: a few rows of x are put into that order by the
warpgroup that asks for all copies, with the strips of the tail behind (`ring.take_rows_in_order`); many rows would take
it longer than the products, so that XLA does it before (`in_order`).

Source: Li et al., "Enabling Fast 2-bit LLM on GPUs", 2023, sections 2 and 3.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import cluster
from pallas_kernels.core.activations import activate_parts, parts_of
from pallas_kernels.core.epilogue import with_outputs
from pallas_kernels.core.mma import cost_option, tile_memory
from pallas_kernels.quantized_matmul import lanes, ptx
from pallas_kernels.quantized_matmul.config import TILE, Sm90Config
from pallas_kernels.quantized_matmul.ring import Stored, index_of, take_codes, take_digits, take_rows_in_order
from pallas_kernels.quantized_matmul.weights import MixedBitWeight, Weight

Ref = Any
BLOCKS = TILE // 16  # of 16 outputs, in a tile
# Rows that the copying warpgroup brings into order while others multiply; more are in order before.
FEW_ROWS = 16


def in_order(x: jax.Array, strips: int, tail_index: jax.Array | None) -> jax.Array:
    """Rows of x [M, K] as products take them, [M', 16 S]: M' is a multiple of 8, and of each 64 inputs the pair
    2 p, 2 p + 1 of strip c is at 8 p + 2 c. `strips` of x, padded, and behind them those of `tail_index`."""
    M, K = x.shape
    pairs = lax.bitcast_convert_type(x.reshape(M, K // 2, 2), jnp.uint32)
    pairs = jnp.pad(pairs, ((0, -M % 8), (0, 8 * strips - K // 2))).reshape(-1, strips, 8)
    if tail_index is not None:
        pairs = jnp.concatenate([pairs, pairs[:, tail_index]], axis=1)
    rows = len(pairs)
    pairs = pairs.reshape(rows, -1, 4, 8).swapaxes(2, 3).reshape(rows, -1)
    return lax.bitcast_convert_type(pairs, x.dtype).reshape(rows, -1)


# --- Kinds of weights ----------------------------------------------------------------------------------------


class _Digits:
    """Two planes of 2-bit digits."""

    # Elements of words, stats and steps that 16 outputs have of a chunk.
    widths = (256, 64, 16)
    unit = lanes.TINY * lanes.LARGE

    def __init__(self, stored: Stored):
        self.mains = stored.mains

    def memory(self, blocks: int) -> list[tuple[tuple[int, ...], Any]]:
        dtypes = (jnp.uint32, jnp.uint32, jnp.bfloat16)
        return [((blocks, width), dtype) for width, dtype in zip(self.widths, dtypes, strict=True)]

    def copies(self, blocks: int) -> int:
        """How many copies a chunk takes."""
        del blocks
        return len(self.widths)

    def copy(self, arrays: Sequence[Ref], chunk: Any, block: Any, blocks: int, start: Callable) -> None:
        """start(i, source) of each piece of a chunk: `blocks` times 16 outputs from `block` on."""

        def pieces(arrays: Sequence[Ref], chunk: Any) -> None:
            for i, (array, width) in enumerate(zip(arrays, self.widths, strict=True)):
                start(i, array.at[pl.ds(block, blocks), pl.ds(chunk * width, width)])

        if index_of(arrays) is None:
            pieces(arrays, chunk)
            return
        pl.when(chunk < self.mains)(lambda: pieces(arrays[:3], chunk))
        pl.when(chunk >= self.mains)(lambda: pieces(arrays[3:6], chunk - self.mains))

    def take(self, slot: Sequence[Ref], first: Any) -> tuple[jax.Array, ...]:
        """Of the tile that begins with block `first` of a slot, in registers."""
        words, *scales = take_digits(*(array.at[pl.ds(first, BLOCKS)] for array in slot))
        return words, *ptx.scales(*scales)

    def operand(self, chunk: tuple[jax.Array, ...], j: int) -> jax.Array:
        words, *scales = chunk
        return ptx.strip(words, scales, j)


class _Codes:
    """One plane of symmetric codes of 4 or 8 bits. A group is a few whole chunks."""

    def __init__(self, stored: Stored, bits: int):
        self.per_group, self.bits, self.grouped = stored.per_group, bits, len(stored.arrays) > 1
        self.unit = lanes.TINY * lanes.LARGE if self.grouped and bits == 4 else 1

    def memory(self, blocks: int) -> list[tuple[tuple[int, ...], Any]]:
        return [((blocks, 256), jnp.uint32), *([((16 * blocks,), jnp.bfloat16)] if self.grouped else [])]

    def copies(self, blocks: int) -> int:
        return 1 + (-(-blocks // 16) if self.grouped else 0)

    def copy(self, arrays: Sequence[Ref], chunk: Any, block: Any, blocks: int, start: Callable) -> None:
        start(0, arrays[0].at[pl.ds(block, blocks), pl.ds(chunk * 256, 256)])
        if self.grouped:
            # The last chunk may be of padding only.
            group = jnp.minimum(lax.div(chunk, self.per_group), arrays[1].shape[0] - 1)
            for first in range(0, 16 * blocks, 256):  # outputs, as many as a copy takes
                count = min(256, 16 * blocks - first)
                start(1, arrays[1].at[group, pl.ds(block * 16 + first, count)], pl.ds(first, count))

    def take(self, slot: Sequence[Ref], first: Any) -> tuple[jax.Array, ...]:
        words, *scale = slot
        return take_codes(words.at[pl.ds(first, BLOCKS)], *(array.at[pl.ds(16 * first, TILE)] for array in scale))

    def operand(self, chunk: tuple[jax.Array, ...], j: int) -> jax.Array:
        return ptx.stretch(*chunk, j=j, bits=self.bits)


# --- The kernel ----------------------------------------------------------------------------------------------


def outputs(
    x: jax.Array, weight: Weight, per_output: dict[str, jax.Array], *, activation: str | None, config: Sm90Config
) -> jax.Array:
    """[M, O]. `per_output` has arrays [parts, O], padded to whole blocks: "scale", "bias"."""
    stored = Stored.of(weight)
    at = _Digits(stored) if isinstance(weight, MixedBitWeight) else _Codes(stored, weight.bits)
    (M, K), N, parts, inputs = x.shape, weight.shape[1], parts_of(activation), stored.inputs
    groups, tiles, stages = config.warpgroups, config.tiles, config.stages
    splits, O, n = min(config.num_splits, stored.chunks), N // parts, TILE * groups * tiles
    padded, blocks, per_part, ordered = M + -M % 8, -(-O // n), BLOCKS * groups * tiles, M > FEW_ROWS
    if ordered:
        x = in_order(x, stored.mains * inputs // 16, index_of(stored.arrays))
    rows = M if M < 8 else padded  # of the output: copies leave out some of the first 8, but not of others
    # Copies leave alone what is not there, in whole tiles. The rest is cut off afterwards.
    columns = O if O % TILE == 0 else blocks * n

    def kernel(x_gmem, *refs, shared: Any, out_smem: Ref, full: Ref, free: Ref, done: Any = None):
        given, out_gmem = iter(refs[:-1]), refs[-1]
        option = {name: next(given) for name in per_output}
        gmem = list(given)
        (x_slots, *slots), partial = shared if splits > 1 else (shared, shared)
        block, me = lax.axis_index("block"), lax.axis_index("warpgroup")
        zero = lax.div(block, blocks)
        split = lax.axis_index("split") if splits > 1 else zero
        begin, end = (lax.div((split + i) * stored.chunks, splits) for i in range(2))
        count = end - begin

        def copy() -> None:
            @pl.loop(0, count)
            def _(step):
                slot = lax.rem(step, stages)
                # Each block begins somewhere else: all reading the same rows of x would wait for one part of the L2.
                chunk = begin + lax.rem(step + block, count)
                own = None
                if not ordered:
                    own = take_rows_in_order(x_gmem, index_of(gmem), chunk, padded, inputs, stored.mains)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                for part in range(parts):

                    def piece(i: int, source: Ref, *within: Any, part: int = part) -> None:
                        plgpu.copy_gmem_to_smem(source, slots[i].at[slot, part, *within], full.at[slot])

                    at.copy(gmem, chunk, lax.div(part * O, 16) + block * per_part, per_part, piece)
                if own is None:
                    here = x_gmem.at[:, pl.ds(chunk * inputs, inputs)]
                    plgpu.copy_gmem_to_smem(here, x_slots.at[slot], full.at[slot])
                else:
                    x_slots[slot] = own
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(full.at[slot])

        def multiply(*sums: Ref) -> list[jax.Array]:
            @pl.loop(0, count)
            def _(step):
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(full.at[slot])
                for i, z in enumerate(sums):
                    part, tile = divmod(i, tiles)
                    first = BLOCKS * (me * tiles + tile)
                    chunk = at.take([s.at[slot, part] for s in slots], first)
                    for j in range(inputs // 64):
                        operand = at.operand(chunk, j)  # while the product before goes on
                        if i or j:
                            plgpu.wgmma_wait(0)
                        plgpu.wgmma(z, operand, x_slots.at[slot, :, pl.ds(64 * j, 64)].transpose((1, 0)))
                plgpu.wgmma_wait(0)
                pl.when(step + stages < count)(lambda: plgpu.barrier_arrive(free.at[slot]))

            return [z[...] * (1 / at.unit) for z in sums]

        def finish(tile: int, z: list[jax.Array]) -> None:
            number = me * tiles + tile
            output = block * n + number * TILE
            y = activate_parts(with_outputs(z, option, output, plgpu.Layout.WGMMA), activation)
            out_smem.at[number].transpose((1, 0))[...] = y.astype(x.dtype)
            plgpu.commit_smem()
            # From row 0, in words that do not tell that fewer rows than a tile may follow.
            here = pl.ds(zero * 8, padded), pl.ds(output, TILE)
            pl.when(output < columns)(lambda: plgpu.copy_smem_to_gmem(out_smem.at[number], out_gmem.at[here]))

        @pl.when(me == groups)
        def _():
            copy()
            for _ in range(2 if splits > 1 else 0):
                cluster.sync()

        @pl.when(me < groups)
        def _():
            accumulators: Any = [plgpu.ACC((TILE, padded), jnp.float32)] * (parts * tiles)  # type: ignore
            sums = pl.run_scoped(multiply, *accumulators)
            if splits > 1:
                # Blocks of a cluster leave what they have, where their slots were; each adds some tiles up, in order.
                plgpu.barrier_arrive(done)
                plgpu.barrier_wait(done)
                for i, z in enumerate(sums):
                    partial[me, i] = z
                cluster.sync()

            def total(i: int) -> jax.Array:
                def add(z: jax.Array, away: int) -> jax.Array:
                    peer = lax.rem(split + away, splits)
                    return z + cluster.load(partial.at[me, i], peer, plgpu.Layout.WGMMA)

                return functools.reduce(add, range(1, splits), sums[i])

            for tile in range(tiles):

                def add_up(tile: int = tile) -> None:
                    finish(tile, [total(i) for i in range(tile, parts * tiles, tiles)])

                if splits == 1:
                    add_up()
                else:
                    pl.when(lax.rem(me * tiles + tile, splits) == split)(add_up)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if splits > 1:
                cluster.sync()  # no block is gone while others read from it

    kernel.__name__ = f"quantized_matmul_sm90_{type(at).__name__.strip('_').lower()}"
    pieces = at.memory(per_part)
    shared = [tile_memory(stages, padded, inputs, dtype=x.dtype)]
    shared += [plgpu.SMEM((stages, parts, *shape), dtype) for shape, dtype in pieces]
    scratch: dict[str, Any] = {
        "shared": shared,
        "out_smem": tile_memory(groups * tiles, padded, TILE, dtype=x.dtype),
        "full": plgpu.Barrier(num_arrivals=1 + parts * at.copies(per_part), num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
    }
    if splits > 1:
        partial = plgpu.SMEM((groups, parts * tiles, TILE, padded), jnp.float32)
        scratch |= {"shared": plgpu.RefUnion(shared, partial), "done": plgpu.Barrier(num_arrivals=groups)}
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        grid=(blocks,),
        grid_names=("block",),
        **({"cluster": (splits,), "cluster_names": ("split",)} if splits > 1 else {}),
        num_threads=groups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **cost_option(
            flops=2 * M * N * K,
            transcendentals=M * O if activation else 0,
            bytes_accessed=weight.nbytes + 2 * M * (K + O),
        ),
    )(x, *per_output.values(), *stored.arrays)
    return out[:M, :O]
