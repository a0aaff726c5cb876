# SPDX-License-Identifier: Apache-2.0
"""How long a jitted function takes on the device.

    "cupti"  the sum of the durations of its kernels, as the GPU's own counters report them: no launch gaps, no host
    "wall"   wall clock from the call until its results are there: on a CPU, and for whole programs

Whoever calls says which; nothing is replaced silently, and every row of results names its method.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

METHODS = ("cupti", "wall")
# Data read again sooner than this many bytes later may come from the cache: four times the L2 of an H100 (50 MB).
BEYOND_CACHE = 200 * 2**20


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call.

    Attributes:
      median: of all repetitions.
      spread: distance between the quartiles, as a fraction of the median.
      method: how it was measured.
    """

    median: float
    spread: float
    method: str


def default_method() -> str:
    """ "cupti" on NVIDIA GPUs, "wall" elsewhere."""
    return "cupti" if jax.default_backend() == "gpu" else "wall"


def summarize(seconds: Sequence[float], method: str) -> Timing:
    """Median and spread of repetitions."""
    low, median, high = np.percentile(np.asarray(seconds, np.float64), [25, 50, 75])
    return Timing(float(median), float((high - low) / median), method)


def measure(
    function: Callable,
    arguments: Sequence,
    *,
    method: str | None = None,
    budget: float = 1.0,
    rotate: bool = False,
) -> Timing:
    """Times `function(*arguments)`, compiled and warm.

    Args:
      function: jittable, or compiled already; all arguments are arrays or pytrees of them.
      arguments: its arguments.
      method: one of METHODS; None is `default_method()`.
      budget: about how many seconds to spend on repetitions: at least 5, at most 200 of them.
      rotate: call it on several copies of the arguments in turn, so that each call finds its data in the memory and
        not in the cache. For operations that are bound by memory. A compiled function cannot be rotated.

    Raises:
      RuntimeError: CUPTI is not there; says what to do.
    """
    method = default_method() if method is None else method
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    count_of_sets = copies(sum(leaf.nbytes for leaf in jax.tree.leaves(arguments))) if rotate else 1
    if isinstance(function, jax.stages.Compiled):
        if count_of_sets > 1:
            raise ValueError("a compiled function takes one set of arguments; rotate=True needs the function itself")
        compiled: Callable = function
    elif count_of_sets > 1:
        sets = [jax.tree.map(_copy, tuple(arguments)) for _ in range(count_of_sets)]
        once = jax.jit(function)  # traced once for all copies
        compiled = jax.jit(lambda *sets: [once(*one) for one in sets]).lower(*sets).compile()
        arguments = sets
    else:
        compiled = jax.jit(function).lower(*arguments).compile()
    _once(compiled, arguments)  # the first run also allocates
    count = repetitions(budget, _once(compiled, arguments))
    if method == "cupti":
        seconds = _cupti(compiled, arguments, count)
    else:
        seconds = [_once(compiled, arguments) for _ in range(count)]
    return summarize([one / count_of_sets for one in seconds], method)


def repetitions(budget: float, seconds: float) -> int:
    """How often to call what takes that many seconds."""
    return int(min(200, max(5, budget / seconds)))


def copies(nbytes: int) -> int:
    """How many sets of so many bytes no longer fit the cache together."""
    return max(1, min(64, math.ceil(BEYOND_CACHE / max(nbytes, 1))))


def _copy(x: Any) -> Any:
    """With the same order of axes in memory."""
    return jax.jit(jnp.copy, out_shardings=x.format)(x) if hasattr(x, "format") else x + 0


def _once(compiled: Callable, arguments: Sequence) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    return time.perf_counter() - start


def _cupti(compiled: Callable, arguments: Sequence, count: int) -> list[float]:
    """Seconds in kernels of each repetition. Five at a time: the results of one session are all alive at once."""
    from jax.experimental.mosaic.gpu import profiler

    session = profiler.Cupti(finalize=False).measure(compiled, iterations=5)
    seconds: list[float] = []
    while len(seconds) < count:
        milliseconds: Any = session(*arguments)[1]
        if milliseconds is None:
            raise RuntimeError('CUPTI saw no kernel run; measure wall clock instead: method="wall", --timing=wall')
        seconds += [elapsed / 1e3 for elapsed in milliseconds]
    return seconds
