# SPDX-License-Identifier: Apache-2.0
"""The kernel for NVIDIA GPUs in the interpreter, with races looked for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import UnifiedMax, UnsupportedError, decode_attention
from pallas_kernels.core import device
from pallas_kernels.core.arrays import arrays_of, with_arrays
from pallas_kernels.decode_attention.config import MosaicGpuConfig
from pallas_kernels.decode_attention.reference import naively, specified
from pallas_kernels.decode_attention.shapes import SHAPES, Shape
from tests import conformance, interpreters

HOPPER = dataclasses.replace(device.H100, num_cores=2)
AMPERE = dataclasses.replace(device.A100, num_cores=2)
pytestmark = pytest.mark.timeout(120, method="thread")

# Clusters read each other's shared memory by inline PTX, which is for a GPU: `pytest -m gpu` has them.
# What takes a path of its own: a tail of the last chunk, wide heads, several new tokens, each kind of page, a window
# that skips chunks, more splits than chunks.
CASES = {
    "dense": (Shape(3, 200, 8, 2, 64), MosaicGpuConfig()),
    "wide_heads": (Shape(2, 136, 3, 1, 128, 192), MosaicGpuConfig(num_splits=2, cluster=1)),
    "drafted": (Shape(2, 136, 6, 3, 48, 64, T=5, extras=("sink",)), MosaicGpuConfig(128, 2, 2, cluster=1)),
    "pages_of_16": (SHAPES["paged_16"], MosaicGpuConfig(stages=2, num_splits=2, cluster=1)),
    "pages_of_128": (Shape(2, 384, 4, 2, 64, page=128), MosaicGpuConfig(num_splits=3, cluster=1)),
    "window": (SHAPES["paged_window_sink"], MosaicGpuConfig(num_splits=7, cluster=1)),
    "scaled": (Shape(2, 136, 4, 2, 64, cache="bfloat16"), MosaicGpuConfig()),
    "asynchronous": (Shape(3, 256, 8, 2, 64, extras=("sink", "phi"), options=(("scale", 0.1),)), MosaicGpuConfig()),
    "int8": (SHAPES["int8_160"], MosaicGpuConfig(stages=2, num_splits=2, cluster=1)),
    "float8_asynchronous": (SHAPES["fp8_160"], MosaicGpuConfig()),
    "float8_wide_chunks": (Shape(2, 136, 4, 1, 96, 128, cache="float8_e5m2"), MosaicGpuConfig(128, 2)),
    "int8_float16": (Shape(2, 136, 4, 2, 64, page=8, cache="int8"), MosaicGpuConfig()),
}


def call(arguments, config, **options):
    return decode_attention(**arguments, return_lse=True, implementation="mosaic_gpu", config=config, **options)


LATER = ("wide_heads", "drafted", "pages_of_128", "scaled", "float8_wide_chunks", "int8_float16")  # 6 to 10 s each


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LATER else n for n in CASES])
def test_hopper(name):
    shape, config = CASES[name]
    arguments = shape.make("float16" if name.endswith("float16") else "bfloat16", jax.random.key(0))
    with device.assume(HOPPER), interpreters.mosaic_gpu():
        conformance.assert_agrees(
            functools.partial(call, config=config), specified, naively, arguments, gradients=False
        )


WIDENED = pytest.mark.parametrize("cache", ["", pytest.param("float8_e4m3fn", marks=pytest.mark.slow)])


@WIDENED
def test_what_nobody_sees_may_be_anything(cache):
    shape = Shape(3, 200, 8, 2, 64, lengths=(0, 70, 200), cache=cache)
    arguments = shape.make("bfloat16", jax.random.key(2))
    beyond = jnp.arange(200)[None, :, None, None] >= arguments["lengths"][:, None, None, None]
    dirty = {name: jnp.where(beyond, jnp.nan, arguments[name]) for name in ("key", "value")}
    with device.assume(HOPPER), interpreters.mosaic_gpu():
        for a, b in zip(
            call({**arguments, **dirty}, MosaicGpuConfig()), call(arguments, MosaicGpuConfig()), strict=True
        ):
            np.testing.assert_array_equal(a, b)


@WIDENED
def test_rows_out_of_bounds_are_computed_again(cache):
    """One key far above, which two heads share, and one row far below."""
    arguments = Shape(3, 192, 4, 2, 64, lengths=(192, 150, 192), cache=cache).make("bfloat16", jax.random.key(4))
    key = arguments["key"] * (0.05 if cache else 1)  # of the size of a query
    key = key.at[0, 100, 1].set((60 * jnp.sign(arguments["query"][0, 2])).astype(key.dtype))
    if cache:
        arguments["key_scale"] = jnp.ones(2)
    arguments |= {"key": key, "query": arguments["query"].at[1, 3].multiply(40)}
    with device.assume(HOPPER), interpreters.mosaic_gpu():
        *got, stats = call(
            arguments, MosaicGpuConfig(num_splits=3), unified_max=UnifiedMax(0.0, -15.0, 15.0), return_stats=True
        )
    bounds = UnifiedMax(0.0, -15.0, 15.0)
    *want, expected = decode_attention(
        **arguments, unified_max=bounds, return_lse=True, return_stats=True, implementation="reference"
    )
    assert stats.recomputed_rows.tolist() == expected.recomputed_rows.tolist()
    assert stats.recomputed_rows.tolist() == [2, 1, 0]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0.02, atol=0.02)


def test_a_sequence_gets_the_same_bits_in_any_batch():
    arguments = Shape(3, 256, 4, 1, 64, options=(("num_splits", 3),)).make("bfloat16", jax.random.key(3))
    with device.assume(HOPPER), interpreters.mosaic_gpu():
        together = call(arguments, None)
        for b in range(3):
            alone = call({n: x[b : b + 1] if hasattr(x, "shape") else x for n, x in arguments.items()}, None)
            for x, y in zip(together, alone, strict=True):
                np.testing.assert_array_equal(x[b], y[0])


def test_types_inside_shard_map():
    """Tracing is what shard_map's check of types looks at."""
    arguments = Shape(4, 128, 4, 2, 64, T=2, page=16, extras=("sink", "phi")).make("bfloat16", jax.random.key(0))
    heads, rows = P(None, None, "model", None), P("data")
    specs = {"query": P("data", None, "model", None), "key": heads, "value": heads, "lengths": rows, "page_table": rows}
    specs |= {"sink": P("model"), "unified_max": P("model")}
    leaves = [specs[name] for name in sorted(arguments) for _ in arrays_of(arguments[name])]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def attend(arrays):
        return call(with_arrays(arguments, arrays), MosaicGpuConfig(num_splits=2, cluster=1))

    with device.assume(HOPPER):
        outputs = (P("data", None, "model", None), P("data", "model"))
        sharded = jax.shard_map(attend, mesh=mesh, in_specs=(leaves,), out_specs=outputs)
        out, lse = jax.eval_shape(sharded, arrays_of(arguments))
    assert out.shape == (4, 2, 4, 64)
    assert lse.shape == (4, 4, 2)


@pytest.mark.parametrize(
    ("shape", "dtype", "on", "why"),
    [
        (Shape(2, 128, 4, 2, 64), "float32", HOPPER, "its tensor-core products take bfloat16 and float16, not float32"),
        (Shape(2, 100, 4, 2, 64), "bfloat16", AMPERE, "a cache of S=100 keys; it takes multiples of 64 on sm80"),
        (
            Shape(2, 96, 4, 2, 64, page=24),
            "bfloat16",
            HOPPER,
            "pages of 24 keys; it takes 8, 16, 32 and multiples of 64",
        ),
        (SHAPES["paged_16"], "bfloat16", AMPERE, "pages of 16 keys; four warps of sm80 copy them together"),
        (SHAPES["fp8_160"], "bfloat16", AMPERE, "sm80 has no instruction that converts float8_e4m3fn"),
        (Shape(1, 64, 2, 1, 80, 64, cache="int8"), "bfloat16", HOPPER, "head dim H=80 of a cache of int8"),
        (Shape(1, 64, 70, 1, 64), "bfloat16", HOPPER, "T * N / K = 70 rows share a key, and it has room for 64"),
    ],
)
def test_refusals(shape, dtype, on, why):
    arguments = shape.make(dtype, jax.random.key(0))
    with device.assume(on), pytest.raises(UnsupportedError) as error:
        call(arguments, None)
    assert why in str(error.value)
