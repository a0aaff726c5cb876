# SPDX-License-Identifier: Apache-2.0
"""Run Pallas kernels on the CPU, with their memory spaces, barriers and copies simulated and races looked for.

What the Mosaic GPU interpreter does not do is refused by it with NotImplementedError: cp.async, semaphores, inline
PTX. It does not notice a missing wait before or after wgmma; only a GPU does. A deadlock hangs for ever: mark such
tests `@pytest.mark.timeout(60, method="thread")`.
"""

import contextlib
import io
from collections.abc import Iterator

import jax


class RaceDetected(AssertionError):
    """Two accesses to one place in memory, at least one a write, that nothing orders."""


@contextlib.contextmanager
def mosaic_gpu(**options) -> Iterator[None]:
    """Kernels built inside run in the Mosaic GPU interpreter; `options` are InterpretGPUParams' own."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # the reset is not exported
    from jax.experimental.pallas import mosaic_gpu as plgpu

    params = plgpu.InterpretGPUParams(detect_races=True, **options)
    with _watching(gpu_callbacks.reset_gpu_interpret_mode_state), plgpu.force_gpu_interpret_mode(params):
        yield


@contextlib.contextmanager
def mosaic_tpu(**options) -> Iterator[None]:
    """Kernels built inside run in the Mosaic TPU interpreter; `options` are InterpretParams' own."""
    from jax.experimental.pallas import tpu as pltpu

    params = pltpu.InterpretParams(detect_races=True, **options)
    with _watching(pltpu.reset_tpu_interpret_mode_state), pltpu.force_tpu_interpret_mode(params):
        yield


@contextlib.contextmanager
def _watching(reset) -> Iterator[None]:
    """Turns a race into RaceDetected (jax 0.11 prints it, 0.12 raises it), and never leaves a broken state behind."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
            jax.effects_barrier()  # kernels are dispatched asynchronously
    except Exception as error:
        reset()
        if "RACE DETECTED" in str(error):
            raise RaceDetected(str(error)) from error
        raise
    print(printed.getvalue(), end="")
    if "RACE DETECTED" in printed.getvalue():
        reset()
        raise RaceDetected(printed.getvalue())
