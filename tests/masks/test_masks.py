# SPDX-License-Identifier: Apache-2.0
"""Masks against plain NumPy comparisons, their algebra against `&` and `|` of arrays, their tiles against counting."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import flash_attention, masks

B, N = 2, 2


def dense(mask, T, S):
    return np.broadcast_to(np.asarray(mask.as_array(T, S)), (B, N, T, S))


@pytest.mark.parametrize(("T", "S"), [(5, 5), (2, 5), (5, 2), (1, 7)])
def test_causal_is_aligned_bottom_right(T, S):
    np.testing.assert_array_equal(dense(masks.Causal(), T, S), np.broadcast_to(np.tri(T, S, S - T, bool), (B, N, T, S)))


@pytest.mark.parametrize(("left", "right"), [(0, 0), (2, 1), (None, 1), (3, None), (None, None)])
def test_window_bounds_both_sides(left, right):
    T, S = 6, 9
    i, j = np.arange(T)[:, None] + S - T, np.arange(S)[None, :]
    want = (True if left is None else j >= i - left) & (True if right is None else j <= i + right)
    np.testing.assert_array_equal(dense(masks.Window(left, right), T, S)[1, 1], np.broadcast_to(want, (T, S)))


def test_positions_replace_the_default():
    q, k = np.array([[7, 3, 9], [0, 1, 2]], np.int32), np.array([8, 0, 3, 2], np.int32)
    want = k[None, None, :] <= q[:, :, None]
    np.testing.assert_array_equal(dense(masks.Causal(jnp.asarray(q), jnp.asarray(k)), 3, 4)[:, 0], want)
    got = dense(masks.Window(2, 1, jnp.asarray(q), jnp.asarray(k)), 3, 4)[:, 0]
    np.testing.assert_array_equal(
        got, (k[None, None, :] >= q[:, :, None] - 2) & (k[None, None, :] <= q[:, :, None] + 1)
    )


def test_segments_lengths_and_dense():
    q, k = np.array([[1, 1, 2], [3, 4, 3]]), np.array([[1, 2, 2, 0], [3, 3, 4, 4]])
    got = dense(masks.Segments(jnp.asarray(q), jnp.asarray(k)), 3, 4)[:, 1]
    np.testing.assert_array_equal(got, q[:, :, None] == k[:, None, :])
    lengths = dense(masks.Lengths(jnp.asarray([0, 3])), 3, 4)[:, 0, 0]
    np.testing.assert_array_equal(lengths, [[False] * 4, [True, True, True, False]])
    per_head = np.random.default_rng(0).random((N, 3, 4)) < 0.5
    np.testing.assert_array_equal(dense(masks.Dense(jnp.asarray(per_head)), 3, 4)[0], per_head)


@st.composite
def random_masks(draw, T, S):
    """A mask composed of up to three others, and the same thing made of NumPy arrays."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    i, j = np.arange(T)[:, None] + S - T, np.arange(S)[None, :]
    q_ids, k_ids = (np.sort(random.integers(0, 4, (B, n))).astype(np.int32) for n in (T, S))
    q_pos, k_pos = random.permutation(T).astype(np.int32), random.permutation(S).astype(np.int32)
    lengths = random.integers(0, S + 1, B).astype(np.int32)
    array = random.random((N, T, S)) < 0.9
    array[:, : T // 2] = random.random() < 0.5
    left, right = (int(x) for x in random.integers(0, S, 2))
    choices = [
        (masks.Causal(), j <= i),
        (masks.Causal(jnp.asarray(q_pos), jnp.asarray(k_pos)), k_pos[None, :] <= q_pos[:, None]),
        (masks.Window(left, right), (j >= i - left) & (j <= i + right)),
        (masks.Window(left, None), j >= i - left),
        (masks.Segments(jnp.asarray(q_ids), jnp.asarray(k_ids)), (q_ids[:, :, None] == k_ids[:, None, :])[:, None]),
        (masks.Lengths(jnp.asarray(lengths)), (np.arange(S) < lengths[:, None])[:, None, None, :]),
        (masks.Dense(jnp.asarray(array)), array),
    ]
    picks = [choices[draw(st.integers(0, len(choices) - 1))] for _ in range(draw(st.integers(1, 3)))]
    signs = [draw(st.sampled_from([operator.and_, operator.or_])) for _ in picks[1:]]
    return functools.reduce(
        lambda a, b: (b[1](a[0], b[0][0]), b[1](a[1], b[0][1])), zip(picks[1:], signs, strict=True), picks[0]
    )


@st.composite
def cases(draw):
    T, S = draw(st.sampled_from([(9, 9), (7, 20), (20, 7), (1, 13)]))
    blocks = draw(st.sampled_from([(4, 4), (3, 8), (16, 2), (32, 32)]))
    mask, array = draw(random_masks(T, S))
    return mask, np.broadcast_to(array, (B, N, T, S)), T, S, *blocks


@given(cases())
def test_algebra_is_that_of_the_arrays(case):
    mask, array, T, S, *_ = case
    np.testing.assert_array_equal(dense(mask, T, S), array)


@given(cases())
def test_no_tile_claims_too_much(case):
    """A tile that is not live hides nothing visible; a full one shows nothing hidden: never the other way round."""
    mask, array, T, S, block_q, block_k = case
    live, full = mask.tiles(T, S, block_q, block_k)
    shape = (B, N, -(-T // block_q), -(-S // block_k))
    live, full = (np.broadcast_to(np.asarray(x), shape) for x in (live, full))
    for r in range(shape[2]):
        for c in range(shape[3]):
            tile = array[:, :, r * block_q : (r + 1) * block_q, c * block_k : (c + 1) * block_k]
            assert not np.any(tile.any((2, 3)) & ~live[:, :, r, c])
            assert not np.any(full[:, :, r, c] & ~tile.all((2, 3)))


def test_static_masks_are_sorted_while_tracing():
    tiles = (masks.Causal() & masks.Window(3, None)).tiles(64, 64, 16, 16)
    assert isinstance(tiles.live, np.ndarray)
    # Contiguous positions make the bounds exact: the 4 tiles of the diagonal and the 3 beside them.
    assert int(tiles.live.sum()) == 7


def test_masks_are_pytrees_with_static_bounds():
    mask = masks.Causal() & masks.Window(3, None) & masks.Lengths(jnp.asarray([2, 4]))
    out = jax.jit(lambda m: m.as_array(4, 5))(mask)
    np.testing.assert_array_equal(out, mask.as_array(4, 5))
    assert str(mask) == "Causal & Window(3, None) & Lengths"
    assert str((masks.Causal() | masks.Window(1, 1)) & masks.Causal()) == "(Causal | Window(1, 1)) & Causal"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: masks.Window(-1, 0), ValueError, r"mask.Window.left must be None \(unbounded\) or an integer >= 0"),
        (lambda: masks.Window(1.5, 0), ValueError, "got 1.5"),
        (lambda: bool(masks.Causal()), TypeError, "combine masks with & and |"),
        (lambda: masks.Causal() & np.ones((2, 2), bool), TypeError, "unsupported operand"),
    ],
)
def test_bad_masks_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (
            masks.Lengths(jnp.zeros(3, jnp.int32)),
            ValueError,
            r"mask.Lengths.key_lengths must have shape \[B\] with B=2",
        ),
        (masks.Lengths(jnp.zeros(2)), TypeError, "key_lengths must be an integer array, got float32"),
        (masks.Lengths([2, 3]), TypeError, r"got list; wrap it in jnp.asarray\(...\)."),
        (masks.Dense([[True]]), TypeError, "mask.Dense.array must be a boolean array, got list."),
        (
            masks.Segments(jnp.zeros((2, 4), jnp.int32), jnp.zeros((2, 4), jnp.int32)),
            ValueError,
            r"mask.Segments.key_ids must have shape \[B, S\] with B=2, S=6, got \(2, 4\)",
        ),
        (masks.Causal(jnp.zeros(5, jnp.int32)), ValueError, r"mask.Causal.query_positions must have shape \[T\]"),
        (masks.Dense(jnp.ones((4, 5), bool)), ValueError, r"mask.Dense.array must be broadcastable to \[B, N, T, S\]"),
        (np.ones((4, 6), np.float32), TypeError, "mask.Dense.array must be bool, got float32; an additive mask goes"),
        ("causal", TypeError, "mask must be a mask of pallas_kernels.masks, a boolean array or None, got str"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, error, message):
    query, key = jnp.zeros((2, 4, 2, 8)), jnp.zeros((2, 6, 2, 8))
    with pytest.raises(error, match=message):
        flash_attention(query, key, key, mask=mask)
