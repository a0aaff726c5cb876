# SPDX-License-Identifier: Apache-2.0
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels import UnifiedMax, masks
from pallas_kernels.core.arrays import arrays_of, with_arrays
from pallas_kernels.flash_attention import reference
from pallas_kernels.flash_attention.config import XlaConfig
from pallas_kernels.flash_attention.shapes import SHAPES, Shape, everything, normal
from tests import conformance


class TestFlashAttention(conformance.Suite):
    function = staticmethod(pallas_kernels.flash_attention)
    shapes = SHAPES
    implementations = ("xla", "mosaic_gpu")
    probe = "everything_90_150"
    probe_dtypes: ClassVar = {"mosaic_gpu": "bfloat16"}
    plumbing = frozenset({*conformance.Suite.plumbing, "return_stats"})
    config: ClassVar = None
    # bfloat16 takes every path. The others differ from it in the type of the products alone, which these two show;
    # the transformations and the loops below are in float32 too.
    slow_dtypes = frozenset({"float32", "float16"})
    soon: ClassVar = {"float32": {probe, "ragged_1023_1024"}, "float16": {probe, "asynchronous_140_150"}}

    def call(self, arguments, implementation):
        return self.function(**arguments, return_lse=True, config=self.config, implementation=implementation)

    def reference(self, arguments):
        return reference.specified(arguments)

    def naive(self, arguments):
        return reference.naively(arguments)

    def changes(self, arguments):
        half = {name: arguments[name] * 0.5 for name in ("query", "key", "value", "bias", "sink")}
        return {**half, "mask": masks.Causal(), "scale": 0.1, "soft_cap": 1.0, "unified_max": UnifiedMax(1.0)}

    def sharded(self):
        arguments = Shape(4, 150, 200, 4, 2, 32, extras=everything).make("float32", jax.random.key(0))
        # More than one tile, so that the loop over tiles is taken, and a bias that every device holds whole: its
        # gradient has to be summed over the mesh.
        arguments["bias"] = normal(np.random.default_rng(1), (150, 200))
        heads = P("data", None, "model", None)
        specs = {"bias": P(), "key": heads, "mask": P("data"), "query": heads, "scale": None}
        specs |= {"sink": P("model"), "soft_cap": None, "value": heads}
        return arguments, specs, (heads, P("data", "model"))


@pytest.mark.parametrize(
    "shape", ["everything_90_150", "mqa_packed_300", "per_head_dense_77_91", "full_bias_60_75", "causal_tall_200_70"]
)
def test_loops_over_tiles(shape):
    """Small shapes fit one tile; here every loop, ragged tails included, is taken for each kind of mask."""
    arguments = SHAPES[shape].make(jnp.float32, jax.random.key(7))
    tiled = functools.partial(
        pallas_kernels.flash_attention, return_lse=True, implementation="xla", config=XlaConfig(32, 48)
    )
    call = jax.jit(lambda arrays: tiled(**with_arrays(arguments, arrays)))
    TestFlashAttention().assert_agrees(call, arrays_of(arguments), arguments)
