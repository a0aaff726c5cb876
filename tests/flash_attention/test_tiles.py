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
