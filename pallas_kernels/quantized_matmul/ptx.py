# SPDX-License-Identifier: Apache-2.0
"""`lanes.py` in instructions for the warps of a warpgroup, and where their registers come from.

A warpgroup holds tiles of 64 outputs, 16 a warp. Layouts, thread 4 g + c of each warp:

    WORDS [64, 16]    outputs g, g + 8 of its warp; words 4 c ... 4 c + 3: 16 adjacent bytes
    STATS [64, 4]     the same outputs; word c
    STEPS [4, 16]     an output block a warp; strips 4 c ... 4 c + 3
    ROWS [8 m, 64 j]  rows g of x; inputs 16 c ... 16 c + 15 of each stretch of 64, in all warps
    SUMS  [64, 8 m]   accumulators of mma.m16n8k16
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl  # noqa: F401  (registers the lowering rules)
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.core.inline import Value, array, constant, i32, inline, result, sums_of, tiled, with_sums, words_of
from pallas_kernels.quantized_matmul import lanes

_EVERY_WARP, _EVERY_GROUP = mgpu.fragmented_array.Replicated(4), mgpu.fragmented_array.Replicated(8)
WORDS = plgpu.Layout.WGMMA_8BIT
STATS = tiled(((64, 4), (16, 4), (8, 4), (1,)), (-7,), (-3, -2))
STEPS = tiled(((4, 16), (1, 16), (4,)), (-5,), (_EVERY_GROUP, -2))
ROWS = tiled(((8, 64), (8, 16), (8,)), (_EVERY_WARP,), (-3, -4))
SUMS = plgpu.Layout.MMA_ACC(jnp.bfloat16)


def rows_in_order(inputs: int) -> Any:
    """[rows, inputs] of two adjacent columns, 8 g + 2 c and one more, of a stretch of 64 in each warp."""
    stretches = inputs // 64
    return tiled(((4 // stretches, inputs), (1, 64), (8,), (2,)), (-6, -5), (-3, -2))


def scales(stats: jax.Array, steps: jax.Array) -> list[jax.Array]:
    """`lanes.scales` of every thread, of stats [64, 4] and steps [4, 16]: for each of two pairs of strips [64, 16], a
    thread's four words of an output side by side."""

    def quantized_scales(_, stats, steps):
        (both,) = steps.registers.flat
        pairs = lanes.scales(_Ptx(), [words_of(r)[0] for r in stats.registers.flat], words_of(both))
        return [array(WORDS, (64, 16), jnp.uint32, of_outputs) for of_outputs in pairs]

    return inline(quantized_scales, (STATS, STEPS), [result(WORDS, (64, 16), jnp.uint32)] * 2, stats, steps)


def strips(
    sums: list[jax.Array], words: jax.Array, scales: list[jax.Array], x: jax.Array, stretches: range
) -> list[jax.Array]:
    """Adds strips of a chunk to sums [64, 8 m]: `lanes.strips` of every thread. words [64, 16], scales as `scales`
    returns them, x [8 m, 64 j] in ROWS: of j stretches of 64 inputs."""

    def quantized_strips(_, sums, words, scales, x):
        words, *scales = ([words_of(r) for r in one.registers.flat] for one in (words, *scales))
        parts = [sums_of(s) for s in sums]
        parts = lanes.strips(_Ptx(), parts, words, scales, _rows_of(x), stretches)
        return [with_sums(s, part) for s, part in zip(sums, parts, strict=True)]

    types = ([SUMS] * len(sums), WORDS, [WORDS] * 2, ROWS)
    return inline(quantized_strips, types, [_like(s) for s in sums], sums, words, scales, x)


def integers(total: jax.Array, words: jax.Array, scale: jax.Array | None, x: jax.Array, bits: int) -> jax.Array:
    """Adds a chunk of codes to a sum [64, 8 m]: `lanes.integers` of every thread. words [64, 16], scale [64, 4] or None
    for 1, x [8 m, 512 / bits] in ROWS."""

    def quantized_integers(_, total, words, x, scale=None):
        of_outputs, sums = [words_of(r) for r in words.registers.flat], sums_of(total)
        if scale is None:
            return with_sums(total, lanes.integers(_Ptx(), sums, of_outputs, _rows_of(x), bits))
        zero = arith.constant(ir.F32Type.get(), 0.0)
        parts = lanes.integers(_Ptx(), [[zero] * 4 for _ in sums], of_outputs, _rows_of(x), bits)
        factors = [
            factor for r in scale.registers.flat for factor in [llvm.extractelement(r, constant(0))] * 2
        ]  # of outputs g, g, g + 8, g + 8
        scaled = [
            [arith.addf(y, arith.mulf(z, factor)) for y, z, factor in zip(tile, part, factors, strict=True)]
            for tile, part in zip(sums, parts, strict=True)
        ]
        return with_sums(total, scaled)

    arrays = [total, words, x] if scale is None else [total, words, x, scale]
    return inline(quantized_integers, (SUMS, WORDS, ROWS, STATS)[: len(arrays)], _like(total), *arrays)


def strip(words: jax.Array, scales: list[jax.Array], j: int) -> jax.Array:
    """The left operand of a product by wgmma: `lanes.strip` of every thread, [64 outputs, 64], where columns 8 p + 2 c
    and one more are inputs 2 p and 2 p + 1 of strip 4 j + c of a chunk. Arguments as of `strips`."""

    def quantized_strip(_, words, scales):
        words, *scales = ([words_of(r) for r in one.registers.flat] for one in (words, *scales))
        return _operand(lanes.strip(_Ptx(), words, scales, j))

    return inline(quantized_strip, (WORDS, [WORDS] * 2), _OPERAND, words, scales)


def stretch(words: jax.Array, scales: jax.Array | None = None, *, j: int, bits: int) -> jax.Array:
    """The same of symmetric codes: `lanes.stretch`. scales [64, 4] of words, as `ring.take_codes` reads them."""

    def quantized_stretch(_, words, scales=None):
        factors = None if scales is None else [words_of(r)[0] for r in scales.registers.flat]
        return _operand(lanes.stretch(_Ptx(), [words_of(r) for r in words.registers.flat], factors, j, bits))

    given = [words] if scales is None else [words, scales]
    return inline(quantized_stretch, (WORDS, STATS)[: len(given)], _OPERAND, *given)


class _Ptx(lanes.Instructions):
    """The instructions of a thread. Registers are i32 values."""

    def bits(self, word: Value, shift: int, mask: int, base: int) -> Value:
        moved = arith.shrui(word, constant(shift)) if shift else word
        # (a & b) | c in one instruction, which takes one constant; the compiler, left alone, makes it two.
        code = "lop3.b32 $0, $1, $2, $3, 0xEA;"
        operands = [moved, constant(mask), constant(base)]
        return llvm.inline_asm(i32(), operands, code, "=r,r,n,r", has_side_effects=False)

    def fma(self, a: Value, b: Value | int, c: Value | int) -> Value:
        operands = [x if isinstance(x, ir.Value) else constant(x) for x in (a, b, c)]
        code = "fma.rn.bf16x2 $0, $1, $2, $3;"  # sm_80 has no other arithmetic of bfloat16
        return llvm.inline_asm(i32(), operands, code, "=r,r,r,r", has_side_effects=False)

    def both(self, word: Value, half: int) -> Value:
        # As moves of halves, which the compiler makes part of the instruction that reads them.
        code = f"{{ .reg .b16 h<2>; mov.b32 {{h0, h1}}, $1; mov.b32 $0, {{h{half}, h{half}}}; }}"
        return llvm.inline_asm(i32(), [word], code, "=r,r", has_side_effects=False)

    def mma(self, sums: Sequence[Value], a: Sequence[Value], b: Sequence[Value]) -> list[Value]:
        f32 = ir.F32Type.get()
        code = (
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
        )
        constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
        result = llvm.inline_asm(
            llvm.StructType.get_literal([f32] * 4), [*a, *b, *sums], code, constraints, has_side_effects=False
        )
        return [llvm.extractvalue(f32, result, [i]) for i in range(4)]


def _rows_of(x: mgpu.FragmentedArray) -> list[list[list[Value]]]:
    """[tile][stretch][pair of inputs]."""
    tiles, stretches = x.registers.shape[:2]
    return [
        [[w for register in x.registers[tile, j].flat for w in words_of(register)] for j in range(stretches)]
        for tile in range(tiles)
    ]


def _operand(weights: Sequence[Sequence[Value]]) -> mgpu.FragmentedArray:
    """bfloat16 [64, 64] of [2 outputs][8 pairs]."""
    return array(plgpu.Layout.WGMMA, (64, 64), jnp.bfloat16, [[w] for pair in zip(*weights, strict=True) for w in pair])


def _like(total: jax.Array) -> Any:
    return result(SUMS, total.shape, jnp.float32)


_OPERAND = result(plgpu.Layout.WGMMA, (64, 64), jnp.bfloat16)
