# SPDX-License-Identifier: Apache-2.0
"""Timing of what JAX does not run, beside pallas_kernels/core/timing.py, whose names are here too.

"events" between CUDA events around each of many calls in a row: for PyTorch, which CUPTI through JAX cannot time
"""

import itertools
from collections.abc import Callable
from typing import Any

from pallas_kernels.core.timing import METHODS, Timing, default_method, measure, repetitions, summarize

__all__ = ["METHODS", "Timing", "default_method", "measure", "measure_torch", "summarize"]


def measure_torch(function: Callable[[], Any], *, budget: float = 1.0) -> Timing:
    """Times a function of PyTorch on its current CUDA stream, warm. Calls are queued five at a time, so that what the
    host takes to launch one is hidden behind the one before.
    """
    import torch  # type: ignore[import-not-found]

    def batch(n: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        events[0].record()
        for event in events[1:]:
            function()
            event.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]

    warm = batch(3)
    seconds: list[float] = []
    while len(seconds) < repetitions(budget, warm[-1]):
        seconds += batch(6)[1:]  # the first of a batch waits for the host
    return summarize(seconds, "events")
