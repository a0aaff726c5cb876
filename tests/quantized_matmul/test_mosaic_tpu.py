# SPDX-License-Identifier: Apache-2.0
"""The kernel for TPUs on a CPU: numbers through Pallas's HLO interpreter; copies, semaphores and races through the TPU
interpreter. `make test-aot` compiles it for real TPUs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import explain, quantize, quantized_matmul
from pallas_kernels.core import device
from pallas_kernels.core.arrays import arrays_of
from pallas_kernels.quantized_matmul import config as config_lib
from pallas_kernels.quantized_matmul import mosaic_tpu
from pallas_kernels.quantized_matmul.api import describe
from pallas_kernels.quantized_matmul.config import MosaicTpuConfig
from pallas_kernels.quantized_matmul.reference import naively, specified
from pallas_kernels.quantized_matmul.shapes import SHAPES, Shape
from pallas_kernels.quantized_matmul.weights import IntWeight
from tests import conformance, interpreters
from tests.quantized_matmul import test_conformance


def assert_right(arguments, config=None) -> None:
    def call(arguments):
        return quantized_matmul(**arguments, implementation="mosaic_tpu", config=config)

    conformance.assert_agrees(call, specified, naively, arguments, gradients=False)


@pytest.mark.usefixtures("interpreted")
class TestMosaicTpu(test_conformance.TestQuantizedMatmul):
    implementations = ("mosaic_tpu",)
    on_gpu = False  # the interpreter's float32 products are those of a CPU
    slow_dtypes = frozenset({"float32", "bfloat16"})  # the loops below are part of `make test`

    @pytest.mark.slow
    def test_each_argument_changes_the_output_or_is_refused(self, implementation):
        super().test_each_argument_changes_the_output_or_is_refused(implementation)

    def test_shard_map(self, implementation, monkeypatch):
        """The interpreter's own loop does not pass shard_map's check of types; the call's types do, as traced below."""
        monkeypatch.setattr(jax, "shard_map", functools.partial(jax.shard_map, check_vma=False))
        super().test_shard_map(implementation)

    def test_types_inside_shard_map(self, implementation):
        arguments, specs, out_specs = self.sharded()
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        specs = [spec for name, spec in specs.items() for _ in arrays_of(arguments[name])]
        call = jax.shard_map(
            self.of_arrays(arguments, implementation), mesh=mesh, in_specs=(specs,), out_specs=out_specs
        )
        assert jax.eval_shape(call, arrays_of(arguments)).shape == (8, 40)


# What takes a path of its own. Inputs: chunks in groups of 8, more than one of them, and of 4, 2 and 1; the last chunk
# and the last strip are not whole. Outputs: fewer than a tile, tiles that are not whole, several tiles a step. Both
# planes, low digits of all strips or of none; codes of 4 and 8 bits; each epilogue.
LOOPS = {
    "groups": (Shape(3, 300, 23 * 256 - 40, bias=True), "bfloat16", MosaicTpuConfig(2)),
    "few_outputs": (Shape(1, 24, 300), "float32", MosaicTpuConfig(8)),
    "no_tail": (Shape(17, 520, 768, four_bit_strips=0, activation="gelu"), "float32", MosaicTpuConfig()),
    "all_4_bits": (Shape(5, 272, 640, four_bit_strips=40, activation="silu"), "bfloat16", MosaicTpuConfig()),
    "swiglu": (Shape(8, 600, 1100, activation="swiglu", bias=True), "bfloat16", MosaicTpuConfig(2)),
    "most_rows": (Shape(256, 256, 512), "bfloat16", MosaicTpuConfig()),
    "int4_groups": (Shape(3, 300, 23 * 128 - 44, "int4", bias=True), "bfloat16", MosaicTpuConfig()),
    "int4_one": (Shape(2, 64, 100, "int4", activation="swiglu"), "float32", MosaicTpuConfig()),
    "int8": (Shape(9, 264, 23 * 64 - 9, "int8", activation="gelu", bias=True), "float32", MosaicTpuConfig()),
}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.usefixtures("interpreted")
def test_loops_over_chunks_and_tiles(name):
    shape, dtype, config = LOOPS[name]
    assert_right(shape.make(dtype, jax.random.key(0)), config)


@pytest.mark.parametrize(("scheme", "group_size"), [("int4", 256), ("int8", 64), ("int8", 192)])
@pytest.mark.usefixtures("interpreted")
def test_groups_of_scales(scheme, group_size):
    """A chunk or several, the last group not whole."""
    arguments = Shape(4, 40, 700, bias=True).make("bfloat16", jax.random.key(1))
    weight = quantize(arguments["weight"].dequantize(), scheme, group_size=group_size)
    assert_right(arguments | {"weight": weight})


@pytest.mark.usefixtures("interpreted")
def test_codes_of_4_bits_with_a_scale_for_each_output():
    """`quantize` makes groups of them; a file may have others."""
    arguments = Shape(4, 40, 700, "int8", bias=True).make("bfloat16", jax.random.key(1))
    grouped = quantize(arguments["weight"].dequantize(), "int4", group_size=704)  # one group
    assert isinstance(grouped, IntWeight)
    weight = dataclasses.replace(grouped, scale=grouped.scale.astype("float32"), group_size=None)
    assert_right(arguments | {"weight": weight})


# Two steps each: of two tiles with both planes; with scales of groups, and without.
RACES = {
    "mixed": (Shape(3, 600, 9 * 256 - 8, bias=True), MosaicTpuConfig(2)),
    "int4": (Shape(3, 300, 1100, "int4"), MosaicTpuConfig()),
    "int8": (Shape(3, 300, 700, "int8"), MosaicTpuConfig()),
}


@pytest.mark.parametrize("name", RACES)
@pytest.mark.usefixtures("on_tpu")
@pytest.mark.timeout(120, method="thread")
def test_no_two_copies_race(name):
    """With on-chip memory, copies and semaphores simulated; memory that nobody has written reads as NaN."""
    shape, config = RACES[name]
    with interpreters.mosaic_tpu():
        assert_right(shape.make("float32", jax.random.key(1)), config)


@pytest.mark.usefixtures("interpreted")
def test_rows_do_not_depend_on_each_other():
    """An output has the same bits with other rows beside it."""
    arguments = Shape(8, 40, 300).make("bfloat16", jax.random.key(2))
    x = arguments["x"]
    multiply = jax.jit(lambda x: quantized_matmul(**arguments | {"x": x}, implementation="mosaic_tpu"))
    np.testing.assert_array_equal(multiply(x)[2:4], multiply(x[2:4]))


@pytest.mark.parametrize(
    ("shape", "on", "implementation"),
    [
        (SHAPES["llama2_7b_qkv_mixed_2_4_m8"], device.TPU_V5E, "mosaic_tpu"),
        (SHAPES["llama2_70b_down_int4_m64"], device.TPU_7X, "mosaic_tpu"),
        (SHAPES["outliers_8"], device.TPU_V5E, "xla"),
        (SHAPES["llama2_7b_qkv_mixed_2_4_m8"], device.CPU, "xla"),
    ],
)
def test_auto_takes_it_on_a_tpu(shape, on, implementation):
    with device.assume(on):
        choices = explain(quantized_matmul, **shape.abstract("bfloat16"))
    assert [c.implementation for c in choices if c.call.direction == "forward"] == [implementation]


@pytest.mark.parametrize(
    ("shape", "dtype", "on", "why"),
    [
        (Shape(8, 128, 256), "bfloat16", device.CPU, "its kernels are for TPUs, and this is cpu"),
        (
            Shape(8, 128, 256),
            "bfloat16",
            device.Device("tpu", "TPU v3"),
            "its kernels are compiled for TPU v4 and later, and this is TPU v3",
        ),
        (Shape(8, 128, 256), "float16", device.TPU_V5E, "TPUs compute in float32 and bfloat16, not in float16"),
        (Shape(257, 128, 256), "bfloat16", device.TPU_V5E, "M=257 rows, and it is for 256 at most"),
        (
            Shape(8, 128, 256, "int8", activation_bits=8),
            "bfloat16",
            device.TPU_V5E,
            "it multiplies in the dtype of x, not in integers (activation_bits=8)",
        ),
        (
            Shape(8, 128, 256, outliers=2),
            "bfloat16",
            device.TPU_V5E,
            "it does not add outliers; quantize with outlier_fraction=0",
        ),
        (
            Shape(8, 128, 256, "int2"),
            "bfloat16",
            device.TPU_V5E,
            'it takes 2 bits as part of scheme="mixed_2_4" only (four_bit_fraction=0 has no others)',
        ),
        (
            Shape(256, 8192, 2**16),
            "bfloat16",
            device.TPU_V5E,
            "M=256 rows of K=65536 and words of 256 outputs need 52 MiB of on-chip memory, and it plans with 32",
        ),
    ],
)
def test_refusals(shape, dtype, on, why):
    assert str(mosaic_tpu.supports(describe(**shape.abstract(dtype)), on)) == why


def test_groups_of_less_than_a_chunk_are_refused():
    weight = quantize(np.ones((256, 32), np.float32), "int4", group_size=64)
    call = describe(jnp.ones((8, 256), "bfloat16"), weight)
    assert str(mosaic_tpu.supports(call, device.TPU_V5E)) == "groups of 64 inputs; it takes multiples of 128 at 4 bits"


def test_a_bad_config_is_refused_in_words():
    with pytest.raises(ValueError, match=r"MosaicTpuConfig.tiles must be one of \(1, 2, 4, 8\), got 3"):
        MosaicTpuConfig(3)


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.large and shape.M in (1, 64)])
def test_the_heuristic_is_of_the_search_space(name):
    """In at least 8 steps, and within on-chip memory."""
    shape = SHAPES[name]
    call = describe(**shape.abstract("bfloat16"))
    chosen = config_lib.heuristic(call, device.TPU_V5E, "mosaic_tpu")
    assert chosen in list(config_lib.search_space(call, device.TPU_V5E, "mosaic_tpu"))
    assert 8 * 256 * chosen.tiles <= shape.N
