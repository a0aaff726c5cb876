# SPDX-License-Identifier: Apache-2.0
"""Weights there and back, and their order in memory against the PTX ISA's drawings (instructions.py)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import Sparse24Weight, prune_2_4, prune_4_8_pairs
from tests.sparse_matmul import instructions


def random_weight(seed: int, K: int, N: int, dtype: str, bits=None) -> jax.Array:
    """Dense, with the pattern; groups of fewer than two and of none are among it."""
    random = np.random.default_rng(seed)
    if dtype == "int8":
        w = jnp.asarray(random.integers(-8, 8, (K, N)) if bits else random.integers(-127, 128, (K, N)), jnp.int8)
    else:
        w = jnp.asarray(random.standard_normal((K, N)), dtype)
    w = jnp.where(random.random((K, N)) < 0.4, jnp.zeros((), w.dtype), w)
    return prune_4_8_pairs(w) if bits else prune_2_4(w)


kinds = st.sampled_from([("float32", None), ("bfloat16", None), ("float16", None), ("int8", None), ("int8", 4)])


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 140), kinds)
def test_there_and_back(seed, groups, N, kind):
    dtype, bits = kind
    w = random_weight(seed, groups * (8 if bits else 4), N, dtype, bits)
    weight = Sparse24Weight.from_dense(w, bits=bits)
    weight.check()
    weight.check_metadata()
    np.testing.assert_array_equal(weight.dequantize(), w)
    again = Sparse24Weight.from_plain(*weight.to_plain(), bits=bits)
    jax.tree.map(np.testing.assert_array_equal, again, weight)
    # Nothing is kept twice, and what is kept of a gradient is what lies at the same places.
    if bits is None and dtype != "int8":
        np.testing.assert_array_equal(dataclasses.replace(weight, values=weight.kept_of(w)).dequantize(), w)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_memory_is_in_the_order_of_fragments(dtype):
    """Products with a unit matrix give the dense weight back, each step of each block of 64 outputs."""
    w = random_weight(1, 200, 100, dtype)
    weight = Sparse24Weight.from_dense(w)
    values, metadata = np.asarray(weight.values), np.asarray(weight.metadata)
    inputs = 128 // values.dtype.itemsize
    sums, unit = np.zeros((64, inputs), np.int32 if dtype == "int8" else np.float32), np.eye(inputs, dtype=values.dtype)
    for block in range(2):
        steps = range(values.shape[1] // 2)
        words = metadata.shape[1] // len(steps)
        taken = [
            instructions.take(
                values[block, 2 * step : 2 * step + 2], metadata[block, words * step : words * step + words]
            )
            for step in steps
        ]
        dense = np.concatenate([instructions.products(sums, *kept, unit) for kept in taken], axis=1)
        padded = np.zeros((64, dense.shape[1]), dense.dtype)
        own = np.asarray(w).T[64 * block : 64 * block + 64].astype(dense.dtype)
        padded[: own.shape[0], : own.shape[1]] = own
        np.testing.assert_array_equal(dense, padded)


def test_metadata_is_as_published():
    """All 6 patterns in every place of a word, packed by the formula of the hardware's published layout."""
    patterns = np.array([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
    places = patterns[np.random.default_rng(0).integers(0, 6, (128, 32))]  # [N, G, 2]
    nibbles = (places[..., 0] | places[..., 1] << 2).astype(np.uint32)
    halves = (nibbles.reshape(128, 8, 4) << np.array([0, 4, 8, 12], np.uint32)).sum(-1).astype(np.uint32)
    thread = np.arange(128)
    quad, row = thread % 4, thread // 32 * 16 + thread % 32 // 4
    halves = halves.reshape(2, 64, 2, 4)
    expected = (halves[:, row, :, quad] | halves[:, row + 8, :, quad] << 16).transpose(1, 2, 0)
    plain = places.reshape(128, -1).T
    weight = Sparse24Weight.from_plain(jnp.ones(plain.shape, jnp.bfloat16), jnp.asarray(plain, jnp.uint8))
    np.testing.assert_array_equal(weight.metadata, expected)


@pytest.mark.parametrize(
    ("dtype", "bits", "ratio"), [("bfloat16", None, 0.5625), ("int8", None, 0.625), ("int8", 4, 0.625)]
)
def test_bytes(dtype, bits, ratio):
    weight = Sparse24Weight.from_dense(random_weight(0, 512, 128, dtype, bits), bits=bits)
    dense_bits = bits or 8 * jnp.dtype(dtype).itemsize
    assert weight.bits_per_weight == ratio * dense_bits
    assert weight.nbytes == weight.values.nbytes + weight.metadata.nbytes


def test_a_weight_that_is_not_2_4_is_refused_by_the_group():
    w = np.array(random_weight(0, 64, 5, "float32"))
    w[40:44, 3] = 1, 2, 0, 3
    with pytest.raises(
        ValueError, match=r"group 10 of output 3, inputs 40 to 43, has 3 nonzero inputs.*\[1.0, 2.0, 0.0, 3.0\]"
    ):
        Sparse24Weight.from_dense(jnp.asarray(w))
    with pytest.raises(ValueError, match=r"group 1 of output 0, inputs 8 to 15, has 3 nonzero pairs"):
        Sparse24Weight.from_dense(jnp.asarray([[0]] * 8 + [[1]] * 6 + [[0]] * 2, jnp.int8), bits=4)
    # The right pattern along the wrong axis.
    with pytest.raises(ValueError, match="its axis must be that of the inputs, 0"):
        Sparse24Weight.from_dense(prune_2_4(jax.random.normal(jax.random.key(0), (64, 64)), axis=1))


def test_damaged_metadata_is_refused_by_the_group():
    weight = Sparse24Weight.from_dense(random_weight(0, 64, 64, "bfloat16"))
    word = int(weight.metadata[0, 0, 5])  # outputs 1 and 9, inputs 16 to 31
    damaged = dataclasses.replace(weight, metadata=weight.metadata.at[0, 0, 5].set(jnp.uint32(word & ~0xF0 | 0x50)))
    with pytest.raises(ValueError, match=r"group 5 of output 1 keeps places \[1, 1\].*metadata is damaged"):
        damaged.check_metadata()
    with pytest.raises(ValueError, match=r"group 0 of output 1 keeps places \[2, 1\]"):
        Sparse24Weight.from_plain(jnp.ones((2, 2)), jnp.asarray([[0, 2], [1, 1]], jnp.uint8))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Sparse24Weight.from_dense(jnp.zeros((6, 4))), ValueError, "K=6 inputs.*pad with zeros to 8"),
        (lambda: Sparse24Weight.from_dense(jnp.zeros((4, 4), jnp.int8), bits=4), ValueError, "K=4 inputs.*zeros to 8"),
        (lambda: Sparse24Weight.from_dense(jnp.zeros(8)), ValueError, r"w must be \[K, N\], got shape \(8,\)"),
        (lambda: Sparse24Weight.from_dense(jnp.zeros((8, 4), jnp.int32)), TypeError, "got int32"),
        (lambda: Sparse24Weight.from_dense(jnp.zeros((8, 4)), bits=4), TypeError, "must be of integers, got float32"),
        (
            lambda: Sparse24Weight.from_dense(jnp.full((8, 4), 8, jnp.int8), bits=4),
            ValueError,
            "from -8 to 7, got 8 to 8",
        ),
        (lambda: Sparse24Weight.from_dense(jnp.zeros((8, 4)), bits=2), ValueError, "bits must be None or 4, got 2"),
        (
            lambda: Sparse24Weight.from_plain(jnp.zeros((4, 4)), jnp.zeros((2, 4))),
            ValueError,
            r"got \(4, 4\) and \(2, 4\)",
        ),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_weight_of_other_shapes_is_refused():
    weight = Sparse24Weight.from_dense(random_weight(0, 64, 64, "bfloat16"))
    with pytest.raises(
        ValueError, match=r"values of a weight \[K=64, N=64\] in bfloat16 must have shape \(1, 2, 128, 8\)"
    ):
        dataclasses.replace(weight, values=weight.values[:, :1]).check()
    with pytest.raises(TypeError, match="metadata must be uint32, got int32"):
        dataclasses.replace(weight, metadata=weight.metadata.astype(jnp.int32)).check()
