# SPDX-License-Identifier: Apache-2.0
"""The smoke kernels multiply matrices, as far as the interpreters can tell; tests/aot/run.py compiles them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import device
from tests import interpreters
from tests.aot.smoke import mosaic_gpu_sm80, mosaic_gpu_sm90, mosaic_tpu

pytestmark = pytest.mark.timeout(120, method="thread")  # a deadlock in an interpreter cannot be interrupted


def _check(matmul) -> None:
    """Integers this small, and their sums of products, are exact in bfloat16's 8 and float32's 24 bits."""
    rng = np.random.default_rng(0)
    a = rng.integers(-1, 2, (256, 256))
    b = rng.integers(-1, 2, (256, 128))
    expected = a @ b
    assert np.abs(expected).max() <= 256
    out = matmul(jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(out, np.int64), expected)


def test_mosaic_gpu_sm90():
    with interpreters.mosaic_gpu():
        _check(mosaic_gpu_sm90.matmul)


def test_mosaic_gpu_sm80():
    with pytest.raises(NotImplementedError, match="copy_gmem_to_smem without a barrier"), interpreters.mosaic_gpu():
        _check(mosaic_gpu_sm80.matmul)
    pytest.skip("the Mosaic GPU interpreter has no cp.async: compiled by `make test-aot`")


def test_mosaic_tpu():
    with interpreters.mosaic_tpu():
        _check(mosaic_tpu.matmul)


@pytest.mark.gpu
def test_mosaic_gpu_sm90_on_the_gpu():
    if device.current().arch != "sm90":
        pytest.skip(f"wgmma needs a Hopper GPU, this is {device.current()}")
    _check(mosaic_gpu_sm90.matmul)


def test_the_gpu_interpreter_finds_a_missing_fence():
    def kernel(x_gmem, out_gmem, smem):
        smem[...] = x_gmem[...]
        # Here a commit_smem() is missing.
        plgpu.copy_smem_to_gmem(smem, out_gmem)
        plgpu.wait_smem_to_gmem(0)

    x = jnp.ones((128,), jnp.float32)
    run = plgpu.kernel(kernel, out_type=x, scratch_types=[plgpu.SMEM(x.shape, x.dtype)])
    with pytest.raises(interpreters.RaceDetected), interpreters.mosaic_gpu():
        jax.block_until_ready(run(x))


def test_the_tpu_interpreter_finds_a_missing_wait():
    def kernel(x_ref, out_ref, semaphore):
        copy = pltpu.make_async_copy(x_ref, out_ref, semaphore)
        copy.start()
        out_ref[...] = jnp.zeros_like(out_ref)  # before the wait
        copy.wait()

    def run(x):
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM)],
            out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        )(x)

    with pytest.raises(interpreters.RaceDetected), interpreters.mosaic_tpu():
        jax.block_until_ready(run(jnp.ones((8, 128), jnp.float32)))
