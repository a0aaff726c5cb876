# SPDX-License-Identifier: Apache-2.0
"""What the bytes of a weight stand for: by hand, and by NumPy from the format's sentences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import IntWeight, MixedBitWeight
from pallas_kernels.quantized_matmul.shapes import SHAPES, Shape
from pallas_kernels.quantized_matmul.weights import Plane
from tests.quantized_matmul.test_packing import ORDER


def rows_by_numpy(array, width):
    """[N', ...] of blocks of 16 outputs, `width` of each output after another."""
    blocks = np.asarray(array)
    out = np.zeros((16 * len(blocks), blocks.shape[1] // 16), blocks.dtype)
    for n, column in np.ndindex(out.shape):
        out[n, column] = blocks[n // 16, 16 * width * (column // width) + width * (n % 16) + column % width]
    return out


def digits_by_numpy(words, bits):
    """[N', inputs] of words in memory order."""
    words = rows_by_numpy(words, 16)
    v = np.arange(32 // bits)
    field = np.array([0, 3, 1, 4, 2, 5, 6, 7])[v // 2] if bits == 2 else v // 2
    values = words[:, :, None] >> (16 * (v % 2) + bits * field).astype(np.uint32) & (2**bits - 1)
    chunks = values.reshape(len(words), -1, 16, 32 // bits)
    return chunks[:, :, np.argsort(ORDER[bits])].reshape(len(words), -1).astype(np.int64)


def plane_by_numpy(plane):
    """float64 [N', S', 16], one strip after another."""
    digits = digits_by_numpy(plane.words, 2)
    digits = digits.reshape(len(digits), -1, 16)
    stats, steps = rows_by_numpy(plane.stats, 4).astype(np.int64), np.asarray(plane.steps).astype(np.float64)
    out = np.zeros(digits.shape)
    for s in range(digits.shape[1]):
        chunk, (j, c) = s // 16, divmod(s % 16, 4)
        word, low = stats[:, 4 * chunk + c], 16 * (j % 2) + 4 * (j // 2)
        scale_code, zero = word >> low & 15, word >> (low + 8) & 15
        step = np.repeat(steps[:, 16 * chunk + 4 * c + j], 16)
        scale = (scale_code * step).astype(jnp.bfloat16).astype(np.float64)
        out[:, s] = (digits[:, s] - zero[:, None]) * scale[:, None]
    return out


def by_numpy(weight):
    """[K, N] in float64."""
    K, N = weight.shape
    if isinstance(weight, IntWeight):
        integers = digits_by_numpy(weight.words, weight.bits)[:, :K]
        group = np.arange(K) // (weight.group_size or K)
        zero = 2 ** (weight.bits - 1) if weight.zero is None else np.asarray(weight.zero).astype(np.int64).T[:, group]
        return ((integers - zero) * np.asarray(weight.scale).astype(np.float64).T[:, group])[:N].T
    out, tail, last = plane_by_numpy(weight.main), plane_by_numpy(weight.tail), -1
    for t, s in enumerate(np.asarray(weight.tail_index)):
        if s > last:  # else it is padding
            out[:, s] += tail[:, t]
            last = s
    out = out.reshape(len(out), -1)[:N, :K].copy()
    if weight.outliers is not None:
        pointers = np.asarray(weight.outliers.pointers)
        for n in range(N):
            entries = slice(pointers[n], pointers[n + 1])
            out[n, np.asarray(weight.outliers.columns[entries])] += np.asarray(weight.outliers.values[entries])
    return out.T


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if not shape.large])
def test_dequantize_is_as_numpy_decodes(name):
    weight = SHAPES[name].make("float32", jax.random.key(1))["weight"]
    weight.check()
    got, want = weight.dequantize(), by_numpy(weight)
    assert got.dtype == jnp.float32
    assert got.shape == weight.shape == want.shape
    # Digits times scales are exact; so are their sums, unless entries of any size are added or scales have 24 bits.
    exact = weight.outliers is None if isinstance(weight, MixedBitWeight) else weight.scale.dtype == jnp.bfloat16
    np.testing.assert_allclose(got, want, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-7)


def test_one_strip_by_hand():
    """4 bits: q = 0 ... 15, zero 9, scale 2 * 0.5: high digits q // 4 - 2 times 4, low digits q % 4 - 1 times 1."""
    fields = 0, 3, 1, 4, 2, 5, 6, 7
    high, low = (
        sum(v << (16 * (k % 2) + 2 * fields[k // 2]) for k, v in enumerate(values))
        for values in ([k // 4 for k in range(16)], [k % 4 for k in range(16)])
    )

    def plane(word, zero, step):
        arrays = np.zeros((1, 256), np.uint32), np.zeros((1, 64), np.uint32), np.ones((1, 16))
        arrays[0][0, 0], arrays[1][0, 0], arrays[2][0, 0] = word, 2 | zero << 8, step
        return Plane(jnp.asarray(arrays[0]), jnp.asarray(arrays[1]), jnp.asarray(arrays[2], jnp.bfloat16))

    weight = MixedBitWeight(plane(high, 2, 2.0), plane(low, 1, 0.5), jnp.zeros(16, jnp.int32), (16, 1))
    weight.check()
    np.testing.assert_array_equal(weight.dequantize()[:, 0], np.arange(16) - 9)
    assert weight.four_bit_strips().tolist() == [True]


def test_scales_are_rounded_to_bfloat16():
    """15 * 1.0078125 = 15.1171875 lies between 15.0625 and 15.125, under jit too."""
    weight = Shape(1, 16, 16, four_bit_strips=0).make("float32", jax.random.key(0))["weight"]
    stats, words = np.zeros((1, 64), np.uint32), np.zeros((1, 256), np.uint32)
    stats[0, 0], words[0, 0] = 15, 1
    main = Plane(jnp.asarray(words), jnp.asarray(stats), jnp.full((1, 16), 1.0078125, jnp.bfloat16))
    assert weight.tail_index.shape == (0,)
    weight = dataclasses.replace(weight, main=main)
    assert float(weight.dequantize()[0, 0]) == float(jax.jit(lambda w: w.dequantize())(weight)[0, 0]) == 15.125


def test_bits_are_those_of_the_bytes():
    """Of a weight without padding: 2.5625 for 2 bits, and as much again for the low digits of 4-bit strips."""
    assert Shape(1, 64, 1024, four_bit_strips=0).abstract("float32")["weight"].bits_per_weight == 2.5625
    weight = Shape(1, 64, 4096, four_bit_strips=32).make("float32", jax.random.key(0))["weight"]
    assert weight.nbytes == sum(x.nbytes for x in jax.tree.leaves(weight))
    assert weight.bits_per_weight == 2.5625 * (1 + 32 / 256) + 32 * 32 / (64 * 4096)  # and the index
    assert Shape(1, 64, 1024, "int8").abstract("float32")["weight"].bits_per_weight == 8 + 32 / 1024
    assert Shape(1, 64, 1024, "int4").abstract("float32")["weight"].bits_per_weight == 4 + 16 / 128
    assert Shape(1, 64, 1024, "int2").abstract("float32")["weight"].bits_per_weight == 2 + 24 / 64


def test_layers_can_be_stacked_and_scanned():
    first, second = (Shape(1, 32, 32).make("float32", jax.random.key(i))["weight"] for i in (0, 1))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), first, second)
    _, each = jax.lax.scan(lambda carry, weight: (carry, weight.dequantize()), None, stacked)
    np.testing.assert_array_equal(each, jnp.stack([first.dequantize(), second.dequantize()]))
    with pytest.raises(ValueError, match=r"main.words of a weight \[K=32, N=32\] must have shape \(2, 256\), got"):
        stacked.check()
