# SPDX-License-Identifier: Apache-2.0
"""Settings that every test shares.

Tests run on the CPU, which JAX is told to present as eight devices, so that meshes and collectives are real.
`pytest -m gpu` is the exception: it leaves the platform alone and needs a CUDA device.
"""

import functools
import os
import re
from collections import Counter

import hypothesis
import pytest

os.environ.setdefault("MPLBACKEND", "Agg")  # plots are written to files; no test opens a window

SIMULATED_DEVICES = 8


def _on_gpu(config: pytest.Config) -> bool:
    """Whether this run asked for GPU tests (`-m gpu`, but not `-m "not gpu"`)."""
    return re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr") or "") is not None


def pytest_configure(config: pytest.Config) -> None:
    import jax

    if _on_gpu(config):
        if jax.default_backend() != "gpu":
            raise pytest.UsageError(f"-m gpu needs a CUDA device, but JAX runs on {jax.default_backend()!r}")
    else:
        # The variables are for programs that tests start, too; those get one CPU device unless they ask for more.
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")
        # Most tests compile for longer than they run.
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        jax.config.update("jax_disable_most_optimizations", True)
        jax.config.update("jax_num_cpu_devices", SIMULATED_DEVICES)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from tests.conformance import Suite

    on_gpu = _on_gpu(config)
    for item in items:
        # The conformance suites are for every device: `-m gpu` runs them on the GPU as they run on the CPU.
        if on_gpu and isinstance(item, pytest.Function) and issubclass(item.cls or object, Suite) and item.cls.on_gpu:
            item.add_marker(pytest.mark.gpu)
        if not on_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: run `pytest -m gpu` on one"))


# Examples vary from run to run at a desk, which finds more; on a build machine a failure is the commit's own.
# No deadline: the first example of a shape pays for its compilation. The fixtures here hold no state.
hypothesis.settings.register_profile(
    "desk",
    deadline=None,
    max_examples=25,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.register_profile(
    "build-machine", hypothesis.settings.get_profile("desk"), derandomize=True, database=None
)
hypothesis.settings.load_profile("build-machine" if os.environ.get("CI") else "desk")


@pytest.fixture
def on_tpu():
    """Dispatch believes in a TPU."""
    from pallas_kernels.core import device

    with device.assume(device.TPU_V5E):
        yield


@pytest.fixture
def interpreted(on_tpu, monkeypatch):
    """Kernels for TPUs become XLA programs, grid steps a loop."""
    from jax.experimental import pallas as pl

    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


@pytest.fixture
def float64():
    """Runs the test with 64-bit types enabled, in this test only."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """64-bit types left enabled would silently raise the precision of every later test of the process."""
    import jax

    if jax.config.jax_enable_x64:
        jax.config.update("jax_enable_x64", False)
        pytest.fail(f"{item.nodeid} left jax_enable_x64 on; use the `float64` fixture", pytrace=False)


def pytest_terminal_summary(terminalreporter) -> None:
    """Counts skips by reason, so that a hole in the coverage shows as a number."""
    skipped = [report.longrepr for report in terminalreporter.stats.get("skipped", [])]  # (file, line, reason)
    reasons = Counter(reason.removeprefix("Skipped: ") for _, _, reason in skipped)
    if reasons:
        terminalreporter.section(f"{reasons.total()} skipped, by reason")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count:5d}  {reason}")
