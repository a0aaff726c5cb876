# SPDX-License-Identifier: Apache-2.0
"""Every implementation of quantized_matmul against the specification."""

import dataclasses
from typing import ClassVar

import jax
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels import quantized_matmul
from pallas_kernels.quantized_matmul.reference import naively, specified
from pallas_kernels.quantized_matmul.shapes import SHAPES, Shape
from pallas_kernels.quantized_matmul.weights import Weight
from tests import conformance


@dataclasses.dataclass(frozen=True)
class Held:
    """A weight that is no array to those who look for arrays: it has no gradient, is not shuffled and not stacked."""

    weight: Weight


def released(arguments):
    """The arguments with their weight, which is not known while compiling: decoding is not done by the compiler."""
    return arguments | {"weight": jax.lax.optimization_barrier(arguments["weight"].weight)}


class TestQuantizedMatmul(conformance.Suite):
    function = staticmethod(pallas_kernels.quantized_matmul)
    shapes = SHAPES
    implementations = ("xla", "mosaic_gpu")
    probe = "digits_8"
    probe_dtypes: ClassVar = {"mosaic_gpu": "bfloat16"}
    slow_dtypes = frozenset({"float16"})

    def call(self, arguments, implementation):
        return quantized_matmul(**released(arguments), implementation=implementation)

    def reference(self, arguments):
        return specified(released(arguments))

    def naive(self, arguments):
        return naively(released(arguments))

    def accepted(self, arguments, implementation):
        weight = arguments["weight"]
        held = arguments | {"weight": weight if isinstance(weight, Held) else Held(weight)}
        return super().accepted(held, implementation)

    def changes(self, arguments):
        other = self.shapes[self.probe].make("float32", jax.random.key(9))["weight"]
        half = {name: arguments[name] * 0.5 for name in ("x", "bias")}
        return {**half, "weight": Held(other), "activation": "gelu"}

    def sharded(self):
        """Rows over "data"; the weight is on every device."""
        arguments = Shape(8, 40, 80, activation="silu", bias=True).make("float32", jax.random.key(0))
        specs = {"x": P("data", None), "bias": P()}
        arguments["weight"] = Held(arguments["weight"])
        return arguments, {name: specs.get(name, P()) for name in sorted(arguments)}, P("data", None)
