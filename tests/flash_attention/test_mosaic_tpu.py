# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels on a CPU: numbers through Pallas's HLO interpreter, which is fast; copies, semaphores and races
through the TPU interpreter, at small shapes. `make test-aot` compiles them for real TPUs."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention, masks
from pallas_kernels.core import device
from pallas_kernels.core.arrays import arrays_of, with_arrays
from pallas_kernels.core.tpu import LANES
from pallas_kernels.flash_attention import mosaic_tpu, tiles
from pallas_kernels.flash_attention.api import describe
from pallas_kernels.flash_attention.config import MosaicTpuConfig, heuristic, search_space
from pallas_kernels.flash_attention.mosaic_tpu import grid
from pallas_kernels.flash_attention.shapes import SHAPES, Shape, cache, causal, everything, full_bias, normal, packed
from tests import interpreters
from tests.conformance import assert_agrees, random_cotangents, value_and_gradients
from tests.flash_attention import test_conformance

ONE_LEVEL = MosaicTpuConfig(block_q=128, block_k_major=128, block_k=128, block_rows=128, mask="window")
TWO_LEVELS = MosaicTpuConfig(block_q=128, block_k_major=256, block_k=128, block_rows=32, mask="window")
COMPARING = MosaicTpuConfig(block_q=128, block_k_major=256, block_k=256, block_rows=64, mask="iota")


def attend(arguments, config=None):
    return flash_attention(**arguments, return_lse=True, implementation="mosaic_tpu", config=config)


def jitted(arguments, config):
    return jax.jit(lambda arrays: attend(with_arrays(arguments, arrays), config))(arrays_of(arguments))


def assert_right(arguments, config) -> None:
    """Forward and gradients are as near to the specification as the naive way allows."""
    suite = test_conformance.TestFlashAttention()
    call = functools.partial(attend, config=config)
    assert_agrees(
        lambda arrays: call(with_arrays(arguments, arrays)),
        lambda arrays: suite.reference(with_arrays(arguments, arrays)),
        lambda arrays: suite.naive(with_arrays(arguments, arrays)),
        arrays_of(arguments),
    )


@pytest.mark.usefixtures("interpreted")
class TestMosaicTpu(test_conformance.TestFlashAttention):
    implementations = ("mosaic_tpu",)
    # One of each mask, in one block of each plane. The rest takes the same path, or that of the loops below.
    slow_dtypes = frozenset({"float32", "bfloat16"})
    soon: ClassVar = {
        "bfloat16": {
            "square_128",
            "ragged_239_1",
            "head_dims_192_128",
            "everything_90_150",
            "per_head_dense_77_91",
            "full_bias_60_75",
            "prefix_120",
        }
    }
    on_gpu = False  # the interpreter's float32 products are those of a CPU

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
        arrays = arrays_of(arguments)
        jax.eval_shape(functools.partial(value_and_gradients, call), arrays, random_cotangents(call, arrays, 0))


@pytest.mark.parametrize(
    ("shape", "config", "dtype"),
    [
        ("mqa_packed_300", TWO_LEVELS, "bfloat16"),
        ("window_500", ONE_LEVEL, "float32"),
        ("causal_tall_200_70", COMPARING, "float32"),
        ("causal_300_421", TWO_LEVELS, "bfloat16"),
        ("positions_1_700", TWO_LEVELS, "float32"),
        ("per_head_dense_300_400", TWO_LEVELS, "float32"),
        ("every_option_200_300", TWO_LEVELS, "float32"),
    ],
)
@pytest.mark.usefixtures("interpreted")
def test_loops_over_first_level_blocks(shape, config, dtype):
    """The named shapes mostly fit one block; here every loop is taken, ragged tails and every kind of mask included."""
    more = {
        "causal_300_421": Shape(1, 300, 421, 2, 1, 32, extras=causal),
        "positions_1_700": Shape(2, 1, 700, 2, 1, 32, extras=cache),
        "per_head_dense_300_400": Shape(1, 300, 400, 2, 2, 32, extras=SHAPES["per_head_dense_77_91"].extras),
        "every_option_200_300": Shape(2, 200, 300, 4, 2, 48, 56, extras=everything),
    }
    assert_right((SHAPES | more)[shape].make(dtype, jax.random.key(7)), config)


@pytest.mark.parametrize("shape", [(140, 1), (1, 2, 140, 150)])
@pytest.mark.usefixtures("interpreted")
def test_the_gradient_of_a_broadcast_bias_is_summed(shape):
    arguments = Shape(2, 140, 150, 2, 1, 32, extras=causal).make(jnp.float32, jax.random.key(3))
    assert_right({**arguments, "bias": normal(np.random.default_rng(0), shape)}, ONE_LEVEL)


RACES = {
    "causal": (Shape(1, 200, 300, 2, 1, 32, extras=causal), TWO_LEVELS),
    "packed": (Shape(1, 160, 160, 1, 1, 32, extras=packed(3)), ONE_LEVEL),
    "full_bias": (Shape(1, 140, 150, 1, 1, 32, extras=full_bias), ONE_LEVEL),
}


@pytest.mark.parametrize("shape", RACES)
@pytest.mark.usefixtures("on_tpu")
@pytest.mark.timeout(120, method="thread")
def test_no_two_copies_race(shape):
    """Forward and backward with on-chip memory, copies and semaphores simulated."""
    call, config = RACES[shape]
    with interpreters.mosaic_tpu():
        assert_right(call.make(jnp.float32, jax.random.key(1)), config)


@pytest.mark.usefixtures("interpreted")
def test_slices_of_the_vector_unit_change_no_bit():
    """Rows are whole, so how many are taken at a time is nobody else's business."""
    arguments = SHAPES["everything_90_150"].make(jnp.bfloat16, jax.random.key(0))
    first, second = (jitted(arguments, MosaicTpuConfig(128, 256, 128, rows)) for rows in (32, 128))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.usefixtures("interpreted")
def test_a_schedule_too_long_for_scalar_memory_is_cut_to_runs(monkeypatch):
    """Tiles inside the run of live ones are then masked, the empty ones too."""
    monkeypatch.setattr(grid, "SCHEDULE_WORDS", 0)
    assert_right(SHAPES["mqa_packed_300"].make(jnp.float32, jax.random.key(0)), ONE_LEVEL)


@pytest.mark.usefixtures("interpreted")
def test_padding_rows_stay_out_of_the_gradients():
    """Rows beyond T see nothing: with a large bias of keys, exp(bias) would overflow there and 0 * inf be NaN."""
    arguments = Shape(1, 100, 128, 1, 1, 32).make(jnp.float32, jax.random.key(0))
    arguments["bias"] = jnp.full((128,), 200.0)
    assert_right(arguments, None)


def test_steps_beyond_the_last_live_tile_copy_nothing():
    """They name the block that is on the chip already."""
    plane = grid.prepare(*(jnp.ones((1, 512, 1, 32)),) * 3, None, masks.Causal(), 1.0, None, ONE_LEVEL)[0]
    visits = grid.plan_visits(plane, masks.Causal())
    numbers = jnp.asarray(visits.numbers)
    assert visits.steps == 4
    for row in range(4):
        steps = [[int(x) for x in visits.at(numbers, 0, 0, row, step)] for step in range(4)]
        live = [column for column, is_live, _ in steps if is_live]
        assert sorted(live) == list(range(row + 1))
        assert [column for column, is_live, _ in steps if not is_live] == [live[-1]] * (3 - row)
        assert [bool(mixed) for _, is_live, mixed in steps if is_live] == [True] + [False] * row


def test_the_mask_in_memory_does_not_grow():
    config = MosaicTpuConfig(128, 512, 128, 64)
    sizes = {tiles.m_mask(T, T, config.block_q, config.block_k_major, LANES).size for T in (2**10, 2**18)}
    assert sizes == {1024 * 1024}


@pytest.mark.parametrize(
    ("arguments", "on", "why"),
    [
        (Shape(1, 8, 8, 1, 1, 16).abstract(jnp.float32), device.CPU, "its kernels are for TPUs, and this is cpu"),
        (
            Shape(1, 8, 8, 1, 1, 16).abstract(jnp.float32),
            device.Device("tpu", "TPU v3"),
            "its kernels are compiled for TPU v4 and later, and this is TPU v3",
        ),
        (
            Shape(1, 8, 8, 1, 1, 16).abstract(jnp.float16),
            device.TPU_V5E,
            "TPUs compute in float32 and bfloat16, not in float16",
        ),
        (
            Shape(1, 8, 8, 1, 1, 8192).abstract(jnp.float32),
            device.TPU_V5E,
            "tiles of head dims H=8192, Hv=8192 need 36 MiB of on-chip memory, and it plans with 32",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_in_words(arguments, on, why):
    call = describe(*(arguments[name] for name in ("query", "key", "value")))
    assert str(mosaic_tpu.supports(call, on)) == why


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((100, 128, 128, 32), "MosaicTpuConfig.block_q must be a positive multiple of 128, got 100."),
        ((128, 128, 64, 32), "MosaicTpuConfig.block_k must be a positive multiple of 128, got 64."),
        ((128, 384, 256, 32), "MosaicTpuConfig.block_k_major must be a multiple of block_k=256, got 384."),
        ((128, 128, 128, 96), "MosaicTpuConfig.block_rows must be a multiple of 32 that divides block_q=128, got 96."),
        ((128, 128, 128, 32, "dense"), 'MosaicTpuConfig.mask must be "window" or "iota", got \'dense\'.'),
    ],
)
def test_a_bad_config_is_refused_in_words(fields, message):
    with pytest.raises(ValueError, match="MosaicTpuConfig") as caught:
        MosaicTpuConfig(*fields)
    assert str(caught.value) == message


def test_the_heuristic_is_the_widest_block_that_fits():
    arrays = Shape(1, 4096, 4096, 8, 8, 128).abstract(jnp.bfloat16)
    call = describe(arrays["query"], arrays["key"], arrays["value"], mask=masks.Causal()).backward()
    chosen = heuristic(call, device.TPU_V5E, "mosaic_tpu")
    space = list(search_space(call, device.TPU_V5E, "mosaic_tpu"))
    assert chosen in space
    assert chosen.block_k_major == max(config.block_k_major for config in space)
