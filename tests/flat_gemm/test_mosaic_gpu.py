# SPDX-License-Identifier: Apache-2.0
"""The kernels for NVIDIA GPUs in the interpreter, with races looked for."""

import dataclasses
import functools
import re

import jax
import pytest

from pallas_kernels import UnsupportedError, flat_gemm
from pallas_kernels.core import device
from pallas_kernels.flat_gemm.config import MatrixConfig, VectorConfig
from pallas_kernels.flat_gemm.reference import naively, specified
from pallas_kernels.flat_gemm.shapes import Shape
from tests import conformance, interpreters

HOPPER = dataclasses.replace(device.H100, num_cores=2)
AMPERE = dataclasses.replace(device.A100, num_cores=2)
pytestmark = pytest.mark.timeout(120, method="thread")

ALL = ("bias", "residual")
# What takes a path of its own: both routes, both orientations, missing rows, strips and steps that are not whole, each
# epilogue, rows that are normalized. Clusters read each other's shared memory by inline PTX, which is for a GPU:
# `pytest -m gpu` has them.
CASES = {
    "vectors": (Shape(1, 192, 320), VectorConfig(32, 128, 3)),
    "vectors_swiglu": (
        Shape(3, 256, 192, activation="swiglu", extras=ALL, rms_norm_eps=1e-2),
        VectorConfig(16, 64, 4),
    ),
    "matrix": (Shape(8, 192, 320), MatrixConfig(64, 128, 3)),
    "matrix_wide": (Shape(16, 320, 192, activation="gelu", extras=("bias",)), MatrixConfig(128, 64, 3)),
    "matrix_columns": (
        Shape(8, 192, 320, transpose_w=False, activation="silu", extras=ALL),
        MatrixConfig(64, 128, 2),
    ),
    "matrix_few": (Shape(3, 128, 192, extras=ALL), MatrixConfig(64, 64, 3)),
    "matrix_ragged": (Shape(20, 128, 64, extras=("residual",)), MatrixConfig(64, 64, 2)),
    "matrix_swiglu": (
        Shape(8, 256, 192, activation="swiglu", extras=ALL, rms_norm_eps=1e-2),
        MatrixConfig(64, 64, 3),
    ),
    "matrix_normalized": (Shape(24, 128, 256, rms_norm_eps=1e-5), MatrixConfig(64, 128, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_hopper(name):
    shape, config = CASES[name]
    arguments = shape.make("bfloat16", jax.random.key(0))
    with device.assume(HOPPER), interpreters.mosaic_gpu():
        call = functools.partial(_call, config=config)
        conformance.assert_agrees(call, specified, naively, arguments, gradients=False)


def _call(arguments, config):
    return flat_gemm(**arguments, implementation="mosaic_gpu", config=config)


@pytest.mark.parametrize(
    ("shape", "dtype", "on", "why"),
    [
        (Shape(8, 128, 128), "float32", HOPPER, "its tensor-core products take bfloat16 and float16, not float32"),
        (Shape(257, 128, 128), "bfloat16", HOPPER, "M=257 rows; it takes 256"),
        (Shape(65, 128, 128), "bfloat16", AMPERE, "M=65 rows; it takes 64"),
        (Shape(8, 128, 96), "bfloat16", HOPPER, "K=96 and O=128 features; it takes multiples of 64 on sm90"),
        (Shape(8, 192, 128), "bfloat16", AMPERE, "K=128 and O=192 features; it takes multiples of 128 on sm80"),
        (Shape(72, 128, 128, rms_norm_eps=0.0), "bfloat16", HOPPER, "M=72 rows to normalize; it has registers for 64"),
        (Shape(8, 128, 128), "bfloat16", device.CPU, "it is for NVIDIA GPUs of Ampere, Ada and Hopper"),
    ],
)
def test_refusals(shape, dtype, on, why):
    with device.assume(on), pytest.raises(UnsupportedError) as error:
        flat_gemm(**shape.make(dtype, jax.random.key(0)), implementation="mosaic_gpu")
    assert why in str(error.value)


@pytest.mark.parametrize(
    ("shape", "config", "message"),
    [
        (Shape(1, 128, 128, transpose_w=False), VectorConfig(), "route A takes a weight [N, K] (transpose_w=True)"),
        (Shape(9, 128, 128), VectorConfig(), "route A takes 8 rows, got M=9"),
    ],
)
def test_configurations_that_do_not_fit(shape, config, message):
    with device.assume(HOPPER), pytest.raises(ValueError, match=re.escape(message)):
        _call(shape.make("bfloat16", jax.random.key(0)), config)
