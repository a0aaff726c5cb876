# SPDX-License-Identifier: Apache-2.0
"""Every token of a global batch is somewhere, once, with its neighbors' positions and its target."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.hybrid.layout import Wave, arrays, idle, layouts, rounded, waves
from parallel.hybrid.plan import Unit, units_of
from parallel.hybrid.simulate import LLAMA_7B, MIXES, K, sample

MODEL = dataclasses.replace(LLAMA_7B, capacity=16)
DEVICES = 8


def planned(lengths):
    units = units_of(lengths, MODEL, DEVICES, offload=False)
    return waves([rounded(unit, lengths, MODEL) for unit in units], DEVICES)


@given(st.lists(st.integers(1, 128), min_size=1, max_size=30))
def test_every_token_is_there_once(lengths):
    numbers = np.cumsum([1, *lengths])
    documents = [np.arange(a, a + n, dtype=np.int32) for a, n in zip(numbers, lengths, strict=False)]
    seen = []
    for wave in planned(lengths):
        assert sum(wave.groups) == DEVICES
        assert all(a >= b for a, b in itertools.pairwise(wave.groups))
        held = arrays(wave, documents, MODEL.capacity)
        assert {x.shape for x in held.values()} == {(DEVICES, MODEL.capacity)}
        first = 0
        for group, unit in zip(wave.groups, wave.units, strict=True):
            rows = {name: x[first : first + group].ravel() for name, x in held.items()}
            for number, i in enumerate(() if unit is None else unit.sequences):
                mine = rows["segment_ids"] == number
                order = np.argsort(rows["positions"][mine])
                tokens, targets, weights = (rows[name][mine][order] for name in ("tokens", "targets", "weights"))
                n = lengths[i]
                np.testing.assert_array_equal(tokens[:n], documents[i])
                np.testing.assert_array_equal(targets[: n - 1], documents[i][1:])
                np.testing.assert_array_equal(weights, np.arange(len(tokens)) < n - 1)
                seen.append(i)
            if unit is None:
                assert not rows["weights"].any()
            first += group
    assert sorted(seen) == list(range(len(lengths)))


def test_devices_of_a_group_have_the_same_work():
    (wave,) = planned([128])
    held = arrays(wave, [np.arange(128, dtype=np.int32)], MODEL.capacity)
    assert wave.groups == (8,)
    work = (held["positions"] + 1).sum(1)
    assert work.max() == work.min()


def test_few_programs_and_little_idle_time():
    """Of the production mix up to 64K, on 64 devices of 8K: what runs at the same time takes as long."""
    lengths = sample(MIXES["production"], 16 * K * K, 64 * K)
    units = [rounded(unit, lengths, LLAMA_7B) for unit in units_of(lengths, LLAMA_7B, 64, offload=False)]
    found = waves(units, 64)
    assert idle(found, 64) < 0.1
    assert len(layouts(found)) <= 8
    in_order = waves([dataclasses.replace(unit, seconds=0.0) for unit in units], 64)
    timed = {unit.sequences: unit for unit in units}
    naive = [Wave(wave.groups, tuple(unit and timed[unit.sequences] for unit in wave.units)) for wave in in_order]
    assert idle(naive, 64) > 3 * idle(found, 64)


def test_bad_plans_are_named():
    with pytest.raises(ValueError, match="a unit of 3 devices is no power of two up to 8"):
        waves([Unit((0,), 3, 1.0)], 8)
    with pytest.raises(ValueError, match="groups of powers of two need as many devices, got 6"):
        waves([], 6)
    (wave,) = waves([Unit((0,), 1, 1.0)], 1)
    with pytest.raises(ValueError, match=r"documents of \[20\] tokens take 20 on 1 devices, which hold 16"):
        arrays(wave, [np.zeros(20, np.int32)], 16)
