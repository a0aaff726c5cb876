# SPDX-License-Identifier: Apache-2.0
"""Costs, groups and packing against the paper's figures and what any plan must keep."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.hybrid.balance import balanced, in_order
from parallel.hybrid.plan import KEPT, Unit, devices_of, fit, pack, units_of
from parallel.hybrid.simulate import LLAMA_7B, MIXES, K, compare, sample

# Milliseconds of attention and of the MLP at so many K tokens, figure 6a.
ATTENTION = {4: 0.8, 8: 1.8, 16: 4.8, 32: 14.1, 64: 48.2, 128: 175.5}
MLP = {4: 0.9, 8: 1.8, 16: 3.6, 32: 7.5, 64: 15.1, 128: 28.2}


def test_the_fit_is_the_papers_figure():
    seconds = {k: (ATTENTION[k] + MLP[k]) * 1e-3 for k in ATTENTION}
    quadratic, linear, constant = fit([k * K for k in seconds], list(seconds.values()))
    model = dataclasses.replace(LLAMA_7B, quadratic=quadratic, linear=linear, constant=constant)
    for k, measured in seconds.items():
        assert abs(model.layer_seconds(k * K) / measured - 1) < 0.02
        assert abs(LLAMA_7B.layer_seconds(k * K) / measured - 1) < 0.02
    with pytest.raises(ValueError, match="needs three lengths that differ and times above 0"):
        fit([1, 1, 2], [1.0, 1.0, 1.0])


def test_offload_saves_devices_where_it_costs_no_time():
    model = dataclasses.replace(LLAMA_7B, host_link=1e15, host_bytes=math.inf)  # everything may go
    l, C = model.layers, model.capacity
    assert devices_of(2048 * K, model, 512) == (1.0, math.ceil(KEPT * 2048 * K / (l * C)))  # 16 for 256
    never = dataclasses.replace(model, host_link=1e-3)
    assert devices_of(2048 * K, never, 512) == (0.0, 256)
    assert devices_of(300 * K, dataclasses.replace(model, host_bytes=0.0), 512) == (0.0, 38)
    assert devices_of(8 * K, model, 512) == (0.0, 1)
    # A longer one has more time to hide its copies: the share of devices that it saves does not shrink.
    shares = [devices_of(k * K, LLAMA_7B, 512)[1] * C / (k * K) for k in (64, 256, 1024, 2048)]
    assert all(a >= b for a, b in itertools.pairwise(shares))
    for k in (64, 256, 1024, 2048):
        ratio, devices = devices_of(k * K, LLAMA_7B, 512)
        # What stays fits the devices; what goes fits the time of a layer, and the host.
        assert (KEPT + (1 - ratio) * (l - KEPT)) * k * K <= devices * l * C * (1 + 1e-9)
        sent = ratio * LLAMA_7B.activation_bytes * k * K
        assert sent / LLAMA_7B.host_link <= LLAMA_7B.layer_seconds(k * K) * (1 + 1e-9)
        assert sent * (l - KEPT) / devices <= LLAMA_7B.host_bytes


def test_a_sequence_that_fits_nowhere_is_named():
    with pytest.raises(ValueError, match="of 2097152 tokens needs 256 devices of 8192 tokens, and there are 64"):
        units_of([100, 2048 * K], LLAMA_7B, 64, offload=False)
    with pytest.raises(ValueError, match="CostModel: capacity must be above 0, got 0"):
        dataclasses.replace(LLAMA_7B, capacity=0)


@given(st.lists(st.integers(1, 100), max_size=60))
def test_bins_hold_everything_once(lengths):
    bins = pack(lengths, 100)
    assert sorted(i for packed in bins for i in packed) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in packed) for packed in bins]
    assert max(filled, default=0) <= 100
    # Of any two bins the contents do not fit one: there are fewer than twice as many as needed.
    assert len(bins) <= max(1, 2 * math.ceil(sum(lengths) / 100)) or not lengths


WORKS = st.lists(st.tuples(st.integers(1, 8), st.floats(0.1, 10)), min_size=1, max_size=40)


@given(WORKS, st.sampled_from([in_order, balanced]))
def test_schedules_are_possible(works, schedule):
    """Each unit once, on as many devices as it wants; no device does two things; nobody waits for what comes later."""
    units = [Unit((i,), devices, seconds) for i, (devices, seconds) in enumerate(works)]
    found = schedule(units, 8)
    assert sorted(unit.sequences for unit in found.units) == [(i,) for i in range(len(units))]
    free = [0.0] * 8
    for unit, group, start in zip(found.units, found.devices, found.starts, strict=True):
        assert len(set(group)) == unit.devices
        assert start == max(free[device] for device in group)
        for device in group:
            free[device] = start + unit.seconds
    assert found.seconds == max(free)
    assert [len(found.of_device(device)) for device in range(8)] == found.micro_batches
    assert found.seconds >= max(found.busy)


@pytest.mark.parametrize("mix", MIXES)
def test_balance_is_close_to_the_mean(mix):
    """Where no sequence is longer than a step: within 5 % (the brief of the paper's algorithm has 2 to 5)."""
    lengths = sample(MIXES[mix], 8 * K * K, 64 * K, seed=1)
    units = units_of(lengths, LLAMA_7B, 64, offload=False)
    even, naive = balanced(units, 64), in_order(units, 64)
    mean = sum(even.busy) / 64
    assert even.seconds < 1.05 * mean
    assert naive.seconds > 1.3 * mean
    assert balanced(units, 64) == even  # every process has the same


def test_lengths_are_those_of_the_production_mix():
    """Section 6: nearly 80 % up to 4K; 0.05 % of 2M, which hold 12 % of tokens; 1 % from 128K, which hold 44 %."""
    lengths = np.asarray(sample(MIXES["production"], 2**30, 2048 * K))
    assert 0.78 < np.mean(lengths <= 4 * K) < 0.85
    for least, of_samples, of_tokens in ((0.9 * 128 * K, 0.0103, 0.443), (0.9 * 2048 * K, 0.0005, 0.121)):
        assert abs(np.mean(lengths >= least) / of_samples - 1) < 0.1
        assert abs(lengths[lengths >= least].sum() / lengths.sum() - of_tokens) < 0.005
    assert abs(lengths.sum() / 2**30 - 1) < 0.01


def test_each_of_the_papers_steps_helps():
    lengths = sample(MIXES["production"], 32 * K * K, 2048 * K)
    static, groups, _, balance = (step for step, _ in compare(lengths, LLAMA_7B, 2048 * K, 512))
    assert 480 < static.seconds < 600  # 8 min 40 s, by which the link is set
    assert static.seconds / groups.seconds > 1.59
    assert static.seconds / balance.seconds > 3.69
    assert balance.longest / balance.shortest < groups.longest / groups.shortest
