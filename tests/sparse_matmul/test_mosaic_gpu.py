# SPDX-License-Identifier: Apache-2.0
"""The kernels in the interpreter, with races looked for; their instructions on arrays (instructions.py)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Sparse24Weight, sparse_matmul
from pallas_kernels.core import device
from pallas_kernels.sparse_matmul.config import Sm80Config, Sm90Config
from pallas_kernels.sparse_matmul.reference import naively, specified
from pallas_kernels.sparse_matmul.shapes import Shape
from tests import conformance, interpreters
from tests.sparse_matmul.instructions import STAND_INS

HOPPER = dataclasses.replace(device.H100, num_cores=2)
pytestmark = pytest.mark.timeout(120, method="thread")

# What takes a path of its own: several tiles of a block, rows and outputs that fill none, a warpgroup without outputs,
# an odd number of steps, fewer steps than stages, each epilogue, each type.
CASES = {
    "tiles": (Shape(40, 256, 384, bias=True), "bfloat16", Sm90Config(rows=16, stages=2)),
    "odd": (Shape(100, 328, 264, activation="silu"), "float16", Sm90Config(rows=64, stages=3)),
    "few": (Shape(3, 72, 64, activation="gelu", bias=True), "bfloat16", Sm90Config(rows=8, warpgroups=3)),
    "one": (Shape(1, 64, 200), "bfloat16", Sm90Config(warpgroups=1)),
    "int8": (Shape(24, 128, 528, "int8", activation="gelu_exact", bias=True), "bfloat16", Sm90Config(24, 1, 3)),
    "two_tiles": (Shape(150, 320, 200, bias=True), "bfloat16", Sm90Config(rows=152, tiles=2)),
    "dense": (Shape(40, 200, 520, "int8", bias=True, sparse=False), "bfloat16", Sm90Config(rows=32)),
    "int8_few": (Shape(5, 136, 96, "int8"), "bfloat16", Sm90Config()),
}
# The kernel for Ampere, which runs on Hopper, too: the interpreter knows no copies but Hopper's.
WARPS = {
    "warps": (Shape(70, 256, 384, activation="silu", bias=True), "bfloat16", Sm80Config(64, 2, 3)),
    "warps_few": (Shape(3, 200, 100), "float16", Sm80Config(32, 2, 2)),
    "warps_int8": (Shape(40, 72, 528, "int8", activation="gelu", bias=True), "bfloat16", Sm80Config(64, 1, 4)),
}


def _call(arguments, config):
    return sparse_matmul(**arguments, implementation="mosaic_gpu", config=config)


@pytest.mark.parametrize("name", [*CASES, *WARPS])
def test_in_the_interpreter(name):
    shape, dtype, config = (CASES | WARPS)[name]
    arguments = shape.make(dtype, jax.random.key(0))
    with device.assume(HOPPER), interpreters.mosaic_gpu(STAND_INS):
        conformance.assert_agrees(lambda a: _call(a, config), specified, naively, arguments, gradients=False)


# The interpreter has no copies to a whole cluster.
CLUSTERS = {
    "cluster": (Shape(150, 640, 392, bias=True), "bfloat16", Sm90Config(rows=80, cluster=2)),
    "cluster_few": (
        Shape(9, 200, 264, "int8"),
        "float16",
        Sm90Config(rows=16, warpgroups=1, cluster=2),
    ),
    "cluster_two_tiles": (Shape(700, 1000, 1024), "bfloat16", Sm90Config(168, 2, 4, tiles=2, cluster=2)),
    "own": (Shape(300, 1024, 2048, activation="silu", bias=True), "bfloat16", None),
    "own_dense": (Shape(300, 1024, 2048, "int8", activation="gelu", sparse=False), "bfloat16", None),
    "own_int8": (Shape(300, 1024, 2048, "int8", activation="gelu_exact", bias=True), "bfloat16", None),
}


MORE_WARPS = {
    "warps_many": (Shape(300, 1024, 2048, activation="silu", bias=True), "bfloat16", Sm80Config(128, 2)),
    "warps_many_int8": (Shape(300, 1000, 2048, "int8", activation="gelu", bias=True), "float16", Sm80Config(128, 2)),
    "warps_one": (Shape(1, 328, 4096, bias=True), "bfloat16", Sm80Config(32)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CASES, *CLUSTERS, *WARPS, *MORE_WARPS])
def test_on_a_gpu(name):
    shape, dtype, config = (CASES | CLUSTERS | WARPS | MORE_WARPS)[name]
    arguments = shape.make(dtype, jax.random.key(0))
    conformance.assert_agrees(lambda a: _call(a, config), specified, naively, arguments, gradients=False)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [None, Sm80Config()], ids=["hopper", "warps"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_each_pattern_in_each_place_of_the_metadata(dtype, config):
    """Products of a unit matrix with weights whose groups have, in turn, each of the six patterns: the hardware's order
    of metadata, for each of its 1024 groups of a word of all threads, is that of `dequantize`."""
    patterns = np.array([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], np.uint8)
    K, N = 128, 128
    group, output = np.meshgrid(np.arange(K // 4), np.arange(N), indexing="ij")
    for shift in range(6):
        # Neighbors differ, along inputs and along outputs; values tell their place.
        places = patterns[(group + 5 * (output // 3) + output + shift) % 6].transpose(0, 2, 1).reshape(K // 2, N)
        values = 1 + (np.arange(K // 2)[:, None] * 53 + np.arange(N) * 29) % 120
        weight = Sparse24Weight.from_plain(jnp.asarray(values, dtype), jnp.asarray(places))
        scales = (jnp.float32(1), jnp.ones(N, jnp.float32)) if dtype == "int8" else None
        unit, out = jnp.eye(K, dtype=dtype), "bfloat16" if dtype == "int8" else dtype
        options = {"out_dtype": out, "implementation": "mosaic_gpu", "config": config}
        got = sparse_matmul(unit, weight, scales=scales, **options)
        expected = np.zeros((K // 4, 4, N))
        np.put_along_axis(expected, places.reshape(K // 4, 2, N).astype(int), values.reshape(K // 4, 2, N), 1)
        np.testing.assert_array_equal(np.asarray(got, np.float64), expected.reshape(K, N))
