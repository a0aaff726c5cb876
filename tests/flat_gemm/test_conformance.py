# SPDX-License-Identifier: Apache-2.0
"""Every implementation of flat_gemm against the specification."""

from typing import ClassVar

import jax
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels import flat_gemm
from pallas_kernels.flat_gemm.reference import naively, specified
from pallas_kernels.flat_gemm.shapes import SHAPES, Shape
from tests import conformance


class TestFlatGemm(conformance.Suite):
    function = staticmethod(pallas_kernels.flat_gemm)
    shapes = SHAPES
    implementations = ("xla", "mosaic_gpu")
    probe = "square_5"
    slow_dtypes = frozenset({"float16"})
    probe_dtypes: ClassVar = {"mosaic_gpu": "bfloat16"}

    def call(self, arguments, implementation):
        return flat_gemm(**arguments, implementation=implementation)

    def reference(self, arguments):
        return specified(arguments)

    def naive(self, arguments):
        return naively(arguments)

    def changes(self, arguments):
        half = {name: arguments[name] * 0.5 for name in ("x", "w", "bias", "residual")}
        return {**half, "activation": "gelu", "transpose_w": False, "rms_norm_eps": 0.1}

    def sharded(self):
        """Rows over "data"; over "model" the output features, so that every device has some columns of the weight."""
        arguments = Shape(4, 48, 40, activation="silu", extras=("bias", "residual")).make("float32", jax.random.key(0))
        out = P("data", "model")
        specs = {"x": P("data", None), "w": P("model", None), "bias": P("model"), "residual": out}
        return arguments, {name: specs.get(name, P()) for name in sorted(arguments)}, out
