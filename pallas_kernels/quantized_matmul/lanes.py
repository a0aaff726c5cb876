# SPDX-License-Identifier: Apache-2.0
"""What a thread does with a chunk of packed weights: words to operands of the tensor cores, in 32-bit registers.

The product is turned around, Z^T [16 outputs, 8 rows of x] += W [16, k] X^T [k, 8], so that weights are the wide
operand of mma.m16n8k16. Thread 4 g + c of a warp holds outputs g and g + 8, and of each 64 inputs a quarter, c. Which
inputs an instruction sums over is free, as long as both operands agree: each thread of a quad brings some of its own,
and no number ever changes hands.

    word      odd inputs | even inputs     two fields of b bits, 16 bits apart, are two adjacent inputs
    bfloat16  0x4300 | q 4^i = 128 + q 4^i     a field within the 7 bits of the mantissa needs no conversion
    weight    fma(128 + q 4^i, scale, -128 scale) = q 4^i scale     exact before its one rounding: -128 scale is exact

The factor 4^i of a field that was not moved is left to the sums: there is one for each i < 3, added up in the end. A
zero is a weight like any other: z scale, once for each input. (Of many rows products cost more than that:
`centered_strips`.)

Nothing here knows who executes it: `ptx.py` turns it into instructions, and tests compute it on arrays.

Source: Li et al., "Enabling Fast 2-bit LLM on GPUs", 2023, section 2.4 for the words; Kim et al., "Who Says Elephants
Can't Run", 2022, for numbers made of mantissa bits.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from pallas_kernels.quantized_matmul.packing import FIELDS

Word = Any  # 32 bits: an integer, or two bfloat16

ONE, MINUS_ONE = 0x3F803F80, 0xBF80BF80
BASE, MINUS_BASE = 0x43004300, 0xC300C300  # 128: its mantissa counts ones
FACTOR = (
    0,
    0,
    1,
    1,
    2,
    2,
    0,
    0,
)  # the i of the 4^i that a pair of inputs is worth where it is read: three shifts a word


class Instructions(Protocol):
    def bits(self, word: Word, shift: int, mask: int, base: int) -> Word:
        """((word >> shift) & mask) | base."""
        ...

    def fma(self, a: Word, b: Word | int, c: Word | int) -> Word:
        """a * b + c of two bfloat16, rounded once; an integer is a constant."""
        ...

    def both(self, word: Word, half: int) -> Word:
        """One half of a word, twice."""
        ...

    def mma(self, sums: Sequence[Any], a: Sequence[Word], b: Sequence[Word]) -> list[Any]:
        """sums + A B of mma.m16n8k16: four float32, four words of bfloat16, two words of bfloat16."""
        ...


def strips(
    do: Instructions,
    sums: list[list[list[Any]]],
    words: Sequence[Sequence[Word]],
    stats: Sequence[Word],
    steps: Sequence[Word],
    x: Sequence[Sequence[Sequence[Word]]],
) -> list[list[list[Any]]]:
    """Adds a chunk of 16 strips of 16 inputs, in codes of 2 bits with scales of two orders.

    Args:
      do: who executes it.
      sums: [i][tile of 8 rows][4] of three factors, to be multiplied by 4^-i in the end, and of zeros, to be
        subtracted.
      words: [2 outputs][4 strips].
      stats: [2 outputs], codes of the scales and zeros of 4 strips.
      steps: [2], second-order scales of 4 strips, two in a word.
      x: [tile][stretch of 64 inputs, one strip of each thread][8 pairs of inputs].
    """
    weights, zeros = [[], []], [[], []]  # [output][strip][pair], [output][strip]
    for output, pair in itertools.product(range(2), range(2)):
        scale, stat = _scale(do, stats[output], steps[pair], pair), stats[output]
        zero = do.fma(do.bits(stat, 8 + 4 * pair, 0x000F000F, BASE), scale, do.fma(scale, MINUS_BASE, 0))
        for half in range(2):
            word, one = words[output][2 * pair + half], do.both(scale, half)
            base = do.fma(one, MINUS_BASE, 0)
            weights[output].append([do.fma(field(do, word, p), one, base) for p in range(8)])
            zeros[output].append(do.both(zero, half))
    for j, p in itertools.product(range(4), range(0, 8, 2)):
        multiply(do, sums[FACTOR[p]], [weights[output][j][q] for q in (p, p + 1) for output in range(2)], x, j, p)
        multiply(do, sums[3], [zeros[output][j] for output in (0, 1, 0, 1)], x, j, p)
    return sums


def centered_strips(
    do: Instructions,
    sums: list[list[Any]],
    words: Sequence[Sequence[Word]],
    stats: Sequence[Word],
    steps: Sequence[Word],
    x: Sequence[Sequence[Word]],
    j: int,
) -> list[list[Any]]:
    """As `strips`, of strip j of each thread alone, to one sum [tile][4]: zeros and the factors 4^i are taken out of
    each weight, by one more instruction, where products of many rows cost more. x: [tile][8 pairs of inputs]."""
    weights, (pair, half) = [], divmod(j, 2)
    for output in range(2):
        scale, stat = _scale(do, stats[output], steps[pair], pair), stats[output]
        minus_zero = do.fma(do.bits(stat, 8 + 4 * pair, 0x000F000F, BASE), MINUS_ONE, BASE)
        center = [do.both(do.fma(minus_zero, twice(4**i), MINUS_BASE), half) for i in range(3)]  # -(128 + z 4^i), exact
        one = [do.both(do.fma(scale, twice(4.0**-i), 0), half) for i in range(3)]
        digits = [do.fma(field(do, words[output][j], p), ONE, center[FACTOR[p]]) for p in range(8)]
        weights.append([do.fma(digit, one[FACTOR[p]], 0) for p, digit in enumerate(digits)])
    for p in range(0, 8, 2):
        multiply(
            do, sums, [weights[output][q] for q in (p, p + 1) for output in range(2)], [[rows] for rows in x], 0, p
        )
    return sums


def _scale(do: Instructions, stats: Word, steps: Word, pair: int) -> Word:
    """code * step of two strips."""
    return do.fma(do.bits(stats, 4 * pair, 0x000F000F, BASE), steps, do.fma(steps, MINUS_BASE, 0))


def field(do: Instructions, word: Word, p: int) -> Word:
    """128 + q 4^i of a pair of inputs in a word of 2-bit codes."""
    moved, i = 2 * (FIELDS[p] - FACTOR[p]), FACTOR[p]
    return do.bits(word, moved, 0x00030003 << 2 * i, BASE)


def multiply(do: Instructions, sums: list[list[Any]], a: Sequence[Word], x: Any, j: int, p: int) -> None:
    """One instruction for each tile of rows, over the pairs p and p + 1 of inputs of a word."""
    for tile, rows in enumerate(x):
        sums[tile] = do.mma(sums[tile], a, rows[j][p : p + 2])


def integers(
    do: Instructions,
    sums: list[list[Any]],
    words: Sequence[Sequence[Word]],
    x: Sequence[Sequence[Sequence[Word]]],
    bits: int,
) -> list[list[Any]]:
    """Adds a chunk of 16 words of symmetric codes of 4 or 8 bits, without a scale.

    Args:
      do: who executes it.
      sums: [tile of 8 rows][4].
      words: [2 outputs][4 words].
      x: [tile][stretch of 64 inputs][8 pairs of inputs].
      bits: 4 or 8.
    """

    def weight(word: Word, f: int) -> Word:
        low = do.bits(word, bits * f, 0x000F000F, BASE)
        if bits == 4:
            return do.fma(low, ONE, twice(-128 - 8))
        high = do.bits(word, 8 * f + 4, 0x000F000F, BASE)  # 16 high + low - 128, of codes within 8 bits of mantissa
        return do.fma(low, ONE, do.fma(high, twice(16), twice(-16 * 128 - 256)))

    pairs = 16 // bits  # of a word
    for i, f in itertools.product(range(4), range(0, pairs, 2)):
        a = [weight(words[output][i], g) for g in (f, f + 1) for output in range(2)]
        j, p = divmod(i * pairs + f, 8)
        multiply(do, sums, a, x, j, p)
    return sums


def twice(x: float) -> int:
    """A number that bfloat16 holds, in both halves of a word."""
    half = int(np.float32(x).view(np.uint32)) >> 16
    return half << 16 | half
