# SPDX-License-Identifier: Apache-2.0
"""Where each bit lies: by hand, by plain Python, and there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.quantized_matmul import packing

# Which word of a chunk lies at each position.
ORDER = {
    2: [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15],
    4: [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15],
    8: list(range(16)),
}


def by_hand(codes, bits):
    """Words of codes [N, K], one code at a time, by the sentences of the format in Python's integers."""
    N, K = codes.shape
    per_word = 32 // bits
    fields = [0, 3, 1, 4, 2, 5, 6, 7] if bits == 2 else range(8)
    chunks = -(-K // (16 * per_word))
    words = np.zeros((-(-N // 16), 256 * chunks), np.uint32)
    for n in range(N):
        for k in range(K):
            word, v = divmod(k, per_word)
            chunk, within = divmod(word, 16)
            place = ORDER[bits].index(within)
            at = n // 16, 256 * chunk + 16 * (n % 16) + place
            words[at] |= int(codes[n, k]) << (16 * (v % 2) + bits * fields[v // 2])
    return words


def test_bits_of_a_word():
    """2 bits: value 0 is the lowest digit, value 1 that of the high half, value 15 the highest of all."""
    for v, bit in ((0, 0), (1, 16), (2, 6), (3, 22), (4, 2), (9, 20), (10, 10), (14, 14), (15, 30)):
        codes = np.zeros((1, 16), np.uint8)
        codes[0, v] = 3
        assert int(packing.pack(codes, 2)[0, 0]) == 3 << bit
    codes = np.arange(8, dtype=np.uint8)[None]  # 4 bits: 6 4 2 0 in the low half, 7 5 3 1 in the high one
    assert hex(packing.pack(codes, 4)[0, 0]) == "0x75316420"
    codes = np.array([[1, 2, 3, 4]], np.uint8)
    assert hex(packing.pack(codes, 8)[0, 0]) == "0x4020301"


def test_order_of_words():
    """A thread's four words of a chunk, strips c, 4 + c, 8 + c and 12 + c, are neighbors."""
    codes = np.repeat(np.arange(16) % 4, 16).astype(np.uint8)[None]  # strip s has digits s % 4, that is thread c's
    words = packing.pack(codes, 2)
    assert words.shape == (1, 256)  # of 16 outputs
    np.testing.assert_array_equal(words[0, :16], np.repeat([0, 0x55555555, 0xAAAAAAAA, 0xFFFFFFFF], 4))
    np.testing.assert_array_equal(words[0, 16:], 0)


def test_bits_of_stats():
    """Strips 0, 4, 8 and 12 share word 0, scale codes in the low byte of each half, zeros in the high byte."""
    scale_codes, zeros = np.zeros((16, 16), np.uint8), np.zeros((16, 16), np.uint8)
    scale_codes[0, [0, 4, 8, 12]] = 1, 2, 3, 4
    zeros[0, [0, 4, 8, 12]] = 3, 2, 1, 0
    scale_codes[1, 7] = 15  # thread 3, j = 1
    stats = packing.pack_stats(scale_codes, zeros)
    assert stats.shape == (1, 64)
    assert stats.dtype == np.uint32
    assert hex(stats[0, 0]) == "0x2421331"
    assert hex(stats[0, 4 + 3]) == hex(15 << 16)
    assert np.sum(stats != 0) == 2


SIZES = st.tuples(st.sampled_from((1, 5, 16, 19)), st.sampled_from((1, 16, 17, 100, 257)))


@given(SIZES, st.sampled_from(packing.BITS), st.integers(0, 2**32 - 1))
def test_pack_is_as_by_hand_and_unpack_undoes_it(size, bits, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, size, np.uint8)
    words = packing.pack(codes, bits)
    assert words.dtype == jnp.uint32
    np.testing.assert_array_equal(words, by_hand(codes, bits))
    back = packing.unpack(words, bits, size[1])
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back[: size[0]], codes)
    np.testing.assert_array_equal(back[size[0] :], 0)


@given(st.sampled_from(((16, 16), (32, 48))), st.integers(0, 2**32 - 1))
def test_stats_come_back(size, seed):
    scale_codes, zeros = np.random.default_rng(seed).integers(0, 16, (2, *size), np.uint8)
    stats = packing.pack_stats(scale_codes, zeros)
    np.testing.assert_array_equal(packing.pack_stats(jnp.asarray(scale_codes), jnp.asarray(zeros)), stats)
    for n, s in np.ndindex(size):
        chunk, within = divmod(s, 16)
        j, c = divmod(within, 4)
        word = int(stats[n // 16, 64 * chunk + 4 * (n % 16) + c])
        at = 16 * (j % 2) + 4 * (j // 2)
        assert (word >> at & 15, word >> (at + 8) & 15) == (scale_codes[n, s], zeros[n, s])
    for got, want in zip(packing.unpack_stats(stats), (scale_codes, zeros), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("bits", packing.BITS)
def test_words_of_every_bit_pattern_come_back(bits, float64):
    """With 64-bit integers enabled too, and under jit."""
    words = np.random.default_rng(0).integers(0, 2**32, (1, 16 * 32), np.uint32)
    K = 32 * 32 // bits
    again = jax.jit(lambda words: packing.pack(packing.unpack(words, bits, K), bits))(words)
    assert again.dtype == jnp.uint32
    np.testing.assert_array_equal(again, words)
