# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import masks
from pallas_kernels.flash_attention import tiles
from tests.masks.test_masks import B, N, cases


@given(cases())
def test_no_live_tile_is_dropped_and_counts_add_up(case):
    mask, array, T, S, block_q, block_k = case
    work = tiles.work_list(mask, T, S, block_q, block_k)
    visited = {(int(r), int(c)) for r, c in zip(work.rows[: work.count], work.cols[: work.count], strict=True)}
    assert len(visited) == int(work.count)
    for _, _, t, s in np.argwhere(array):
        assert (t // block_q, s // block_k) in visited
    total = tiles.count(mask, T, S, block_q, block_k, B=B, N=N)
    assert sum(total.values()) == B * N * -(-T // block_q) * -(-S // block_k)


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([16, 64, 100]), st.sampled_from([16, 64, 100]))
def test_causal_counts_are_the_closed_form(T, S, block_q, block_k):
    """A tile is live when its first column is at most its last row's diagonal, full when the reverse holds."""
    counts = tiles.count(masks.Causal(), T, S, block_q, block_k)
    live = full = 0
    for r in range(0, T, block_q):
        for c in range(0, S, block_k):
            last_row, last_col = min(r + block_q, T) - 1, min(c + block_k, S) - 1
            live += c <= last_row + S - T
            full += last_col <= r + S - T
    assert counts == {
        "empty": -(-T // block_q) * -(-S // block_k) - live,
        "mixed": live - full,
        "full": full,
    }


def test_static_masks_give_known_trip_counts():
    work = tiles.work_list(masks.Causal(), 256, 256, 64, 64)
    assert work.count == 10
    assert list(work.rows[:3]) == [0, 1, 1]
    assert list(work.cols[:3]) == [0, 0, 1]


def test_masks_with_arrays_are_sorted_on_the_device():
    ids = jnp.asarray([[0] * 64 + [1] * 64 + [2] * 128])
    work = jax.jit(lambda ids: tiles.work_list(masks.Segments(ids, ids), 256, 256, 64, 64))(ids)
    assert int(work.count) == 1 + 1 + 4


def test_no_mask_is_full_everywhere():
    assert tiles.count(None, 100, 50, 32, 32) == {"empty": 0, "mixed": 0, "full": 8}


@given(cases(), st.booleans(), st.booleans())
def test_schedule_visits_every_live_tile_once_and_mixed_ones_first(case, transpose, mix_tail):
    mask, _, T, S, block_q, block_k = case
    plan = tiles.schedule(mask, T, S, block_q, block_k, transpose=transpose, mix_tail=mix_tail)
    classes = np.asarray(tiles.classify(mask, T, S, block_q, block_k)).copy()
    if mix_tail and S % block_k:
        classes[..., -1] = np.minimum(classes[..., -1], tiles.MIXED)
    if transpose:
        classes = classes.swapaxes(2, 3)
    for b, n, row in np.ndindex(classes.shape[:3]):
        live, mixed = int(plan.live[b, n, row]), int(plan.mixed[b, n, row])
        runs = () if plan.runs is None else plan.runs[row]
        order = () if plan.order is None else np.asarray(plan.order)[b, n, row]
        visited = [int(plan.column(step, runs, order.__getitem__)) for step in range(live)]
        seen = classes[b, n, row]
        assert sorted(visited) == sorted(np.flatnonzero(seen != tiles.EMPTY).tolist())
        assert all(seen[c] == tiles.MIXED for c in visited[:mixed])
        assert all(seen[c] == tiles.FULL for c in visited[mixed:])


def test_static_masks_need_four_numbers_a_row():
    """So that the schedule of a causal mask is not quadratic in T."""
    plan = tiles.schedule(masks.Causal() & masks.Window(1000, 0), 4096, 4096, 128, 128)
    assert plan.order is None
    assert plan.runs is not None
    assert plan.runs.shape == (32, 4)


@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([4, 8, 16, 64]),
    st.sampled_from([4, 8, 32, 64]),
    st.sampled_from([1, 4]),
)
def test_every_window_of_the_m_mask_is_the_slice_of_the_full_mask(T, S, block_q, block_k, align):
    """Ragged tails, T > S and shifts that are no multiple of the alignment included; also of tiles that are skipped."""
    window = np.asarray(tiles.m_mask(T, S, block_q, block_k, align))
    assert window.shape[0] <= 2 * max(block_q, block_k) + align
    T_padded, S_padded = T + -T % block_q, S + -S % block_k
    rows, cols = np.meshgrid(np.arange(0, T_padded, block_q), np.arange(0, S_padded, block_k), indexing="ij")
    starts = [np.asarray(x) for x in tiles.mask_window(rows, cols, T, S, block_q, block_k, align)]
    hidden = np.arange(S_padded)[None, :] > np.arange(T_padded)[:, None] + S - T
    for row, col, i, j in zip(*(x.ravel() for x in (rows, cols, *starts)), strict=True):
        assert i % align == 0
        assert j % align == 0
        seen = window[i : i + block_q, j : j + block_k]
        np.testing.assert_array_equal(seen, hidden[row : row + block_q, col : col + block_k])
