# SPDX-License-Identifier: Apache-2.0
"""Small integers in words of 32 bits, and the order of words in memory.

A word holds n = 32 / b values of b bits. Even values lie in its low half, odd ones in its high half, so that one mask
leaves a pair of neighbors in the two halves of a register. Of 2 bits, two pairs in a row are three fields apart: where
a kernel reads three fields of a half without moving them, both are worth the same (lanes.py):

    b = 4     bit  28   24   20   16 | 12    8    4    0               value v at bits 16 (v % 2) + b field(v // 2)
              v     7    5    3    1 |  6    4    2    0

    b = 2     bit  30   28   26   24   22   20   18   16 | 14   12   10    8    6    4    2    0
              v    15   13   11    7    3    9    5    1 | 14   12   10    6    2    8    4    0

Words along an axis are stored in chunks of 16. Four threads share a row in a tensor core's operand; each takes 16
adjacent inputs at a time, b / 2 words, and has its 4 words of a chunk in 16 adjacent bytes:

    position   0  1  2  3 | 4  5  6  7 | 8  9 10 11 | 12 13 14 15
    b = 2      0  4  8 12 | 1  5  9 13 | 2  6 10 14 | 3  7 11 15       word 4 j + c at position 4 c + j
    b = 4      0  1  8  9 | 2  3 10 11 | 4  5 12 13 | 6  7 14 15
    b = 8      0  1  2  3 | 4  5  6  7 | 8  9 10 11 | 12 13 14 15

Sixteen outputs, which a warp takes at a time, have what belongs to a chunk side by side, 1024 bytes of words: an array
[N', W'] is stored as [N' / 16, 16 W'] (`blocked`), for memory and caches give whole lines.

Arrays are of NumPy or JAX, and so are results; `pack` and `unpack` are compiled and return those of JAX.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 16  # words
ROWS = 16  # outputs are padded to a multiple of it
BITS = (2, 4, 8)
FIELDS = (0, 3, 1, 4, 2, 5, 6, 7)  # of the pairs of 2 bits


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is not below n."""
    return n + -n % multiple


def shifts(bits: int) -> np.ndarray:
    """Where the values of a word begin, uint32 [32 / bits].

    >>> shifts(4).tolist()
    [0, 16, 4, 20, 8, 24, 12, 28]
    """
    fields = FIELDS if bits == 2 else range(16 // bits)
    return np.array([16 * half + bits * field for field in fields for half in (0, 1)], np.uint32)


def to_words[Array: (jax.Array, np.ndarray)](values: Array, bits: int) -> Array:
    """uint32 [...] of values [..., 32 / bits], each below 2^bits."""
    return (values.astype(np.uint32) << shifts(bits)).sum(-1, dtype=np.uint32)


def from_words[Array: (jax.Array, np.ndarray)](words: Array, bits: int) -> Array:
    """uint32 [..., 32 / bits], the values of words [...]."""
    return (words[..., None] >> shifts(bits)) & np.uint32(2**bits - 1)


def to_memory[Array: (jax.Array, np.ndarray)](words: Array, bits: int = 2) -> Array:
    """Words along the last axis, in the order of inputs, in that of memory.

    >>> to_memory(np.arange(16)).tolist()
    [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]
    """
    stretch = bits // 2  # words of 16 inputs
    return words.reshape(*words.shape[:-1], -1, 4 // stretch, 4, stretch).swapaxes(-2, -3).reshape(words.shape)


def from_memory[Array: (jax.Array, np.ndarray)](words: Array, bits: int = 2) -> Array:
    """The inverse of `to_memory`."""
    stretch = bits // 2
    return words.reshape(*words.shape[:-1], -1, 4, 4 // stretch, stretch).swapaxes(-2, -3).reshape(words.shape)


def blocked[Array: (jax.Array, np.ndarray)](rows: Array, width: int) -> Array:
    """[N' / 16, 16 C width] of rows [N', C width]: what 16 outputs have of a chunk, `width` each, side by side.

    >>> blocked(np.arange(64).reshape(16, 4), 2)[0, :6].tolist()
    [0, 1, 4, 5, 8, 9]
    """
    N, columns = rows.shape
    return rows.reshape(N // ROWS, ROWS, columns // width, width).swapaxes(1, 2).reshape(N // ROWS, ROWS * columns)


def unblocked[Array: (jax.Array, np.ndarray)](blocks: Array, width: int) -> Array:
    """The inverse of `blocked`."""
    B, columns = len(blocks), blocks.shape[1] // ROWS
    return blocks.reshape(B, columns // width, ROWS, width).swapaxes(1, 2).reshape(ROWS * B, columns)


@functools.partial(jax.jit, static_argnames="bits")
def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Words uint32 [N' / 16, 16 W'] of codes [N, K], each below 2^bits; N' and W' are multiples of 16, padding is 0."""
    N, K = codes.shape
    n = 32 // bits
    codes = jnp.pad(codes, ((0, -N % ROWS), (0, -K % (CHUNK * n))))
    return blocked(to_memory(to_words(codes.reshape(len(codes), -1, n), bits), bits), CHUNK)


@functools.partial(jax.jit, static_argnames=("bits", "K"))
def unpack(words: jax.Array, bits: int, K: int) -> jax.Array:
    """Codes uint8 [N', K] of words [N' / 16, 16 W']: what `pack` made them of, padding rows included."""
    rows = from_memory(unblocked(words, CHUNK), bits)
    return from_words(rows, bits).reshape(len(rows), -1)[:, :K].astype(jnp.uint8)


def pack_stats[Array: (jax.Array, np.ndarray)](scale_codes: Array, zeros: Array) -> Array:
    """uint32 [N' / 16, 4 S] of scale codes and zeros [N', S], both of up to 4 bits and in the order of inputs; N' and S
    are multiples of 16.

    Word c of a chunk describes the four strips at positions 4 c ... 4 c + 3 of the chunk, which are strips 4 j + c. It
    is a word of 4-bit values: their four scale codes, then their four zeros.
    """
    by_thread = [to_memory(array).reshape(len(array), -1, 4) for array in (scale_codes, zeros)]
    return blocked(to_words(scale_codes.__array_namespace__().concatenate(by_thread, axis=-1), 4), CHUNK // 4)


def unpack_stats[Array: (jax.Array, np.ndarray)](stats: Array) -> tuple[Array, Array]:
    """Scale codes and zeros, uint32 [N', S] in the order of inputs."""
    both = from_words(unblocked(stats, CHUNK // 4), 4)
    scale_codes, zeros = (from_memory(part.reshape(len(both), -1)) for part in (both[..., :4], both[..., 4:]))
    return scale_codes, zeros
