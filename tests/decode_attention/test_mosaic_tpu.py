# SPDX-License-Identifier: Apache-2.0
"""The kernel for TPUs on a CPU: numbers through Pallas's HLO interpreter, which is fast; copies, semaphores and races
through the TPU interpreter, at small shapes. `make test-aot` compiles it for real TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import UnifiedMax, UnsupportedError, decode_attention
from pallas_kernels.core import device, dispatch, tolerance
from pallas_kernels.core.arrays import arrays_of, with_arrays
from pallas_kernels.decode_attention import config as config_lib
from pallas_kernels.decode_attention import mosaic_tpu
from pallas_kernels.decode_attention.config import MosaicTpuConfig
from pallas_kernels.decode_attention.reference import naively, specified, visible
from pallas_kernels.decode_attention.shapes import SHAPES, Shape
from tests import conformance, interpreters
from tests.decode_attention import test_conformance


def call(arguments, config=None, **options):
    return decode_attention(**arguments, return_lse=True, implementation="mosaic_tpu", config=config, **options)


def assert_right(arguments, config=None) -> None:
    conformance.assert_agrees(functools.partial(call, config=config), specified, naively, arguments, gradients=False)


@pytest.mark.usefixtures("interpreted")
class TestMosaicTpu(test_conformance.TestDecodeAttention):
    implementations = ("mosaic_tpu",)
    slow_dtypes = frozenset({"float32", "bfloat16"})  # the loops below are part of `make test`
    on_gpu = False  # the interpreter's float32 products are those of a CPU

    @pytest.mark.slow
    def test_each_argument_changes_the_output_or_is_refused(self, implementation):
        super().test_each_argument_changes_the_output_or_is_refused(implementation)

    def test_shard_map(self, implementation, monkeypatch):
        """The interpreter's own loop does not pass shard_map's check of types; the call's types do, as traced below."""
        monkeypatch.setattr(jax, "shard_map", functools.partial(jax.shard_map, check_vma=False))
        super().test_shard_map(implementation)


@pytest.mark.usefixtures("on_tpu")
def test_types_inside_shard_map():
    """Tracing is what shard_map's check of types looks at."""
    arguments = Shape(4, 128, 4, 2, 64, T=2, page=16, extras=("sink", "phi")).make("bfloat16", jax.random.key(0))
    heads, rows = P(None, None, "model", None), P("data")
    specs = {"query": P("data", None, "model", None), "key": heads, "value": heads, "lengths": rows, "page_table": rows}
    specs |= {"sink": P("model"), "unified_max": P("model")}
    leaves = [specs[name] for name in sorted(arguments) for _ in arrays_of(arguments[name])]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    outputs = (P("data", None, "model", None), P("data", "model"))
    sharded = jax.shard_map(
        lambda arrays: call(with_arrays(arguments, arrays), MosaicTpuConfig(64, 2)),
        mesh=mesh,
        in_specs=(leaves,),
        out_specs=outputs,
    )
    out, lse = jax.eval_shape(sharded, arrays_of(arguments))
    assert (out.shape, lse.shape) == ((4, 2, 4, 64), (4, 4, 2))


# What takes a path of its own: a tail of the last chunk, several chunks and splits, more splits than chunks, several
# copies of a chunk and a tail of them, pages that chunks divide, that divide no chunk and that fill no tile, a window
# that skips chunks.
LOOPS = {
    "dense": (Shape(3, 203, 8, 2, 64, 48), MosaicTpuConfig(64)),
    "splits": (Shape(3, 203, 4, 2, 64, T=3, extras=("sink",)), MosaicTpuConfig(32, num_splits=3)),
    "many_splits": (Shape(3, 100, 4, 1, 64), MosaicTpuConfig(64, num_splits=5)),
    "pages_of_16": (Shape(3, 240, 4, 2, 64, page=16), MosaicTpuConfig(64)),
    "pages_of_128": (Shape(3, 384, 4, 2, 64, page=128), MosaicTpuConfig(64, num_splits=2)),
    "pages_of_96": (Shape(3, 288, 4, 2, 64, page=96), MosaicTpuConfig(64)),
    "pages_of_5": (Shape(3, 50, 6, 3, 72, page=5), MosaicTpuConfig(32)),
    "window": (
        Shape(4, 256, 6, 2, 64, T=3, page=16, lengths=(0, 2, 256, 150), options=(("window", 40), ("num_splits", 2))),
        MosaicTpuConfig(32),
    ),
    "everything": (
        Shape(
            *(3, 240, 12, 4, 72, 96),
            T=3,
            page=40,
            cache="int8",
            extras=("sink", "phi"),
            options=(("window", 90), ("soft_cap", 5.0), ("num_splits", 2), ("scale", 0.1)),
        ),
        MosaicTpuConfig(64),
    ),
}


# One of each kind of loop; `-m slow` takes the rest.
SOON = ("splits", "pages_of_16", "window", "everything")


@pytest.mark.parametrize("name", [n if n in SOON else pytest.param(n, marks=pytest.mark.slow) for n in LOOPS])
@pytest.mark.usefixtures("interpreted")
def test_loops_over_chunks(name):
    shape, config = LOOPS[name]
    assert_right(shape.make("float32", jax.random.key(0)), config)


RACES = {
    "dense": (Shape(2, 100, 4, 2, 32, lengths=(100, 40)), MosaicTpuConfig(32, num_splits=2)),
    "pages": (Shape(2, 96, 4, 2, 32, page=16, lengths=(90, 17), options=(("window", 50),)), MosaicTpuConfig(32)),
    "asynchronous": (
        Shape(2, 96, 4, 2, 32, cache="int8", extras=("sink", "phi"), options=(("scale", 0.1),)),
        MosaicTpuConfig(64),
    ),
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
def test_what_nobody_sees_may_be_anything():
    arguments = Shape(3, 203, 8, 2, 64, lengths=(0, 70, 203)).make("float32", jax.random.key(2))
    beyond = jnp.arange(203)[None, :, None, None] >= arguments["lengths"][:, None, None, None]
    dirty = {name: jnp.where(beyond, jnp.nan, arguments[name]) for name in ("key", "value")}
    for config in (MosaicTpuConfig(64), MosaicTpuConfig(256)):
        for a, b in zip(call({**arguments, **dirty}, config), call(arguments, config), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("interpreted")
def test_rows_out_of_bounds_are_computed_again():
    options = {"unified_max": UnifiedMax(0.0, -15.0, 15.0), "return_stats": True}

    def draw(seed):
        """One key far above, which two heads share, one row far below, and a sequence that is within."""
        arguments = Shape(3, 192, 4, 2, 64, lengths=(192, 150, 192)).make("float32", jax.random.key(seed))
        key = arguments["key"].at[0, 100, 1].set(60 * jnp.sign(arguments["query"][0, 2]))
        return arguments | {"key": key, "query": arguments["query"].at[1, 3].multiply(40)}

    def judge(arguments):
        with jax.enable_x64(True):
            doubled = {name: x.astype("float64") if name != "lengths" else x for name, x in arguments.items()}
            *exact, stats = decode_attention(**doubled, return_lse=True, implementation="reference", **options)
        assert stats.recomputed_rows.tolist() == [2, 1, 0]
        return list(zip(exact, naively(arguments), strict=True))

    *results, stats = call(draw(4), MosaicTpuConfig(32, num_splits=3), **options)
    assert stats.recomputed_rows.tolist() == [2, 1, 0]
    for result, (exact, usual), *more in zip(results, *(judge(draw(seed)) for seed in range(4, 7)), strict=True):
        tolerance.assert_normal(result, exact, usual, more_draws=more)


@pytest.mark.usefixtures("interpreted")
def test_a_sequence_gets_the_same_bits_in_any_batch():
    arguments = SHAPES["splits_190"].make("float32", jax.random.key(3))
    attend = jax.jit(lambda arrays: call(with_arrays(arguments, arrays)))
    together = attend(arrays_of(arguments))
    for b in range(3):
        for x, y in zip(together, attend([x[b : b + 1] for x in arrays_of(arguments)]), strict=True):
            np.testing.assert_array_equal(x[b], y[0])


@pytest.mark.parametrize("window", [None, 1, 37, 500])
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_steps_visit_what_is_seen_and_stay_there(splits, window):
    """Each chunk with a visible key is visited once; a step that is not live copies nothing that no step needs."""
    S, T, C = 200, 3, 32
    plan = mosaic_tpu._Plan(1, T, 2, 1, 16, 16, 16, C, 1, None, S, splits, None, window)
    lengths, split = jnp.arange(S + 1)[:, None], jnp.arange(splits)
    first, end = plan.live(lengths, split)
    steps = jnp.broadcast_to(first, (S + 1, splits))[..., None] + jnp.arange(plan.chunks)
    live = np.asarray(steps < end[..., None]).reshape(S + 1, -1)
    named = np.asarray(plan.chunk(lengths[..., None], split[:, None], jnp.arange(plan.chunks))).reshape(S + 1, -1)
    np.testing.assert_array_equal(named[live], np.asarray(steps).reshape(S + 1, -1)[live])
    seen = np.asarray(visible(lengths[:, 0], T, jnp.arange(S), window)).any(1)
    for length in range(S + 1):
        visited = named[length][live[length]].tolist()
        assert len(set(visited)) == len(visited)
        assert {int(s) // C for s in np.flatnonzero(seen[length])} <= set(visited)
        assert set(named[length].tolist()) <= (set(visited) or {0})
    # Each block is copied once, for a copy is left out where the index stays.
    assert (np.diff(named, axis=1) >= 0).all()


def test_pages_beyond_a_sequence_are_not_copied():
    """An operand stays at the page of the chunk before; numbers out of range are never used."""
    plan = mosaic_tpu._Plan(2, 1, 2, 1, 16, 16, 16, 16, 2, 16, 96, 1, None, None)
    table, lengths = jnp.asarray([7, 3, 9, -1, -1, 99, 5, 99, -1, -1, -1, -1]), jnp.asarray([40, 16])

    def pages(b, step):
        return [int(mosaic_tpu._piece(plan, 10, i, b, 0, step, lengths, table)[0]) for i in range(2)]

    assert [pages(0, step) for step in range(3)] == [[7, 3], [9, 3], [9, 3]]
    assert [pages(1, step) for step in range(3)] == [[5, 5]] * 3


def described(shape: Shape, dtype: str, on: device.Device) -> dispatch.Call:
    """The call as dispatch sees it."""
    arguments = shape.abstract(dtype)
    with device.assume(on):
        return dispatch.explain(functools.partial(decode_attention, implementation="xla"), **arguments)[0].call


@pytest.mark.parametrize(
    ("shape", "dtype", "on", "why"),
    [
        (Shape(2, 64, 4, 2, 64), "float32", device.CPU, "its kernels are for TPUs, and this is cpu"),
        (
            Shape(2, 64, 4, 2, 64),
            "float32",
            device.Device("tpu", "TPU v3"),
            "its kernels are compiled for TPU v4 and later, and this is TPU v3",
        ),
        (
            Shape(2, 64, 4, 2, 64),
            "float16",
            device.TPU_V5E,
            "TPUs compute in float32 and bfloat16, not in float16",
        ),
        (
            Shape(1, 1, 1, 1, 32),
            "float32",
            device.TPU_V5E,
            "a product over one number, a head of H=1 or one row of keys, is none for the matrix unit",
        ),
        (
            Shape(128, 2**14, 8, 2, 128, page=16),
            "bfloat16",
            device.TPU_V5E,
            "lengths and page table have 131200 entries, and scalar memory has room for 131072",
        ),
        (
            Shape(1, 64, 512, 512, 256, T=8),
            "bfloat16",
            device.TPU_V5E,
            "T * N = 4096 queries and K=512 key heads of H=256, Hv=256 need 456 MiB of on-chip memory, "
            "and it plans with 32",
        ),
    ],
)
def test_refusals(shape, dtype, on, why):
    assert str(mosaic_tpu.supports(described(shape, dtype, on), on)) == why


def test_a_named_refusal_is_raised():
    with device.assume(device.TPU_V5E), pytest.raises(UnsupportedError, match="not in float16"):
        call(Shape(2, 64, 4, 2, 64).make("float16", jax.random.key(0)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((100,), "MosaicTpuConfig.block_k must be a positive multiple of 32, got 100."),
        ((64, 0), "MosaicTpuConfig.num_splits must be an integer >= 1, got 0."),
    ],
)
def test_a_bad_config_is_refused_in_words(fields, message):
    with pytest.raises(ValueError, match="MosaicTpuConfig") as caught:
        MosaicTpuConfig(*fields)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.large])
@pytest.mark.parametrize("on", [device.TPU_V5E, device.TPU_V5P], ids=str)
def test_the_heuristic_fills_the_memory_it_may_have(name, on):
    shape = SHAPES[name]
    call = described(shape, "bfloat16", on)
    chosen = config_lib.heuristic(call, on, "mosaic_tpu")
    assert chosen in set(config_lib.search_space(call, on, "mosaic_tpu"))
    keys, copies = chosen.copies(shape.S, shape.page or None, shape.K, "bfloat16")
    assert keys * copies * shape.K * 2 * shape.H * 2 >= 2**20  # a megabyte of keys and values each step
    assert chosen.num_splits == (2 if shape.B == 1 and on is device.TPU_V5P else 1)  # work for both cores
