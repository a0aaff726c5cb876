# SPDX-License-Identifier: Apache-2.0
"""Every implementation of sparse_matmul against the specification, and that against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels import Sparse24Weight, prune_2_4, sparse_matmul
from pallas_kernels.sparse_matmul.reference import naively, specified
from pallas_kernels.sparse_matmul.shapes import SHAPES, Shape
from tests import conformance


class TestSparseMatmul(conformance.Suite):
    function = staticmethod(pallas_kernels.sparse_matmul)
    shapes = SHAPES
    implementations = ("xla", "mosaic_gpu")
    probe = "int8_8"
    probe_dtypes = {"mosaic_gpu": "bfloat16"}  # noqa: RUF012
    slow_dtypes = frozenset({"float16"})

    def call(self, arguments, implementation):
        return sparse_matmul(**arguments, implementation=implementation)

    def reference(self, arguments):
        return specified(arguments)

    def naive(self, arguments):
        return naively(arguments)

    def changes(self, arguments):
        other = self.shapes[self.probe].make(arguments["x"].dtype, jax.random.key(9))["weight"]
        of_x, of_outputs = arguments["scales"]
        return {
            "x": arguments["x"] * 0.5,
            "weight": other,
            "bias": jnp.ones(other.shape[1], arguments["x"].dtype),
            "activation": "gelu",
            "scales": (of_x, 2 * of_outputs),
            "out_dtype": "float32" if arguments["x"].dtype != jnp.float32 else "bfloat16",
        }

    def sharded(self):
        """Rows over "data"; the weight is on every device."""
        arguments = Shape(8, 40, 80, activation="silu", bias=True).make("float32", jax.random.key(0))
        specs = {"x": P("data", None), "bias": P()}
        return arguments, {name: specs.get(name, P()) for name in sorted(arguments)}, P("data", None)


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if not shape.large])
def test_the_specification_is_numpy(name):
    """In float64, on what the weight was made of."""
    shape = SHAPES[name]
    arguments = shape.make("float32", jax.random.key(3))
    x, weight = np.asarray(arguments["x"], np.float64), arguments["weight"]
    w = np.asarray(weight.dequantize() if isinstance(weight, Sparse24Weight) else weight, np.float64)
    if "scales" in arguments:
        a, b = (np.asarray(scale, np.float64) for scale in arguments["scales"])
        # Rounded in float32, as the specification says.
        q = np.clip(np.round(np.asarray(arguments["x"]) / np.asarray(arguments["scales"][0])), -127, 127)
        z = (q.astype(np.float64) @ w) * a * b
    else:
        z = x @ w
    if arguments["bias"] is not None:
        z = z + np.asarray(arguments["bias"], np.float64)
    silu = lambda z: z / (1 + np.exp(-z))  # noqa: E731
    gelu = lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))  # noqa: E731
    half = z.shape[-1] // 2
    out = {None: lambda z: z, "silu": silu, "gelu": gelu, "swiglu": lambda z: silu(z[..., :half]) * z[..., half:]}
    expected = out[arguments["activation"]](z)
    np.testing.assert_allclose(specified(arguments), expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def test_gradients_of_kept_values_are_those_of_the_dense_product():
    w = prune_2_4(jax.random.normal(jax.random.key(0), (72, 40)))
    x = jax.random.normal(jax.random.key(1), (5, 72))
    weight = Sparse24Weight.from_dense(w)
    loss = lambda product: jnp.sum(jnp.sin(product))  # noqa: E731
    dense = jax.grad(lambda w: loss(x @ w))(w)
    sparse = jax.grad(lambda weight: loss(sparse_matmul(x, weight)), allow_int=True)(weight)
    kept = np.asarray(Sparse24Weight(sparse.values, weight.metadata, weight.shape).dequantize())
    np.testing.assert_allclose(kept, np.where(np.asarray(w) != 0, dense, 0), rtol=1e-5, atol=1e-5)


def test_rounding_passes_gradients_and_clipping_does_not():
    arguments = SHAPES["int8_8"].make("float32", jax.random.key(0))
    x = arguments.pop("x").at[0, :8].set(100.0)  # far beyond 127 steps
    dx = jax.grad(lambda x: jnp.sum(sparse_matmul(x, **arguments)))(x)
    through = np.asarray(arguments["weight"].dequantize(), np.float64) * np.asarray(arguments["scales"][1], np.float64)
    expected = np.broadcast_to(through.sum(1), x.shape).copy()
    expected[0, :8] = 0
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-6)


def test_x_may_be_of_integers_already():
    arguments = SHAPES["int8_gelu_5"].make("bfloat16", jax.random.key(0))
    q = jnp.clip(jnp.round(arguments["x"].astype(jnp.float32) / arguments["scales"][0]), -127, 127).astype(jnp.int8)
    rounded = sparse_matmul(**arguments | {"x": q}, out_dtype="bfloat16")
    np.testing.assert_array_equal(rounded, sparse_matmul(**arguments))
