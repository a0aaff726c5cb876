# SPDX-License-Identifier: Apache-2.0
"""The kernels for NVIDIA GPUs in the interpreter, which looks for races: Hopper's, and Ampere's with Hopper's copies.

The GPU has two multiprocessors, so that each of them works on several items.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import flash_attention, masks
from pallas_kernels.core import device
from pallas_kernels.core.arrays import arrays_of, with_arrays
from pallas_kernels.flash_attention import mosaic_gpu, reference
from pallas_kernels.flash_attention.config import Sm80Config, Sm90Config
from pallas_kernels.flash_attention.mosaic_gpu import sm90, sm90_backward
from pallas_kernels.flash_attention.shapes import SHAPES, Shape, causal, everything, normal, plain
from tests import conformance, interpreters
from tests.flash_attention import test_conformance

HOPPER = dataclasses.replace(device.H100, num_cores=2)


# What takes a path of its own: one and several tiles, ragged tails, rows that see nothing, grouped heads, schedules
# known while tracing and not, padded heads, and each width of heads with its own tiles.
CASES = {name: SHAPES[name] for name in ("ragged_113_203", "causal_tall_200_70", "mqa_packed_300")} | {
    "head_dim_72": Shape(1, 130, 130, 1, 1, 72, extras=causal),
    "full": Shape(1, 130, 200, 2, 2, 128),
    "grouped": Shape(1, 130, 300, 2, 1, 128, extras=causal),
    "everything": Shape(2, 90, 150, 4, 2, 48, 56, extras=everything),
}
pytestmark = pytest.mark.timeout(120, method="thread")
LATER = pytest.mark.slow  # 10 to 30 s in the interpreter; another case of `make test` takes the same path


@pytest.fixture
def hopper():
    if device.current().arch != "sm90":
        pytest.skip(f"Hopper's kernels do not run on {device.current()}")


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
class TestAmpereOnHopper(test_conformance.TestFlashAttention):
    """Ampere's kernels, which Hopper runs if it is asked to; without a config the suite runs Hopper's."""

    implementations = ("mosaic_gpu",)
    config = Sm80Config(block_q=64, block_k=32, dkv_block_q=32, dkv_stages=1, dq_block_k=32)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("large", ["d128_causal_2k", "gqa_32_8_2k", "d64_full_2k", "packed_16k"])
def test_gradients_repeat_ten_times(large):
    arguments = SHAPES[large].make("bfloat16", jax.random.key(0))
    arrays = arrays_of(arguments)

    def call(arrays):
        return flash_attention(**with_arrays(arguments, arrays), return_lse=True, implementation="mosaic_gpu")

    run = jax.jit(functools.partial(conformance.value_and_gradients, call))
    cotangents = conformance.random_cotangents(call, arrays, 0)
    first = run(arrays, cotangents)
    for _ in range(9):
        jax.tree.map(np.testing.assert_array_equal, first, run(arrays, cotangents))


def check(shape: Shape, config: Sm80Config | Sm90Config, dtype="bfloat16") -> None:
    """Output, LSE and all gradients, as right as the naive way allows."""
    arguments = shape.make(dtype, jax.random.key(0))
    check_arguments(arguments, config)


def check_arguments(arguments, config: Sm80Config | Sm90Config) -> None:
    def call(arrays):
        options = {"return_lse": True, "implementation": "mosaic_gpu", "config": config}
        return flash_attention(**with_arrays(arguments, arrays), **options)

    with device.assume(HOPPER), interpreters.mosaic_gpu():
        conformance.assert_agrees(
            call,
            lambda arrays: reference.specified(with_arrays(arguments, arrays)),
            lambda arrays: reference.naively(with_arrays(arguments, arrays)),
            arrays_of(arguments),
        )


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=LATER) if n in ("ragged_113_203", "mqa_packed_300", "full") else n for n in CASES]
)
def test_hopper(name):
    check(CASES[name], Sm90Config())


@pytest.mark.parametrize(
    "config",
    [
        Sm90Config(3, stages=3, lazy_rescale=True),
        pytest.param(Sm90Config(block_k=64, stages=1, q_stages=1), marks=LATER),
        pytest.param(Sm90Config(block_k=160), marks=LATER),
    ],
    ids=str,
)
def test_tiles_of_hopper(config):
    check(Shape(1, 330, 260, 1, 1, 64), config, "float16")


def every_kind_of_row(shape, random):
    """Bias and mask that differ by batch element, head and row."""
    lengths = jnp.asarray(random.integers(shape.S // 2, shape.S, shape.B))
    ids = [jnp.asarray(np.sort(random.integers(0, 2, (shape.B, n)))) for n in (shape.T, shape.S)]
    per_head = jnp.asarray(random.random((shape.N, shape.T, shape.S)) < 0.9)
    mask = masks.Causal() & masks.Window(80, None) & masks.Dense(per_head)
    mask = mask | masks.Segments(*ids) & masks.Lengths(lengths)
    return {"mask": mask, "bias": normal(random, (shape.N, shape.T, 1), "float32")}


@pytest.mark.parametrize(
    ("config", "extras"),
    [(Sm90Config(), every_kind_of_row), pytest.param(Sm80Config(), causal, marks=LATER)],
    ids=["sm90", "sm80"],
)
def test_heads_of_a_group_share_tiles_of_short_queries(config, extras, monkeypatch):
    shape, seen = Shape(2, 20, 150, 4, 2, 64, extras=extras), []
    monkeypatch.setattr(mosaic_gpu, "_forward", functools.partial(_spied, seen, mosaic_gpu._forward))
    check(shape, config)
    assert set(seen) == {(2, 40, 2, 64)}


def _spied(seen, forward, query, *arguments, **options):
    seen.append(query.shape)
    return forward(query, *arguments, **options)


@pytest.mark.slow  # as "everything" in test_hopper and test_ampere, with three heads of a group
@pytest.mark.parametrize("config", [Sm90Config(), Sm80Config()], ids=lambda config: type(config).__name__)
def test_bias(config):
    check(SHAPES["everything_90_150"], config)


@pytest.mark.parametrize(
    ("bias", "extras"),
    [
        pytest.param((90, 1), plain, marks=LATER),
        ((1, 2, 90, 130), causal),
        pytest.param((2, 1, 1, 130), causal, marks=LATER),
    ],
    ids=["rows", "heads", "columns"],
)
def test_the_gradient_of_a_broadcast_bias_is_summed(bias, extras):
    arguments = Shape(2, 90, 130, 2, 1, 64, extras=extras).make("bfloat16", jax.random.key(3))
    check_arguments(arguments | {"bias": normal(np.random.default_rng(0), bias)}, Sm90Config())


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=LATER) for n in ("ragged_113_203", "mqa_packed_300")), "everything"]
)
def test_ampere(name):
    check(CASES[name], Sm80Config(block_q=64, block_k=32, dkv_block_q=32, dq_block_k=32))


def multiply(x: jax.Array, wait_n: int, refill: bool):
    """x @ x, then another product; the first is read, or its operand filled anew, when `wait_n` may be in flight."""

    def kernel(x_gmem, out_gmem, smem, barrier):
        def products(first, second):
            plgpu.wgmma(first, smem, smem)
            if not refill:
                plgpu.wgmma(second, smem, smem)
                return plgpu.wgmma_accumulator_load(first, wait_n=wait_n)
            plgpu.wgmma_wait(wait_n)
            plgpu.copy_gmem_to_smem(x_gmem, smem, barrier)
            plgpu.barrier_wait(barrier)
            return first[...]

        plgpu.copy_gmem_to_smem(x_gmem, smem, barrier)
        plgpu.barrier_wait(barrier)
        accumulator = sm90.Accumulator(x.shape, jnp.float32)
        out_gmem[...] = pl.run_scoped(products, accumulator, accumulator)

    out = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    run = plgpu.kernel(kernel, out_type=out, scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()])
    with interpreters.mosaic_gpu():
        return jax.block_until_ready(run(x))


@pytest.mark.parametrize(("refill", "enough"), [(False, 1), (True, 0)])
def test_the_interpreter_finds_a_missing_wait_for_a_product(refill, enough):
    x = jnp.ones((64, 64), jnp.bfloat16)
    np.testing.assert_array_equal(multiply(x, enough, refill), 64.0)
    with pytest.raises(interpreters.RaceDetected):
        multiply(x, enough + 1, refill)


def test_wide_heads_mix_both():
    """Hopper's forward pass, Ampere's backward pass: heads of 192 are too wide for the other."""
    check(Shape(1, 70, 140, 1, 1, 192, 128, extras=causal), Sm90Config(block_k=64))


def test_a_config_that_does_not_fit_says_so():
    arguments = SHAPES["head_dims_192_128"].make("bfloat16", jax.random.key(0))
    with (
        device.assume(HOPPER),
        pytest.raises(ValueError, match="288 KiB of shared memory for head dims of 192 and 128"),
    ):
        flash_attention(**arguments, implementation="mosaic_gpu", config=Sm90Config())


def test_vmap():
    shape = Shape(1, 70, 140, 1, 1, 64, extras=causal)
    first, second = (arrays_of(shape.make("bfloat16", jax.random.key(seed))) for seed in (0, 1))
    template = shape.make("bfloat16", jax.random.key(0))
    arrays = [jnp.stack(pair) for pair in zip(first, second, strict=True)]

    def of(method):
        return jax.vmap(lambda arrays: method(with_arrays(template, arrays)))

    def attend(arguments):
        return flash_attention(**arguments, return_lse=True, implementation="mosaic_gpu", config=Sm90Config())

    with device.assume(HOPPER), interpreters.mosaic_gpu():
        conformance.assert_agrees(of(attend), of(reference.specified), of(reference.naively), arrays)


def test_types_inside_shard_map():
    """Tracing is what shard_map's check of types looks at; on a GPU the conformance suite runs it."""
    suite = test_conformance.TestFlashAttention()
    arguments, specs, out_specs = suite.sharded()
    arguments |= {name: arguments[name].astype("bfloat16") for name in ("query", "key", "value")}
    arrays, leaves = arrays_of(arguments), [spec for name, spec in specs.items() for _ in arrays_of(arguments[name])]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def attend(arrays):
        options = {"return_lse": True, "implementation": "mosaic_gpu", "config": Sm90Config()}
        return flash_attention(**with_arrays(arguments, arrays), **options)

    with device.assume(HOPPER):
        call = jax.shard_map(attend, mesh=mesh, in_specs=(leaves,), out_specs=out_specs)
        cotangents = conformance.random_cotangents(call, arrays, 0)
        _, gradients = jax.eval_shape(functools.partial(conformance.value_and_gradients, call), arrays, cotangents)
    assert [x.shape for x in gradients] == [x.shape for x in arrays if conformance.is_floating(x)]


def backward_of(shape: Shape, num_sms: int, dout=None, dlse=None, **changes):
    """The gradients of one call by Hopper's backward kernel; random cotangents unless given."""
    inputs = shape.make("bfloat16", jax.random.key(3)) | changes
    out, lse = reference.naively(inputs)
    random = np.random.default_rng(0)
    dout = normal(random, out.shape, out.dtype) if dout is None else dout
    dlse = normal(random, lse.shape) if dlse is None else dlse

    def run(query, key, value, out, lse, dout, dlse):
        arguments = (query, key, value, None, None, inputs.get("mask"), out, lse, dout, dlse)
        options = {"scale": shape.H**-0.5, "soft_cap": None, "config": Sm90Config(), "num_sms": num_sms}
        return sm90_backward.backward(*arguments, **options)

    with device.assume(HOPPER), interpreters.mosaic_gpu():
        return jax.jit(run)(inputs["query"], inputs["key"], inputs["value"], out, lse, dout, dlse)


def test_gradients_do_not_depend_on_who_adds_first():
    shape = Shape(1, 150, 300, 2, 1, 64, extras=causal)
    jax.tree.map(np.testing.assert_array_equal, *[backward_of(shape, num_sms) for num_sms in (1, 3)])


@pytest.mark.parametrize("size", [1e-20, pytest.param(1.0, marks=LATER), 1e15])
def test_the_largest_gradient_there_can_be_fits_in_an_integer(size):
    """Two halves of the keys, opposite in all: dP = +-|dO||V| and P = 1 / S, so that |dQ| = scale |dO||V||K|."""
    shape = Shape(1, 64, 256, 1, 1, 64)
    sign = jnp.where(jnp.arange(256) < 128, 1.0, -1.0)[None, :, None, None]
    key = (3 * sign * jnp.eye(64)[7]).astype(jnp.bfloat16)
    value = (2 * sign * jnp.eye(64)[9]).astype(jnp.bfloat16)
    dout = jnp.zeros((1, 64, 1, 64), jnp.bfloat16).at[..., 9].set(size)
    inputs = {"query": jnp.zeros((1, 64, 1, 64), jnp.bfloat16), "key": key, "value": value}
    dq = backward_of(shape, 2, dout=dout, dlse=jnp.zeros((1, 1, 64)), **inputs).query
    expected = np.zeros((1, 64, 1, 64))
    expected[..., 7] = np.float64(dout[0, 0, 0, 9]) * 2 * 3 / 8
    np.testing.assert_allclose(np.asarray(dq, np.float64), expected, rtol=2**-8)


def test_padding_that_nobody_sees_does_not_coarsen_gradients():
    """Integers of dQ are as fine as the largest key that is seen allows."""
    shape = Shape(1, 70, 200, 2, 1, 64)
    mask = masks.Lengths(jnp.asarray([120], jnp.int32))
    clean = shape.make("bfloat16", jax.random.key(3))
    dirty = {name: clean[name].at[:, 128:].set(1e30) for name in ("key", "value")}
    expected, found = (backward_of(shape, 2, mask=mask, **changes) for changes in ({}, dirty))
    np.testing.assert_array_equal(expected.query, found.query)
    assert np.isfinite(np.asarray(found.key, np.float32)).all()


def test_what_is_not_a_number_stays_so():
    shape = Shape(1, 70, 130, 2, 2, 64)
    query = shape.make("bfloat16", jax.random.key(3))["query"].at[0, 5, 1].set(jnp.nan)
    dq = backward_of(shape, 2, query=query).query
    bad = np.isnan(np.asarray(dq, np.float32)).all(-1)
    assert bad[0, 5, 1]
    assert not bad[0, :, 0].any()
