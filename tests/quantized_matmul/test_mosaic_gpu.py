# SPDX-License-Identifier: Apache-2.0
"""The kernel for NVIDIA GPUs in the interpreter, with races looked for; its instructions on arrays (threads.py)."""

import dataclasses
import functools

import jax
import pytest

from pallas_kernels import UnsupportedError, quantized_matmul
from pallas_kernels.core import device
from pallas_kernels.quantized_matmul import config as config_lib
from pallas_kernels.quantized_matmul.api import describe
from pallas_kernels.quantized_matmul.config import MosaicGpuConfig, Sm90Config
from pallas_kernels.quantized_matmul.reference import naively, specified
from pallas_kernels.quantized_matmul.shapes import Shape
from tests import conformance, interpreters
from tests.quantized_matmul import threads

HOPPER = dataclasses.replace(device.H100, num_cores=2)
AMPERE = dataclasses.replace(device.A100, num_cores=2)
pytestmark = pytest.mark.timeout(120, method="thread")

# What takes a path of its own: planes with and without low digits, missing rows, strips and steps that are not whole,
# many rows, codes of 4 and 8 bits with scales of groups and of outputs, each epilogue. Clusters
# read each other's shared memory by inline PTX, which is for a GPU: `pytest -m gpu` has them.
CASES = {
    "mixed": (Shape(8, 128, 512), MosaicGpuConfig(stages=2)),
    "mixed_few": (Shape(3, 80, 528, activation="silu", bias=True), MosaicGpuConfig(stages=3)),
    "scales_ahead": (Shape(3, 80, 528), MosaicGpuConfig(stages=2, scales_ahead=True)),
    "scales_ahead_4": (Shape(8, 128, 400, "int4"), MosaicGpuConfig(tiles=2, stages=1, scales_ahead=True)),
    "mixed_wide": (Shape(16, 160, 272, activation="swiglu", four_bit_strips=0), MosaicGpuConfig(stages=1)),
    "mixed_many": (Shape(24, 64, 256, four_bit_strips=16), MosaicGpuConfig(stages=2)),
    "int4": (Shape(8, 128, 400, "int4", bias=True), MosaicGpuConfig(tiles=2, stages=3)),
    "int8": (Shape(5, 64, 192, "int8", activation="gelu", bias=True), MosaicGpuConfig(stages=2)),
    "wgmma": (Shape(16, 192, 528, bias=True), Sm90Config(warpgroups=2)),
    "wgmma_few": (Shape(3, 80, 512, activation="silu", four_bit_strips=0), Sm90Config(1, tiles=2, stages=3)),
    "wgmma_swiglu": (Shape(24, 256, 272, activation="swiglu", bias=True), Sm90Config(2)),
    "wgmma_int4": (Shape(8, 200, 400, "int4", bias=True), Sm90Config(2, tiles=2)),
    "wgmma_int8": (Shape(40, 64, 192, "int8", activation="gelu"), Sm90Config(1)),
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


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "config"),
    [
        *CASES.values(),
        (Shape(8, 192, 2048), MosaicGpuConfig(num_splits=4)),
        (Shape(1, 176, 2048), MosaicGpuConfig(shares=4)),
        (Shape(1, 176, 2048), MosaicGpuConfig(shares=4, num_splits=2, scales_ahead=True)),
        (Shape(8, 256, 768, activation="swiglu"), MosaicGpuConfig(stages=1, scales_ahead=True)),
        (Shape(4, 192, 2000, activation="swiglu", bias=True), MosaicGpuConfig(shares=2)),
        (Shape(2, 72, 1040, "int4", bias=True), MosaicGpuConfig(shares=4, num_splits=2)),
        (Shape(3, 40, 528, "int8"), MosaicGpuConfig(shares=2)),
        (Shape(1, 128, 1024, "int4"), MosaicGpuConfig(num_splits=3)),
        (Shape(40, 256, 768, activation="swiglu"), MosaicGpuConfig(num_splits=2, stages=2)),
        (Shape(16, 192, 2048, bias=True), Sm90Config(3, stages=3, num_splits=2)),
        (Shape(64, 512, 1040, activation="swiglu", bias=True), Sm90Config(2, num_splits=2)),
        (Shape(33, 200, 528, "int4", bias=True), Sm90Config(4, num_splits=3)),
        (Shape(48, 640, 1024, "int8", activation="gelu"), Sm90Config(1, tiles=2, num_splits=2)),
        (Shape(64, 320, 4096), Sm90Config(3, stages=3, num_splits=5)),
    ],
    ids=str,
)
def test_on_a_gpu(shape, config):
    arguments = shape.make("bfloat16", jax.random.key(0))
    call = functools.partial(_call, config=config)
    conformance.assert_agrees(call, specified, naively, arguments, gradients=False)


@pytest.mark.parametrize(
    ("shape", "dtype", "on", "why"),
    [
        (Shape(8, 128, 256), "float32", HOPPER, "it makes bfloat16 of weights, and x is float32; cast it"),
        (
            Shape(65, 128, 256),
            "bfloat16",
            HOPPER,
            "M=65 rows; it takes 64, and more are faster on weights decoded once",
        ),
        (Shape(8, 144, 256, activation="swiglu"), "bfloat16", HOPPER, "N=144 columns of gates and what they gate"),
        (Shape(8, 72, 264), "bfloat16", HOPPER, "K=264 features; it takes multiples of 16"),
        (Shape(8, 128, 256, "int2"), "bfloat16", HOPPER, 'it takes 2 bits as part of scheme="mixed_2_4" only'),
        (Shape(8, 128, 256, outliers=2), "bfloat16", HOPPER, "it does not add outliers"),
        (
            Shape(8, 128, 256, "int8", activation_bits=8),
            "bfloat16",
            HOPPER,
            "it multiplies in bfloat16, not in integers",
        ),
        (Shape(8, 128, 256), "bfloat16", device.CPU, "it is for NVIDIA GPUs of Ampere, Ada and Hopper"),
    ],
)
def test_refusals(shape, dtype, on, why):
    with device.assume(on), pytest.raises(UnsupportedError) as error:
        quantized_matmul(**shape.make(dtype, jax.random.key(0)), implementation="mosaic_gpu")
    assert why in str(error.value)


def test_ampere_has_no_clusters():
    with device.assume(AMPERE), pytest.raises(ValueError, match="num_splits takes the clusters of Hopper"):
        _call(Shape(8, 64, 256).make("bfloat16", jax.random.key(0)), MosaicGpuConfig(num_splits=2))


def test_ampere_has_no_wgmma():
    arguments = Shape(8, 64, 256).make("bfloat16", jax.random.key(0))
    with device.assume(AMPERE), pytest.raises(ValueError, match="takes a MosaicGpuConfig, got Sm90Config"):
        _call(arguments, Sm90Config())


@pytest.mark.parametrize(("rows", "on"), [(8, device.H100), (9, device.H100), (64, device.H100), (64, device.A100)])
def test_stored_configurations_are_of_the_kind_that_runs(rows, on):
    """What `autotune` stores is read as the first kind."""
    call = describe(**Shape(rows, 4096, 4096).abstract("bfloat16"))
    (kind, *_) = config_lib.kinds(call, on, "mosaic_gpu")
    assert {type(config) for config in config_lib.search_space(call, on, "mosaic_gpu")} == {kind}
    assert type(config_lib.heuristic(call, on, "mosaic_gpu")) is kind
