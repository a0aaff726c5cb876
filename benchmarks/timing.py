# SPDX-License-Identifier: Apache-2.0
"""Timing of what JAX does not run, beside pallas_kernels/core/timing.py, whose names are here too.

"events" between CUDA events around each of many calls in a row: for whole programs of PyTorch
"cupti"  as JAX's own: the durations of kernels, whoever launches them
"""

import itertools
from collections.abc import Callable
from typing import Any

from pallas_kernels.core.timing import METHODS, Timing, copies, default_method, measure, repetitions, summarize

__all__ = [
    "METHODS",
    "Timing",
    "copies",
    "default_method",
    "measure",
    "measure_kernels",
    "measure_torch",
    "summarize",
]


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


def measure_kernels(function: Callable[[int], Any], *, copies: int, budget: float = 1.0) -> Timing:
    """Times the kernels that PyTorch launches for `function(i)`, i below `copies`, in turn: without what the host does
    between them, as `measure` times those of JAX."""
    import torch  # type: ignore[import-not-found]
    from jax.experimental.mosaic.gpu import profiler

    counters: Any = profiler.mosaic_gpu_lib._mosaic_gpu_ext  # type: ignore[attr-defined]

    def turn() -> float:
        counters._cupti_init()
        try:
            for i in range(copies):
                function(i)
            torch.cuda.synchronize()
        finally:
            kernels = counters._cupti_get_timings(False)
        if not kernels:
            raise RuntimeError("CUPTI saw no kernel run")
        return sum(milliseconds for _, milliseconds in kernels) / 1e3

    for i in range(copies):
        function(i)  # what is compiled at first use
    torch.cuda.synchronize()
    warm = turn()
    seconds = [turn() for _ in range(repetitions(budget, warm))]
    return summarize([one / copies for one in seconds], "cupti")
