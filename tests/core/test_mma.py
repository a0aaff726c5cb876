# SPDX-License-Identifier: Apache-2.0
"""What kernels for NVIDIA GPUs share, by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import device, mma
from tests import interpreters

NARROW = ("int8", "float8_e4m3fn", "float8_e5m2")


def assert_widens_exactly(narrow: str, wide: str) -> None:
    """All numbers of 8 bits there are, 16 times, as NumPy converts them."""
    x = np.arange(64 * 64).astype(np.uint8).view(jnp.dtype(narrow)).reshape(64, 64)
    layout = plgpu.Layout.MMA_ACC(jnp.dtype(wide))

    def kernel(x_gmem, out_gmem):
        mma.store(out_gmem, mma.widen(plgpu.load(x_gmem, layout=layout, optimized=False), wide))

    out = jax.jit(plgpu.kernel(kernel, out_type=jax.ShapeDtypeStruct(x.shape, wide)))(x)
    np.testing.assert_array_equal(np.float32(out), np.float32(x))


@pytest.mark.parametrize("on", [device.H100, device.A100], ids=["hopper", "ampere"])
@pytest.mark.parametrize("wide", ["bfloat16", "float16"])
@pytest.mark.parametrize("narrow", NARROW)
def test_widen(narrow, wide, on):
    with device.assume(on), interpreters.mosaic_gpu():
        assert_widens_exactly(narrow, wide)


@pytest.mark.gpu
@pytest.mark.parametrize("wide", ["bfloat16", "float16"])
@pytest.mark.parametrize("narrow", NARROW)
def test_widen_on_a_gpu(narrow, wide):
    assert_widens_exactly(narrow, wide)


@pytest.mark.parametrize(
    ("width", "itemsize", "expected"), [(128, 2, 128), (96, 2, 64), (48, 2, 32), (64, 1, 64), (96, 1, 32)]
)
def test_swizzle_bytes(width, itemsize, expected):
    assert mma.swizzle_bytes(width, itemsize) == expected
