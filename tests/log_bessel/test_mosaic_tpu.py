# SPDX-License-Identifier: Apache-2.0
"""The kernel for TPUs on a CPU. `make test-aot` compiles it for real ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import UnsupportedError, explain, log_iv, log_kv
from pallas_kernels.log_bessel.mosaic_tpu import GROUP
from tests import interpreters
from tests.log_bessel.accuracy import V, X, assert_single_precision

FUNCTIONS = {"i": log_iv, "k": log_kv}
pytestmark = [pytest.mark.timeout(300, method="thread"), pytest.mark.parametrize("name", FUNCTIONS)]


@pytest.mark.parametrize("order", ["mixed", "sorted"])
@pytest.mark.usefixtures("interpreted", "float64")
def test_numbers(name, order):
    """A group of registers votes: sorted, most need one thing."""
    points = np.argsort(np.hypot(V, X)) if order == "sorted" else slice(None)
    assert len(V) > GROUP * 128 or order == "mixed"
    assert_single_precision(name, "mosaic_tpu", points=points)


@pytest.mark.usefixtures("on_tpu")
def test_no_two_copies_race(name):
    v, x = (np.resize(a, 5000).astype(np.float32) for a in (V, X))
    with interpreters.mosaic_tpu():
        found = FUNCTIONS[name](v, x, implementation="mosaic_tpu")
    expected = FUNCTIONS[name](v, x, implementation="xla")
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.usefixtures("on_tpu")
def test_what_it_refuses(name):
    x = jnp.ones(3)
    assert explain(FUNCTIONS[name], x, x)[0].implementation == "mosaic_tpu"
    with (
        jax.enable_x64(True),
        pytest.raises(UnsupportedError, match="kernels on TPUs compute in float32, not in float64"),
    ):
        FUNCTIONS[name](1.0, np.ones(3), implementation="mosaic_tpu")
