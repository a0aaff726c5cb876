# SPDX-License-Identifier: Apache-2.0
"""The work list of persistent kernels: everything is done once, by whoever has the least to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import masks
from pallas_kernels.flash_attention import tiles
from pallas_kernels.flash_attention.mosaic_gpu import work

STATIC_MASKS = [None, masks.Causal(), masks.Causal() & masks.Window(left=100, right=0)]
sizes = st.integers(1, 700)


def planned(mask, T, S, *, B=2, N=4, num_sms=5, together=2, group=1, transpose=False):
    schedule = tiles.schedule(mask, T, S, 128, 64, transpose=transpose)
    return schedule, work.plan(schedule, B, N, num_sms, together, group)


def costs_of(schedule, B, N, group):
    live, mixed = (np.asarray(x) for x in (schedule.live, schedule.mixed))
    costs = np.where(live == 0, 3, 2 * live + mixed)
    return np.broadcast_to(costs, (B, N, live.shape[2])).reshape(B, N // group, group, -1).sum(2).ravel() + 1


@given(st.sampled_from(STATIC_MASKS), sizes, sizes, st.integers(1, 9), st.sampled_from([1, 2, 4]), st.booleans())
def test_every_item_is_dealt_once(mask, T, S, num_sms, group, transpose):
    schedule, plan = planned(mask, T, S, num_sms=num_sms, group=group, transpose=transpose)
    items = np.asarray(plan.items)
    dealt = np.sort(items[items != work.NO_ITEM])
    np.testing.assert_array_equal(dealt, np.arange(2 * (4 // group) * schedule.live.shape[2]))


@given(sizes, sizes, st.integers(1, 9), st.integers(1, 8))
def test_nobody_has_more_than_an_item_too_much(T, S, num_sms, together):
    """Dealt to the least loaded, nobody has more than the mean and an item."""
    schedule, plan = planned(masks.Causal(), T, S, num_sms=num_sms, together=together)
    costs = np.append(costs_of(schedule, 2, 4, 1), 0)  # NO_ITEM is -1, the last
    loads = costs[np.asarray(plan.items)].sum(0)
    if len(set(costs[:-1])) > 1:  # rows that all cost the same are dealt in order
        assert loads.max() <= costs.sum() / num_sms + costs.max()


def test_a_schedule_made_on_the_device_is_dealt_too():
    ids = jnp.asarray(np.repeat(np.arange(5), [10, 200, 31, 59, 100])[None], jnp.int32)
    mask = masks.Causal() & masks.Segments(ids, ids)
    items = np.asarray(jax.jit(lambda: planned(mask, 400, 400, B=1, group=2)[1].items)())
    assert sorted(items[items != work.NO_ITEM]) == list(range(2 * 4))


def test_mixed_tiles_weigh_more():
    """Rows in which a document ends have mixed tiles only; packed documents are dealt evenly all the same."""
    ends = np.cumsum([3000, 200, 5000, 900, 4100, 150, 3034])
    ids = jnp.asarray(np.searchsorted(ends, np.arange(2**14), side="right"), jnp.int32)
    schedule, plan = planned(masks.Causal() & masks.Segments(ids, ids), 2**14, 2**14, B=1, N=16, num_sms=132)
    costs = np.append(costs_of(schedule, 1, 16, 1), 0)
    loads = costs[np.asarray(plan.items)].sum(0)
    assert loads.max() <= 1.1 * costs.sum() / 132


@pytest.mark.parametrize("together", [1, 2, 16, 1000])
@pytest.mark.parametrize("longest_last", [False, True])
def test_what_the_device_deals_is_even(together, longest_last):
    """16 heads of four packed documents of 16k tokens, to an H100, which holds the keys of `together` heads."""
    rows = np.concatenate([np.arange(length) + 1 for length in (70, 3, 40, 15)])
    costs = np.tile(rows[::-1] if longest_last else rows, (16, 1))
    items = np.asarray(work._sorted(jnp.asarray(costs), 132, together))
    assert len(items) == -(-costs.size // 132)
    assert sorted(items[items != work.NO_ITEM]) == list(range(costs.size))
    loads = np.append(costs.ravel(), 0)[items].sum(0)  # NO_ITEM is -1, the last
    assert loads.max() <= 1.1 * costs.sum() / 132
    if together < 16:  # heads are worked on in their order
        heads = np.where(items == work.NO_ITEM, -1, items // len(rows))
        assert (heads.max(1)[:-2] < heads.max(1)[2:] + together).all()
        assert heads[0].max() < together


@pytest.mark.parametrize("mask", STATIC_MASKS, ids=str)
def test_numbers_that_kernels_take_for_constants_are(mask):
    schedule, plan = planned(mask, 500, 300)
    rows = np.asarray(plan.rows)
    for field, constant in enumerate(work._constants(schedule)):
        assert constant is None or (rows[..., field] == constant).all()
    assert (None in work._constants(schedule)) == (mask is not None)  # without a mask all rows are alike


def test_a_row_that_sees_nothing_has_one_hidden_tile():
    schedule, plan = planned(masks.Causal(), 400, 100)
    assert (np.asarray(schedule.live)[0, 0, :2] == 0).all()
    np.testing.assert_array_equal(np.asarray(plan.rows)[0, 0, 0], [1, 1, 0, 1, 1, 1])
