# SPDX-License-Identifier: Apache-2.0
"""The kernel for Hopper in the interpreter, with races looked for; its instructions on arrays (instructions.py)."""

import dataclasses

import jax
import pytest

from pallas_kernels import sparse_matmul
from pallas_kernels.core import device
from pallas_kernels.sparse_matmul.config import Sm90Config
from pallas_kernels.sparse_matmul.reference import naively, specified
from pallas_kernels.sparse_matmul.shapes import Shape
from tests import conformance, interpreters
from tests.sparse_matmul.instructions import STAND_INS

HOPPER = dataclasses.replace(device.H100, num_cores=2)
pytestmark = pytest.mark.timeout(120, method="thread")

# What takes a path of its own: several tiles of a block, rows and outputs that fill none, a warpgroup without outputs,
# steps that are not a multiple of those ahead, fewer steps than ahead, each epilogue, each type.
CASES = {
    "tiles": (Shape(40, 256, 384, bias=True), "bfloat16", Sm90Config(rows=16, stages=2, ahead=4)),
    "odd": (Shape(100, 328, 264, activation="silu"), "float16", Sm90Config(rows=64, stages=3)),
    "few": (Shape(3, 72, 64, activation="gelu", bias=True), "bfloat16", Sm90Config(rows=8, warpgroups=3, ahead=6)),
    "one": (Shape(1, 64, 200), "bfloat16", Sm90Config(warpgroups=1)),
    "int8": (Shape(24, 128, 528, "int8", activation="gelu", bias=True), "bfloat16", Sm90Config(24, 1, 3, 3)),
    "int8_few": (Shape(5, 136, 96, "int8"), "bfloat16", Sm90Config()),
}


def _call(arguments, config):
    return sparse_matmul(**arguments, implementation="mosaic_gpu", config=config)


@pytest.mark.parametrize("name", CASES)
def test_hopper(name):
    shape, dtype, config = CASES[name]
    arguments = shape.make(dtype, jax.random.key(0))
    with device.assume(HOPPER), interpreters.mosaic_gpu(STAND_INS):
        conformance.assert_agrees(lambda a: _call(a, config), specified, naively, arguments, gradients=False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CASES, "own"])
def test_on_a_gpu(name):
    """`own`: what the heuristic takes of a large call."""
    large = Shape(300, 1024, 2048, activation="silu", bias=True), "bfloat16", None
    shape, dtype, config = CASES.get(name, large)
    arguments = shape.make(dtype, jax.random.key(0))
    conformance.assert_agrees(lambda a: _call(a, config), specified, naively, arguments, gradients=False)
