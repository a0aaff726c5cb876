# SPDX-License-Identifier: Apache-2.0
"""The kernel for NVIDIA GPUs in the interpreter, with races looked for; its instructions on arrays (threads.py)."""

import dataclasses
import functools

import jax
import pytest

from pallas_kernels import quantized_matmul
from pallas_kernels.core import device
from pallas_kernels.quantized_matmul.config import MosaicGpuConfig
from pallas_kernels.quantized_matmul.reference import naively, specified
from pallas_kernels.quantized_matmul.shapes import Shape
from tests import conformance, interpreters
from tests.quantized_matmul import threads

HOPPER = dataclasses.replace(device.H100, num_cores=2)
AMPERE = dataclasses.replace(device.A100, num_cores=2)
pytestmark = pytest.mark.timeout(120, method="thread")

# What takes a path of its own: planes with and without low digits, missing rows, strips and steps that are not whole,
# zeros multiplied and taken out, codes of 4 and 8 bits with scales of groups and of outputs, each epilogue. Clusters
# read each other's shared memory by inline PTX, which is for a GPU: `pytest -m gpu` has them.
CASES = {
    "mixed": (Shape(8, 128, 512), MosaicGpuConfig(stages=2)),
    "mixed_few": (Shape(3, 80, 528, activation="silu", bias=True), MosaicGpuConfig(chunks=1, stages=3)),
    "mixed_wide": (Shape(16, 160, 272, activation="swiglu", four_bit_strips=0), MosaicGpuConfig(stages=1)),
    "mixed_centered": (Shape(24, 64, 256, four_bit_strips=16), MosaicGpuConfig(chunks=1, stages=2, centered=True)),
    "int4": (Shape(8, 128, 384, "int4", bias=True), MosaicGpuConfig(tiles=2, stages=3)),
    "int8": (Shape(5, 64, 192, "int8", activation="gelu", bias=True), MosaicGpuConfig(chunks=1, stages=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_hopper(name):
    shape, config = CASES[name]
    arguments = shape.make("bfloat16", jax.random.key(0))
    with device.assume(HOPPER), interpreters.mosaic_gpu(threads.STAND_INS):
        call = functools.partial(_call, config=config)
        conformance.assert_agrees(call, specified, naively, arguments, gradients=False)


def _call(arguments, config):
    return quantized_matmul(**arguments, implementation="mosaic_gpu", config=config)
