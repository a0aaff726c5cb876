# SPDX-License-Identifier: Apache-2.0
"""The kernel for TPUs on a CPU: numbers through Pallas's HLO interpreter; copies, semaphores and races through the TPU
interpreter, at small shapes. `make test-aot` compiles it for real TPUs."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import explain, flat_gemm
from pallas_kernels.core import device
from pallas_kernels.core.arrays import arrays_of, with_arrays
from pallas_kernels.flat_gemm import config as config_lib
from pallas_kernels.flat_gemm import dataflow, mosaic_tpu, routes
from pallas_kernels.flat_gemm.api import describe
from pallas_kernels.flat_gemm.config import MosaicTpuConfig
from pallas_kernels.flat_gemm.reference import naively, specified
from pallas_kernels.flat_gemm.shapes import SHAPES, Shape
from tests import conformance, interpreters
from tests.flat_gemm import test_conformance


def assert_right(arguments, config=None) -> None:
    conformance.assert_agrees(
        lambda arrays: flat_gemm(**with_arrays(arguments, arrays), implementation="mosaic_tpu", config=config),
        lambda arrays: specified(with_arrays(arguments, arrays)),
        lambda arrays: naively(with_arrays(arguments, arrays)),
        arrays_of(arguments),
    )


@pytest.mark.usefixtures("interpreted")
class TestMosaicTpu(test_conformance.TestFlatGemm):
    implementations = ("mosaic_tpu",)
    on_gpu = False  # the interpreter's float32 products are those of a CPU
    slow_dtypes = frozenset({"float32", "bfloat16"})  # the loops below are part of `make test`

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
        out = jax.eval_shape(call, arrays_of(arguments))
        assert out.shape == arguments["residual"].shape


# Several blocks of columns, the last one ragged, and several steps of K, in both orientations; two blocks a step.
LOOPS = {
    "rows": Shape(3, 300, 384, extras=("bias", "residual"), activation="gelu"),
    "columns": Shape(17, 200, 256, transpose_w=False, extras=("bias", "residual"), activation="gelu_exact"),
    "swiglu": Shape(5, 768, 256, extras=("bias", "residual"), activation="swiglu"),
    "swiglu_columns": Shape(5, 512, 256, transpose_w=False, extras=("bias",), activation="swiglu"),
}


@pytest.mark.parametrize("shape", LOOPS)
@pytest.mark.usefixtures("interpreted")
def test_loops_over_blocks(shape):
    assert_right(LOOPS[shape].make("bfloat16", jax.random.key(0)), MosaicTpuConfig(128, 128))


@pytest.mark.parametrize("shape", LOOPS)
@pytest.mark.usefixtures("on_tpu")
@pytest.mark.timeout(120, method="thread")
def test_no_two_copies_race(shape):
    """With on-chip memory, copies and semaphores simulated; memory that nobody has written reads as NaN."""
    with interpreters.mosaic_tpu():
        assert_right(LOOPS[shape].make("float32", jax.random.key(1)), MosaicTpuConfig(128, 128))


@pytest.mark.usefixtures("on_tpu")
def test_nobody_gets_it_without_asking():
    """No TPU has measured where it is faster than XLA's product."""
    arguments = SHAPES["llama2_7b_qkv_m8"].abstract(jnp.bfloat16)
    (choice,) = [c for c in explain(flat_gemm, **arguments) if c.call.direction == "forward"]
    assert (choice.implementation, choice.why) == ("xla", "route C: not measured on this device")
    (choice,) = [c for c in explain(flat_gemm, **arguments, implementation="mosaic_tpu") if c.implementation != "xla"]
    assert choice.implementation == "mosaic_tpu"


@pytest.mark.usefixtures("interpreted")
def test_a_measured_tpu_takes_it_below_the_crossing(tmp_path, monkeypatch):
    """The search times it as route B, and "auto" follows the table that is made of it."""
    monkeypatch.setenv("PALLAS_KERNELS_CACHE", str(tmp_path))
    timer = dataflow.time_routes(Shape(1, 256, 128), "float32", method="wall", budget=0)
    assert timer("A", 4) == math.inf
    assert 0 < timer("B", 4) < math.inf
    curves = {"A": dict.fromkeys((4, 8, 16), math.inf), "B": {4: 1, 8: 1, 16: 3}, "C": {4: 2, 8: 2, 16: 2}}
    file = tmp_path / routes.table_name(device.TPU_V5E)
    dataflow.store(file, "float32,NK", {(256, 128): dataflow.entry(curves)})
    for M, implementation in ((8, "mosaic_tpu"), (16, "xla")):
        choices = explain(flat_gemm, **Shape(M, 256, 128).abstract("float32"))
        assert [c.implementation for c in choices if c.call.direction == "forward"] == [implementation]


@pytest.mark.parametrize(
    ("shape", "dtype", "on", "why"),
    [
        (Shape(8, 128, 128), "bfloat16", device.CPU, "its kernels are for TPUs, and this is cpu"),
        (
            Shape(8, 128, 128),
            "bfloat16",
            device.Device("tpu", "TPU v3"),
            "its kernels are compiled for TPU v4 and later, and this is TPU v3",
        ),
        (Shape(8, 128, 128), "float16", device.TPU_V5E, "TPUs compute in float32 and bfloat16, not in float16"),
        (Shape(300, 128, 128), "bfloat16", device.TPU_V5E, "M=300 rows, and it is for 256 at most"),
        (
            SHAPES["swiglu_3"],
            "bfloat16",
            device.TPU_V5E,
            "gates and what they let through are 156 columns each; it takes multiples of 128",
        ),
        (Shape(8, 128, 1), "bfloat16", device.TPU_V5E, "a product over K=1 number is none for the matrix unit"),
        (
            Shape(256, 8192, 2**17),
            "bfloat16",
            device.TPU_V5E,
            "M=256 rows of K=131072 and a block of the weight need 64 MiB of on-chip memory, and it plans with 32",
        ),
    ],
)
def test_refusals(shape, dtype, on, why):
    assert str(mosaic_tpu.supports(describe(**shape.abstract(dtype)), on)) == why


@pytest.mark.parametrize("name", ["block_n", "block_k"])
def test_a_bad_config_is_refused_in_words(name):
    with pytest.raises(ValueError, match=f"MosaicTpuConfig.{name} must be a positive multiple of 128, got 100"):
        MosaicTpuConfig(**{"block_n": 128, "block_k": 128, name: 100})


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.large])
def test_the_heuristic_is_of_the_search_space(name):
    """A megabyte or more a step, in at least 16 of them, and within on-chip memory."""
    shape = SHAPES[name]
    call = describe(**shape.abstract("bfloat16"))
    chosen = config_lib.heuristic(call, device.TPU_V5E, "mosaic_tpu")
    assert chosen in list(config_lib.search_space(call, device.TPU_V5E, "mosaic_tpu"))
    block_n, block_k = chosen.block(shape.N, shape.K, None)
    assert shape.K % block_k == 0
    assert 2**19 <= block_n * block_k * 2 <= shape.N * shape.K * 2 // 16
