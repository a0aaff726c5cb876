# SPDX-License-Identifier: Apache-2.0
"""Which weights stay, against a search over all patterns."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import prune_2_4, prune_4_8_pairs

PATTERNS = list(itertools.combinations(range(4), 2))
# Small integers, so that many are equal.
weights = hnp.arrays(
    np.int8, st.tuples(st.integers(1, 4).map(lambda n: 8 * n), st.integers(1, 3)), elements=st.integers(-9, 9)
)


def best(score: np.ndarray) -> tuple[int, int]:
    """The pattern of the largest sum of four; of equal ones the first, which keeps the lower indices."""
    return max(PATTERNS, key=lambda pattern: (score[list(pattern)].sum(), [-i for i in pattern]))


@settings(deadline=None)
@given(weights)
def test_two_of_four_are_those_of_the_best_pattern(w):
    expected = np.zeros_like(w)
    for group, n in itertools.product(range(len(w) // 4), range(w.shape[1])):
        for i in best(np.abs(w[4 * group : 4 * group + 4, n].astype(int))):
            expected[4 * group + i, n] = w[4 * group + i, n]
    np.testing.assert_array_equal(prune_2_4(jnp.asarray(w)), expected)


@settings(deadline=None)
@given(weights)
def test_two_of_four_pairs_are_those_of_the_best_pattern(w):
    expected = np.zeros_like(w)
    for group, n in itertools.product(range(len(w) // 8), range(w.shape[1])):
        pairs = np.abs(w[8 * group : 8 * group + 8, n].astype(int)).reshape(4, 2).sum(1)
        for i in best(pairs):
            place = slice(8 * group + 2 * i, 8 * group + 2 * i + 2)
            expected[place, n] = w[place, n]
    np.testing.assert_array_equal(prune_4_8_pairs(jnp.asarray(w)), expected)


def test_the_axis_is_that_of_the_groups():
    w = jnp.asarray([[1.0, 2.0, 3.0, 4.0], [4.0, -3.0, 2.0, 1.0], [0.0, 0.0, -9.0, 9.0], [7.0, 7.0, 7.0, 7.0]])
    along_rows = [[0, 0, 3, 4], [4, -3, 0, 0], [0, 0, -9, 9], [7, 7, 0, 0]]
    np.testing.assert_array_equal(prune_2_4(w, axis=1), along_rows)
    np.testing.assert_array_equal(prune_2_4(w, axis=-1), along_rows)
    np.testing.assert_array_equal(prune_2_4(w.T, axis=0), np.transpose(along_rows))
    np.testing.assert_array_equal(jax.jit(jax.vmap(prune_2_4, in_axes=0))(w), along_rows)


def test_norms_of_inputs_weigh_magnitudes():
    w = jnp.asarray([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, -128.0]], jnp.bfloat16)
    pruned = prune_2_4(w, activation_norm=jnp.asarray([100.0, 1.0, 1.0, 1.0]))
    np.testing.assert_array_equal(pruned.astype(jnp.float32), [[1, 1], [0, 0], [0, 0], [4, -128]])
    # The most negative integer is the largest.
    np.testing.assert_array_equal(prune_2_4(jnp.asarray([-128, 127, 127, 1], jnp.int8)), [-128, 127, 0, 0])


@pytest.mark.parametrize("prune", [prune_2_4, prune_4_8_pairs])
def test_bad_arguments_are_named(prune):
    with pytest.raises(ValueError, match=r"axis=2 is not one of w, which has shape \(8, 8\)"):
        prune(jnp.zeros((8, 8)), axis=2)
    with pytest.raises(ValueError, match=r"axis 1 of w has 6 entries.*pad it with zeros to 8"):
        prune(jnp.zeros((8, 6)), axis=1)
    with pytest.raises(TypeError, match="got bool"):
        prune(jnp.zeros((8, 8), bool))


def test_norms_must_fit():
    with pytest.raises(ValueError, match=r"activation_norm must have shape \[8\].*axis 0, got \(4,\)"):
        prune_2_4(jnp.zeros((8, 4)), activation_norm=jnp.ones(4))


def test_integers_of_4_bits_are_pruned_too():
    w = jnp.asarray([[1], [-8], [7], [0]], jnp.int4)
    assert prune_2_4(w)[:, 0].tolist() == [0, -8, 7, 0]


def test_what_is_not_a_number_stays_among_two_of_four():
    w = jnp.asarray([[jnp.nan], [3.0], [jnp.nan], [jnp.nan]])
    kept = np.asarray(prune_2_4(w))[:, 0]
    assert np.isnan(kept).tolist() == [True, False, True, False]
    assert kept[[1, 3]].tolist() == [0, 0]
