# SPDX-License-Identifier: Apache-2.0
"""Asynchronous softmax: rows out of bounds are found, computed again, and counted; gradients do not notice.

Expected numbers are NumPy's, in float64.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import SoftmaxStats, UnifiedMax, UnsupportedError, explain, flash_attention, masks
from pallas_kernels.core import device
from pallas_kernels.core.arrays import arrays_of, with_arrays
from pallas_kernels.flash_attention import reference, tiles
from pallas_kernels.flash_attention.config import Sm80Config, Sm90Config, XlaConfig
from pallas_kernels.flash_attention.mosaic_gpu import sm90, work
from pallas_kernels.flash_attention.shapes import SHAPES, Shape, asynchronous, causal, everything, plain
from tests import conformance, interpreters

TWO_SMS = dataclasses.replace(device.H100, num_cores=2)
# Several tiles of rows and of keys in every implementation.
T, S, H = 140, 150, 64
IMPLEMENTATIONS = ("reference", "xla", "mosaic_gpu")
# In the interpreter a case takes 10 to 20 s.
INTERPRETED_LATER = tuple(
    pytest.param(name, marks=pytest.mark.slow) if name == "mosaic_gpu" else name for name in IMPLEMENTATIONS
)
pytestmark = pytest.mark.timeout(240, method="thread")


def run(implementation: str, arguments: dict, **options) -> Any:
    """The call with LSE and statistics; `mosaic_gpu` in the interpreter, on a Hopper GPU of two multiprocessors."""
    arrays = arrays_of(arguments)
    config = {"xla": XlaConfig(64, 64), "mosaic_gpu": Sm90Config()}.get(implementation)
    options = {"return_lse": True, "return_stats": True, "implementation": implementation, "config": config} | options

    def call(arrays):
        return flash_attention(**with_arrays(arguments, arrays), **options)

    if implementation != "mosaic_gpu":
        return jax.jit(call)(arrays)
    with device.assume(TWO_SMS), interpreters.mosaic_gpu():
        return jax.block_until_ready(jax.jit(call)(arrays))


def with_logits(logits, dtype="bfloat16") -> dict:
    """A call whose logits are the given ones [B, N, T, S], as a bias: queries are 0."""
    B, N, T, S = logits.shape
    value = jnp.asarray(np.random.default_rng(0).standard_normal((B, S, N, H)), dtype)
    zeros = {name: jnp.zeros((B, rows, N, H), dtype) for name, rows in (("query", T), ("key", S))}
    return {**zeros, "value": value, "bias": jnp.asarray(logits, jnp.float32)}


def exactly(logits, value) -> tuple[np.ndarray, np.ndarray]:
    """Output [B, T, N, H] and LSE [B, N, T] in float64; -inf hides."""
    x = np.asarray(logits, np.float64)
    m = x.max(-1, keepdims=True, initial=-1e300)
    weights = np.exp(x - m)
    total = weights.sum(-1)
    with np.errstate(divide="ignore"):
        lse = m[..., 0] + np.log(total)
    weights /= np.where(total == 0, 1, total)[..., None]
    return np.einsum("bnts,bsnh->btnh", weights, np.asarray(value, np.float64)), lse


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(-5, 5, shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_logit_far_above_and_one_row_far_below(implementation):
    logits = noise(2, 2, T, S)
    logits[0, 1, 3, 140] += 100
    logits[1, 0, 130] -= 200
    logits[1, 0, 139, 0] = -21  # one key too low is enough
    arguments = with_logits(logits)
    out, lse, stats = run(implementation, arguments, unified_max=UnifiedMax(0.0, -20.0, 20.0))
    assert isinstance(stats, SoftmaxStats)
    assert stats.recomputed_rows.tolist() == [1, 2]
    want, want_lse = exactly(logits, arguments["value"])
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5)
    np.testing.assert_allclose(np.float32(out), want, atol=0.02)


@pytest.mark.parametrize("implementation", INTERPRETED_LATER)
def test_bounds_are_taken_from_phi_and_each_head_has_its_own(implementation):
    """Logits of head n lie around 30 n - 15: with one phi every row of a head is out of bounds, with two none is."""
    logits = noise(1, 2, T, S) + np.array([-15.0, 15.0])[:, None, None]
    arguments = with_logits(logits)
    want, want_lse = exactly(logits, arguments["value"])
    for phi, count in ((-15.0, T), (jnp.asarray([-15.0, 15.0]), 0)):
        out, lse, stats = run(implementation, arguments, unified_max=UnifiedMax(phi, -6.0, 7.0))
        assert stats.recomputed_rows.tolist() == [count]
        np.testing.assert_allclose(lse, want_lse, rtol=1e-5)
        np.testing.assert_allclose(np.float32(out), want, atol=0.02)


@pytest.mark.parametrize("hidden_by", ["mask", "bias"])
@pytest.mark.parametrize("implementation", INTERPRETED_LATER)
def test_hidden_keys_never_count(implementation, hidden_by):
    """Nor do rows and keys of a tile that are beyond T and S, where phi is far from 0."""
    hidden = np.random.default_rng(2).random((1, 2, T, S)) < 0.5
    hidden[:, :, 7] = True  # a row that sees nothing
    logits = noise(1, 2, T, S) + 40
    arguments = with_logits(np.where(hidden, 1000.0, logits))
    if hidden_by == "mask":
        arguments["mask"] = masks.Dense(jnp.asarray(~hidden))
    else:
        arguments["bias"] = jnp.asarray(np.where(hidden, -np.inf, logits), jnp.float32)
    out, lse, stats = run(implementation, arguments, unified_max=UnifiedMax(40.0, -6.0, 6.0))
    assert stats.recomputed_rows.tolist() == [0]
    want, want_lse = exactly(np.where(hidden, -np.inf, logits), arguments["value"])
    np.testing.assert_array_equal(np.asarray(out, np.float32)[:, 7], 0)
    np.testing.assert_array_equal(lse[:, :, 7], -np.inf)
    np.testing.assert_allclose(np.delete(lse, 7, 2), np.delete(want_lse, 7, 2), rtol=1e-5)
    np.testing.assert_allclose(np.float32(out), want, atol=0.02)


@pytest.mark.parametrize("implementation", INTERPRETED_LATER)
def test_a_row_that_sees_nothing_has_its_sink(implementation):
    """However far the sink is from phi."""
    arguments = with_logits(noise(1, 2, 8, 16)) | {"mask": masks.Dense(jnp.zeros((8, 16), bool))}
    sink = jnp.asarray([-60.0, 3.0])
    out, lse, stats = run(implementation, arguments | {"sink": sink}, unified_max=UnifiedMax(60.0, -60.0, 60.0))
    assert stats.recomputed_rows.tolist() == [0]
    np.testing.assert_array_equal(np.float32(out), 0)
    np.testing.assert_allclose(lse, np.broadcast_to(sink[:, None], (1, 2, 8)), rtol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_soft_cap_comes_first(implementation):
    """Products of 1000 are logits of 10."""
    query = jnp.full((1, 4, 1, 1), 1000.0)
    arguments = {"query": query, "key": jnp.ones((1, 8, 1, 1)), "value": jnp.ones((1, 8, 1, 1)), "scale": 1.0}
    for soft_cap, count in ((10.0, 0), (None, 4)):
        _, lse, stats = run(implementation, arguments, soft_cap=soft_cap, unified_max=UnifiedMax())
        assert stats.recomputed_rows.tolist() == [count]
        np.testing.assert_allclose(lse, (soft_cap or 1000.0) + np.log(8), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_beyond_float16(dtype):
    arguments = with_logits(noise(1, 1, 8, 16) + 25, dtype)
    out, _, stats = run("xla", arguments, unified_max=UnifiedMax())
    assert stats.recomputed_rows.tolist() == [0]
    want, _ = exactly(arguments["bias"], arguments["value"])
    np.testing.assert_allclose(np.float32(out), want, atol=0.02)


def test_without_it_nothing_is_counted():
    for implementation in ("reference", "xla"):
        *_, stats = run(implementation, with_logits(noise(3, 1, 4, 8)))
        assert stats.recomputed_rows.tolist() == [0, 0, 0]


# ---- Hopper's kernel, in the interpreter ----


def check(arguments: dict, config: Sm90Config, arrays=None, transform=lambda f: f) -> None:
    """Output, LSE and all gradients, as right as the naive way allows."""

    def attend(arguments):
        return flash_attention(**arguments, return_lse=True, implementation="mosaic_gpu", config=config)

    def of(method):
        return transform(lambda arrays: method(with_arrays(arguments, arrays)))

    arrays = arrays_of(arguments) if arrays is None else arrays
    with device.assume(TWO_SMS), interpreters.mosaic_gpu():
        conformance.assert_agrees(of(attend), of(reference.specified), of(reference.naively), arrays)


@pytest.mark.parametrize("name", [pytest.param("asynchronous_140_150", marks=pytest.mark.slow), "everything"])
def test_hopper(name):
    everything_at_once = Shape(2, 90, 150, 2, 1, 48, 56, extras=asynchronous(everything, 4.0))
    shape = SHAPES.get(name, everything_at_once)
    check(shape.make("bfloat16", jax.random.key(0)), Sm90Config())


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        pytest.param(
            Shape(1, 130, 200, 2, 2, 128, extras=asynchronous(plain, 3.2)), Sm90Config(), marks=pytest.mark.slow
        ),
        pytest.param(
            Shape(1, 200, 260, 1, 1, 64, extras=asynchronous(causal, 3.2)),
            Sm90Config(3, stages=3),
            marks=pytest.mark.slow,
        ),
        (Shape(2, 90, 150, 2, 1, 48, 56, extras=asynchronous(everything, 4.0)), Sm90Config(block_k=64)),
    ],
    ids=["full", "three_consumers", "everything"],
)
def test_hopper_computes_again_what_the_specification_does(shape, config):
    arguments = shape.make("bfloat16", jax.random.key(4))
    out, lse, stats = run("mosaic_gpu", arguments, config=config)
    want, want_lse, expected = run("reference", arguments)
    np.testing.assert_array_equal(stats.recomputed_rows, expected.recomputed_rows)
    assert 0 < np.sum(stats.recomputed_rows) < lse.size
    np.testing.assert_allclose(np.float32(out), np.float32(want), atol=0.02)
    np.testing.assert_allclose(lse, want_lse, atol=1e-3)


@pytest.mark.slow
def test_vmap():
    """In a loop, where the second launch does not work in place."""
    shape = Shape(1, 70, 140, 2, 2, 64, extras=asynchronous(causal, 3.2))
    first, second = (shape.make("bfloat16", jax.random.key(seed)) for seed in (0, 1))
    arrays = [jnp.stack(pair) for pair in zip(arrays_of(first), arrays_of(second), strict=True)]
    check(first, Sm90Config(), arrays, jax.vmap)


@pytest.mark.slow
def test_short_queries_share_tiles_where_heads_share_phi(monkeypatch):
    seen = []

    def spy(query, *arguments, **options):
        seen.append(query.shape)
        return forward(query, *arguments, **options)

    forward = sm90.forward_asynchronously
    monkeypatch.setattr(sm90, "forward_asynchronously", spy)
    arguments = Shape(3, 20, 150, 6, 2, 64, extras=causal).make("bfloat16", jax.random.key(0))
    for phi in (0.25, jnp.full(6, 0.25)):
        given = arguments | {"unified_max": UnifiedMax(phi, -3.0, 3.0)}
        found, expected = (run(name, given) for name in ("mosaic_gpu", "reference"))
        np.testing.assert_array_equal(found[2].recomputed_rows, expected[2].recomputed_rows)
        np.testing.assert_allclose(np.float32(found[0]), np.float32(expected[0]), atol=0.02)
        np.testing.assert_allclose(found[1], expected[1], atol=1e-4)
    assert seen == [(3, 60, 2, 64), (3, 20, 6, 64)]


def test_types_inside_shard_map():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    arguments = Shape(4, 140, 200, 4, 2, 64, extras=causal).make("bfloat16", jax.random.key(0))

    def attend(query, key, value, phi):
        options = {"mask": arguments["mask"], "implementation": "mosaic_gpu", "return_stats": True}
        return flash_attention(query, key, value, unified_max=UnifiedMax(phi), **options)

    def loss(*arrays):
        out, stats = sharded(*arrays)
        return jnp.sum(out.astype(jnp.float32) ** 2), stats

    heads = P("data", None, "model", None)
    counts: Any = P(("data", "model"))  # each device counts the rows of its heads
    specs: dict[str, Any] = {"in_specs": (heads, heads, heads, P("model")), "out_specs": (heads, SoftmaxStats(counts))}
    sharded = jax.shard_map(attend, mesh=mesh, **specs)
    arrays = [arguments[name] for name in ("query", "key", "value")] + [jnp.zeros(4)]
    with device.assume(device.H100):
        gradients, stats = jax.eval_shape(jax.grad(loss, (0, 1, 2), has_aux=True), *arrays)
    assert [x.shape for x in gradients] == [x.shape for x in arrays[:3]]
    assert stats.recomputed_rows.shape == (8,)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["scan", "vmap", "alone"])
def test_on_a_gpu_the_second_launch_works_in_place(how):
    """Also where XLA would join it with the arrays of a loop. Some rows are out of bounds, most tiles hold none."""
    if device.current().arch != "sm90":
        pytest.skip(f"Hopper's kernel does not run on {device.current()}")
    shape = Shape(2, 1024, 1024, 4, 2, 128, extras=causal)
    first, second = (shape.make("bfloat16", jax.random.key(seed)) for seed in (0, 1))
    arrays = [jnp.stack([first[name], second[name]]) for name in ("query", "key", "value")]
    arrays[0] = arrays[0].at[:, :, 700, 1].multiply(100)

    def attend(query, key, value, implementation="mosaic_gpu"):
        options = {"mask": masks.Causal(), "return_lse": True, "return_stats": True, "implementation": implementation}
        return flash_attention(query, key, value, unified_max=UnifiedMax(0.0, -30.0, 30.0), **options)

    ways = {
        "scan": lambda *arrays: jax.lax.scan(lambda carry, x: (carry, attend(*x)), None, arrays)[1],
        "vmap": jax.vmap(attend),
        "alone": lambda *arrays: jax.tree.map(
            lambda *x: jnp.stack(x), *(attend(*(x[i] for x in arrays)) for i in (0, 1))
        ),
    }
    out, lse, stats = jax.jit(ways[how])(*arrays)
    want, want_lse, expected = jax.jit(jax.vmap(functools.partial(attend, implementation="reference")))(*arrays)
    assert expected.recomputed_rows.tolist() == [[1, 1], [1, 1]]
    np.testing.assert_array_equal(stats.recomputed_rows, expected.recomputed_rows)
    np.testing.assert_allclose(np.float32(out), np.float32(want), atol=0.02)
    np.testing.assert_allclose(lse, want_lse, atol=2e-3, rtol=1e-5)


# ---- What is refused ----

X = jnp.ones((1, 8, 2, 64), jnp.bfloat16)


@pytest.mark.parametrize(
    ("where", "implementation", "dtype", "why"),
    [
        (device.A100, "mosaic_gpu", "bfloat16", "unified_max has a kernel for Hopper only, and this is NVIDIA A100"),
        (
            device.H100,
            "mosaic_gpu",
            "float16",
            "an asynchronous softmax has weights beyond the range of float16; use bfl",
        ),
        (
            device.TPU_V5E,
            "mosaic_tpu",
            "bfloat16",
            "its softmax is online; unified_max has kernels for NVIDIA Hopper GPUs, and ru",
        ),
    ],
)
def test_refusals(where, implementation, dtype, why):
    x = X.astype(dtype)
    with device.assume(where), pytest.raises(UnsupportedError) as caught:
        flash_attention(x, x, x, unified_max=UnifiedMax(), implementation=implementation)
    assert f"  why : {why}" in str(caught.value)
    assert 'try : implementation="auto" (would run "xla")' in str(caught.value)


@pytest.mark.parametrize(
    ("unified_max", "config", "error", "message"),
    [
        (3.0, None, TypeError, "unified_max must be a UnifiedMax or None, got float"),
        (UnifiedMax(jnp.zeros(3)), None, ValueError, r"unified_max.phi must be a number or \[N\] with N=2, got \(3,\)"),
        (UnifiedMax(), Sm80Config(), ValueError, "which takes a Sm90Config, but config is a Sm80Config"),
        (UnifiedMax(), Sm90Config(lazy_rescale=True), ValueError, "with unified_max there is no maximum to raise"),
    ],
)
def test_bad_calls(unified_max, config, error, message):
    with device.assume(device.H100), pytest.raises(error, match=message):
        flash_attention(X, X, X, unified_max=unified_max, implementation="mosaic_gpu", config=config)


def test_a_gradient_does_not_mind_who_ran_forward():
    """Hopper's backward pass takes float16, whose asynchronous forward pass runs in xla."""
    call = functools.partial(flash_attention, X.astype("float16"), X.astype("float16"), X.astype("float16"))
    with device.assume(device.H100):
        forward, backward = explain(call, unified_max=UnifiedMax())
    assert (forward.implementation, backward.implementation) == ("xla", "mosaic_gpu")


# ---- Work of the second launch ----


def test_work_that_is_wanted_stays_with_its_multiprocessor():
    plan = work.plan(tiles.schedule(masks.Causal(), 512, 512, 128, 128), 2, 3, 4, planes_in_cache=2)
    wanted = jnp.zeros((2, 3, 4), bool).at[0, 1, 2].set(True).at[1, 2, 0].set(True)
    some, none = (work.some_of(plan, x) for x in (wanted, jnp.zeros((2, 3, 4), bool)))
    numbers = [1 * 4 + 2, (3 + 2) * 4 + 0]
    np.testing.assert_array_equal(some.items, np.where(np.isin(plan.items, numbers), plan.items, work.NO_ITEM))
    rounds = np.argwhere(np.isin(plan.items, numbers))[:, 0]
    assert some.rounds is not None
    assert none.rounds is not None
    assert some.rounds.tolist() == [rounds.max() + 1]
    assert none.rounds.tolist() == [0]
