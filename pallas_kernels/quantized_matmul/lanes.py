# SPDX-License-Identifier: Apache-2.0
"""What a thread does with a chunk of packed weights: words to operands of the tensor cores, in 32-bit registers.

The product is turned around, Z^T [16 outputs, 8 rows of x] += W [16, k] X^T [k, 8], so that weights are the wide
operand of mma.m16n8k16. Thread 4 g + c of a warp holds outputs g and g + 8, and of each 64 inputs a quarter, c. Which
inputs an instruction sums over is free, as long as both operands agree: each thread of a quad brings some of its own,
and no number ever changes hands.

    word      odd inputs | even inputs     two fields of b bits, 16 bits apart, are two adjacent inputs
    2 bits    0x0000 | q 4^i = q 4^i TINY      the bits of a field are a number below the smallest normal bfloat16:
              fma(q 4^i TINY, scale / 4^i, -z scale TINY)          no conversion, and one rounding
    4 bits    0x4300 | q = 128 + q             or, of integers, bits of the mantissa of 128
              fma(128 + q, 1, -136)

TINY is 2^-133, too small for what follows: scales are multiplied by LARGE, and sums by 1 / (TINY LARGE) in the end.

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

ONE, BASE, SIGNS = 0x3F803F80, 0x43004300, 0x80008000  # 1; 128: its mantissa counts ones; -0
TINY, MIDDLE = 2.0**-133, 0x80088008  # -8 TINY: in bits, for processors may be set to take 0 for it
# Scales from 1e-25 to 1e9 stay normal numbers on both sides of TINY.
LARGE = 2.0**90
# The i of the 4^i that a pair of inputs is worth where it is read: three fields within 7 bits, two shifts a word.
FACTOR = (0, 0, 1, 1, 2, 2, 0, 1)


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


def scales(do: Instructions, stats: Sequence[Word], steps: Sequence[Word]) -> list[list[list[Word]]]:
    """What four strips of two outputs are multiplied by and what is added, two strips in a word: [pair][output] of
    scale, scale / 4, scale / 16 and -z scale.

    Args:
      do: who executes it.
      stats: [2 outputs], codes of the scales and zeros of 4 strips.
      steps: [2], second-order scales of 4 strips, two in a word.
    """
    pairs = []
    for pair in range(2):
        step = do.fma(steps[pair], twice(LARGE), 0)
        base = do.fma(step, twice(-128), 0)
        pairs.append([])
        for of_output in stats:
            scale = do.fma(do.bits(of_output, 4 * pair, 0x000F000F, BASE), step, base)
            zero = do.fma(do.bits(of_output, 8 + 4 * pair, 0x000F000F, SIGNS), scale, 0)
            pairs[pair].append([scale, *(do.fma(scale, twice(4.0**-i), 0) for i in (1, 2)), zero])
    return pairs


def strips(
    do: Instructions,
    sums: list[list[list[Any]]],
    words: Sequence[Sequence[Word]],
    scales: Sequence[Sequence[Sequence[Word]]],
    x: Sequence[Sequence[Sequence[Word]]],
    stretches: Sequence[int] = range(4),
) -> list[list[list[Any]]]:
    """Adds strips of a chunk, each of 16 inputs, in codes of 2 bits with scales of two orders.

    Args:
      do: who executes it.
      sums: [any][tile of 8 rows][4], to be added up and multiplied by 1 / (TINY LARGE) in the end: a product does not
        wait for the one before if that is of another.
      words: [2 outputs][4 strips].
      scales: of the four strips, as `scales` makes them.
      x: [tile][stretch of 64 inputs, one strip of each thread][8 pairs of inputs].
      stretches: which of the strips these are.
    """
    for at, j in enumerate(stretches):
        weights = strip(do, words, scales, j)
        for p in range(0, 8, 2):
            a = [weights[output][q] for q in (p, p + 1) for output in range(2)]
            multiply(do, sums[p // 2 % len(sums)], a, x, at, p)
    return sums


def strip(do: Instructions, words: Sequence[Sequence[Word]], scales: Any, j: int) -> list[list[Word]]:
    """Weights of strip j of a chunk, times TINY LARGE: [2 outputs][8 pairs of inputs]. Arguments as of `strips`."""
    pair, half = divmod(j, 2)
    weights = []
    for output in range(2):
        *of_factor, zero = [do.both(scale, half) for scale in scales[pair][output]]
        weights.append([do.fma(field(do, words[output][j], p), of_factor[FACTOR[p]], zero) for p in range(8)])
    return weights


def field(do: Instructions, word: Word, p: int) -> Word:
    """q 4^i TINY of a pair of inputs in a word of 2-bit codes."""
    moved, i = 2 * (FIELDS[p] - FACTOR[p]), FACTOR[p]
    return do.bits(word, moved, 0x00030003 << 2 * i, 0)


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

    pairs = 16 // bits  # of a word
    for i, f in itertools.product(range(4), range(0, pairs, 2)):
        a = [code(do, words[output][i], g, bits) for g in (f, f + 1) for output in range(2)]
        j, p = divmod(i * pairs + f, 8)
        multiply(do, sums, a, x, j, p)
    return sums


def code(do: Instructions, word: Word, f: int, bits: int) -> Word:
    """A pair of symmetric codes in a word, f of its 16 / bits: numbers from -2^(bits - 1) on."""
    low = do.bits(word, bits * f, 0x000F000F, BASE)
    if bits == 4:
        return do.fma(low, ONE, twice(-128 - 8))
    high = do.bits(word, 8 * f + 4, 0x000F000F, BASE)  # 16 high + low - 128, of codes within 8 bits of mantissa
    return do.fma(low, ONE, do.fma(high, twice(16), twice(-16 * 128 - 256)))


def stretch(
    do: Instructions, words: Sequence[Sequence[Word]], scales: Sequence[Word] | None, j: int, bits: int
) -> list[list[Word]]:
    """Weights of stretch j of a chunk of such codes: [2 outputs][8 pairs of inputs]. `scales`: of 2 outputs, a number
    twice each, or None for 1. Of 4 bits, scaled ones come times TINY LARGE."""
    pairs, weights = 16 // bits, []
    for output in range(2):
        own = [(words[output][i], f) for i, f in (divmod(8 * j + p, pairs) for p in range(8))]
        if scales is None:
            weights.append([code(do, word, f, bits) for word, f in own])
        elif bits == 4:
            scale = do.fma(scales[output], twice(LARGE), 0)
            zero = do.fma(scale, MIDDLE, 0)
            weights.append([do.fma(do.bits(word, 4 * f, 0x000F000F, 0), scale, zero) for word, f in own])
        else:
            weights.append([do.fma(code(do, word, f, bits), scales[output], SIGNS) for word, f in own])
    return weights


def twice(x: float) -> int:
    """A number that bfloat16 holds, in both halves of a word."""
    half = int(np.float32(x).view(np.uint32)) >> 16
    return half << 16 | half
