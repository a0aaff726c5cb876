# SPDX-License-Identifier: Apache-2.0
"""Bad input of sparse_matmul is refused with what is wrong and what to do."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import UnsupportedError, explain, sparse_matmul
from pallas_kernels.core import device
from pallas_kernels.sparse_matmul.api import describe
from pallas_kernels.sparse_matmul.config import Sm80Config, Sm90Config, heuristic, rows_of, search_space
from pallas_kernels.sparse_matmul.shapes import SHAPES, Shape

FLOATING = SHAPES["bias_3"].make("float32", jax.random.key(0))
INTEGERS = SHAPES["int8_8"].make("float32", jax.random.key(0))


@pytest.mark.parametrize(
    ("arguments", "changed", "error", "message"),
    [
        (
            FLOATING,
            {"weight": jnp.zeros((68, 40))},
            TypeError,
            "must be a Sparse24Weight or a dense int8 array, got float32",
        ),
        (FLOATING, {"x": jnp.zeros((3, 64))}, ValueError, r"weight must have shape \[K, N\] with K=64"),
        (FLOATING, {"x": jnp.zeros((3, 68), jnp.bfloat16)}, TypeError, "x, weight must have one dtype"),
        (FLOATING, {"bias": jnp.zeros(41)}, ValueError, r"bias must have shape \[N\] with N=40"),
        (FLOATING, {"bias": jnp.zeros(40, jnp.bfloat16)}, TypeError, "bias must have the output's dtype, float32"),
        (FLOATING, {"activation": "relu"}, ValueError, "got 'relu'"),
        (FLOATING, {"scales": INTEGERS["scales"]}, ValueError, "scales are for weights of integers"),
        (FLOATING, {"out_dtype": "int8"}, TypeError, "out_dtype must be one of float32, bfloat16, float16, got int8"),
        (INTEGERS, {"scales": None}, ValueError, r"needs scales=\(of x \[\], of the weight's outputs \[N=64\]\)"),
        (INTEGERS, {"scales": INTEGERS["scales"][0]}, TypeError, "scales must be a pair"),
        (INTEGERS, {"scales": INTEGERS["scales"][::-1]}, ValueError, r"scales\[0\] must have shape"),
        (
            INTEGERS,
            {"x": jnp.zeros((8, 128), jnp.int8)},
            TypeError,
            "x is int8, which the output is not: say out_dtype",
        ),
        (FLOATING, {"config": Sm90Config()}, ValueError, '"xla" takes no config'),
    ],
)
def test_bad_arguments_are_named(arguments, changed, error, message):
    with pytest.raises(error, match=message):
        sparse_matmul(**arguments | changed)


def test_a_weight_of_other_arrays_is_named():
    weight = dataclasses.replace(FLOATING["weight"], metadata=FLOATING["weight"].metadata[:, :1])
    with pytest.raises(ValueError, match="sparse_matmul: weight: metadata of a weight"):
        sparse_matmul(**FLOATING | {"weight": weight})


@pytest.mark.parametrize(
    ("hardware", "shape", "expected"),
    [
        (device.H100, Shape(2048, 128, 256), "mosaic_gpu"),
        (device.A100, Shape(1024, 128, 256), "mosaic_gpu"),
        (device.A100, Shape(1025, 128, 256), "xla"),
        (device.A100, Shape(64, 128, 256, "int8"), "mosaic_gpu"),
        (device.A100, Shape(64, 128, 256, "int8", sparse=False), "xla"),
    ],
)
def test_auto(hardware, shape, expected):
    with device.assume(hardware):
        (choice,) = explain(sparse_matmul, **shape.make("bfloat16", jax.random.key(0)))[:1]
    assert choice.implementation == expected


def test_a_configuration_of_other_tiles_is_refused():
    arguments = Shape(64, 128, 256).make("bfloat16", jax.random.key(0))
    with device.assume(device.A100), pytest.raises(ValueError, match=r"takes an? Sm80Config, got Sm90Config"):
        sparse_matmul(**arguments, implementation="mosaic_gpu", config=Sm90Config())
    with pytest.raises(ValueError, match=r"Sm80Config.rows must be one of \(32, 64, 128\), got 48"):
        Sm80Config(rows=48)


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.large])
def test_the_choice_of_tiles_fits(name):
    """Every configuration worth measuring, of every shape that is measured."""
    call = describe(**SHAPES[name].abstract("bfloat16"))
    configs = list(search_space(call, device.H100, "mosaic_gpu"))
    assert heuristic(call, device.H100, "mosaic_gpu") == configs[0]
    for config in configs:
        assert rows_of(config.rows, config.cluster, call.sizes["M"], call.arguments[1].dtype) == config.rows


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (Shape(8, 64, 128), "float32", "it takes and gives 16-bit floats"),
        (Shape(8, 64, 128, "int4"), "bfloat16", "it has no products of 4 bits"),
        (Shape(8, 64, 128, activation="swiglu"), "bfloat16", "it has no swiglu yet"),
    ],
)
def test_the_kernel_says_what_it_does_not_take(shape, dtype, message):
    arguments = shape.make(dtype, jax.random.key(0))
    with device.assume(device.H100), pytest.raises(UnsupportedError, match=message):
        explain(lambda: sparse_matmul(**arguments, implementation="mosaic_gpu"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": 12}, "rows must be one of"),
        ({"cluster": 4}, "cluster must be"),
        ({"rows": 256, "tiles": 2}, "do not fit 240"),
        ({"rows": 200, "warpgroups": 3}, "do not fit 160"),
    ],
)
def test_bad_configurations_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Sm90Config(**fields)
