# SPDX-License-Identifier: Apache-2.0
"""The kernel for NVIDIA GPUs: in the interpreter, and with `-m gpu` on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import explain, log_iv
from pallas_kernels.core import device
from pallas_kernels.log_bessel.mosaic_gpu import TILE
from tests import interpreters
from tests.log_bessel.accuracy import (
    V,
    X,
    assert_double_precision,
    assert_gradients,
    assert_single_precision,
)

pytestmark = [pytest.mark.timeout(300, method="thread"), pytest.mark.parametrize("name", ["i", "k"])]

# Tiles in which all need the same: sorted; and in which some need other things: not. The last tile is not whole.
ORDERS = {"mixed": np.arange(0, len(V), 3), "sorted": np.argsort(np.hypot(V, X))[::2]}


@pytest.fixture(autouse=True)
def doubles():
    """In every thread: the interpreter has some of its own."""
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def test_in_the_interpreter(name):
    order = {"i": "sorted", "k": "mixed"}[name]
    assert all(len(ORDERS[order]) % tile for tiles in TILE.values() for tile in tiles.values())
    with device.assume(device.H100), interpreters.mosaic_gpu():
        assert_double_precision(name, "mosaic_gpu", ORDERS[order])
        assert_single_precision(name, "mosaic_gpu", points=ORDERS[order])


def test_what_it_refuses(name):
    x = jnp.ones(3)
    with device.assume(device.H100):
        assert explain(log_iv, x, x)[0].implementation == "mosaic_gpu"
        (choice,) = explain(lambda x: log_iv(x, x, mode="paper"), x)
        assert (choice.implementation, "published method, which has no kernel" in str(choice.refusals)) == ("xla", True)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "xla"])
def test_on_a_gpu(name, implementation):
    assert_double_precision(name, implementation)
    assert_single_precision(name, implementation)
    assert_gradients(name, implementation)
