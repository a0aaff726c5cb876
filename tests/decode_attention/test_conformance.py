# SPDX-License-Identifier: Apache-2.0
"""Every implementation of decode_attention against the specification, and what only this operation has."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels import UnifiedMax, decode_attention, flash_attention, masks
from pallas_kernels.decode_attention.config import XlaConfig
from pallas_kernels.decode_attention.reference import naively, specified
from pallas_kernels.decode_attention.shapes import SHAPES, Shape
from tests import conformance


class TestDecodeAttention(conformance.Suite):
    function = staticmethod(pallas_kernels.decode_attention)
    shapes = SHAPES
    implementations = ("xla", "mosaic_gpu")
    probe = "paged_window_sink"
    probe_dtypes: ClassVar = {"mosaic_gpu": "bfloat16"}
    differentiable = False
    plumbing = frozenset({*conformance.Suite.plumbing, "return_stats", "num_splits", "page_table", "unified_max"})

    def call(self, arguments, implementation):
        return decode_attention(**arguments, return_lse=True, implementation=implementation)

    def reference(self, arguments):
        return specified(arguments)

    def naive(self, arguments):
        return naively(arguments)

    def changes(self, arguments):
        half = {name: arguments[name] * 0.5 for name in ("query", "key", "value", "sink")}
        one = jnp.full(arguments["key"].shape[2], 0.5, jnp.float32)
        scales = {"key_scale": one, "value_scale": one}
        return {**half, **scales, "lengths": arguments["lengths"] // 2, "scale": 0.1, "soft_cap": 1.0, "window": 3}

    def sharded(self):
        arguments = Shape(4, 150, 4, 2, 32, T=2, extras=("sink",)).make("float32", jax.random.key(0))
        heads, rows = P("data", None, "model", None), P("data")
        specs = {"query": heads, "lengths": rows, "key": heads, "value": heads, "sink": P("model")}
        return arguments, {name: specs[name] for name in sorted(arguments)}, (heads, P("data", "model"))


def test_it_is_flash_attention_under_a_causal_mask():
    arguments = Shape(2, 40, 4, 2, 16, T=40, lengths=(40, 40)).make("float32", jax.random.key(0))
    got = decode_attention(**arguments, return_lse=True)
    del arguments["lengths"]
    for a, b in zip(got, flash_attention(**arguments, mask=masks.Causal(), return_lse=True), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("config", [XlaConfig(1), XlaConfig(16), XlaConfig(64), XlaConfig(1000)], ids=str)
@pytest.mark.parametrize("shape", ["dense_203", "paged_window_sink", "asynchronous_257"])
def test_chunks_of_any_size(shape, config):
    arguments = SHAPES[shape].make("float32", jax.random.key(1))
    if shape == "paged_window_sink" and config.block_k == 1:
        config = XlaConfig(33)  # rounds up to two pages

    def call(arguments):
        return decode_attention(**arguments, return_lse=True, implementation="xla", config=config)

    conformance.assert_agrees(call, specified, naively, arguments, gradients=False)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_sequence_without_keys_has_its_sink(implementation):
    """However far it is from phi."""
    arguments = Shape(2, 40, 4, 2, 16, lengths=(0, 40)).make("float32", jax.random.key(0))
    sink = jnp.asarray([-150.0, 3.0, 0.0, -90.0])
    out, lse = decode_attention(
        **arguments, sink=sink, unified_max=UnifiedMax(20.0), return_lse=True, implementation=implementation
    )
    np.testing.assert_allclose(lse[0], sink, rtol=1e-6)
    assert not out[0].any()


def test_what_nobody_sees_may_be_anything():
    arguments = SHAPES["dense_203"].make("float32", jax.random.key(2))
    beyond = jnp.arange(203)[None, :, None, None] >= arguments["lengths"][:, None, None, None]
    dirty = {name: jnp.where(beyond, jnp.nan, arguments[name]) for name in ("key", "value")}
    for implementation in ("reference", "xla"):
        clean = decode_attention(**arguments, return_lse=True, implementation=implementation)
        for a, b in zip(
            decode_attention(**{**arguments, **dirty}, return_lse=True, implementation=implementation),
            clean,
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)


def test_a_sequence_gets_the_same_bits_in_any_batch():
    arguments = SHAPES["splits_190"].make("float32", jax.random.key(3))
    alone = [
        decode_attention(**{n: x[b : b + 1] if hasattr(x, "shape") else x for n, x in arguments.items()})
        for b in range(3)
    ]
    np.testing.assert_array_equal(decode_attention(**arguments), jnp.concatenate(alone))


class TestAsynchronousSoftmax:
    """Rows out of bounds are found, computed again, and counted."""

    def arguments(self, logits):
        """One head whose logits are the given ones [B, S]: the query is 1, keys are logits."""
        B, S = logits.shape
        values = np.random.default_rng(0).standard_normal((B, S, 1, 4), np.float32)
        lengths = jnp.full((B,), S, jnp.int32)
        key = jnp.asarray(logits, jnp.float32)[:, :, None, None]
        return {
            "query": jnp.ones((B, 1, 1)),
            "key": key,
            "value": jnp.asarray(values),
            "lengths": lengths,
            "scale": 1.0,
        }

    @pytest.mark.parametrize("implementation", ["reference", "xla"])
    def test_the_paper_s_example(self, implementation):
        """Section 3: a = -3, b = 3, phi = 6; (4, 5, 6, 7) stays within, (3, 6, 9, 6) does not."""
        arguments = self.arguments(np.array([[4, 5, 6, 7], [3, 6, 9, 6]]))
        bounds = UnifiedMax(6.0, -3.0, 3.0)
        out, stats = decode_attention(**arguments, unified_max=bounds, return_stats=True, implementation=implementation)
        assert stats.recomputed_rows.tolist() == [0, 1]
        np.testing.assert_allclose(out, decode_attention(**arguments, implementation="reference"), rtol=1e-6)

    @pytest.mark.parametrize("chunk", [8, 64])
    def test_one_logit_far_above_and_one_row_far_below(self, chunk):
        logits = np.random.default_rng(1).uniform(-5, 5, (4, 64))
        logits[1, 40] += 100
        logits[2] -= 200
        arguments = self.arguments(logits)
        out, lse, stats = decode_attention(
            **arguments,
            unified_max=UnifiedMax(0.0, -20.0, 20.0),
            return_lse=True,
            return_stats=True,
            implementation="xla",
            config=XlaConfig(chunk),
        )
        assert stats.recomputed_rows.tolist() == [0, 1, 1, 0]
        want = decode_attention(**arguments, return_lse=True, implementation="reference")
        np.testing.assert_allclose(out, want[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse, want[1], rtol=1e-6)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_weights_beyond_float16(self, dtype):
        arguments = self.arguments(np.array([[20, 25, 18, 3], [-30, -25, -28, -40]]))
        arguments |= {name: arguments[name].astype(dtype) for name in ("query", "key", "value")}
        out, stats = decode_attention(**arguments, unified_max=UnifiedMax(), return_stats=True, implementation="xla")
        assert stats.recomputed_rows.tolist() == [0, 0]
        want = decode_attention(**arguments, implementation="reference")
        np.testing.assert_allclose(np.float32(out), np.float32(want), rtol=0.01)

    def test_hidden_keys_never_count(self):
        logits = np.full((1, 64), 1000.0)
        logits[:, 30:33] = 0.5
        arguments = self.arguments(logits) | {"lengths": jnp.asarray([33]), "window": 3}
        out, stats = decode_attention(**arguments, unified_max=UnifiedMax(), return_stats=True, implementation="xla")
        assert stats.recomputed_rows.tolist() == [0]
        np.testing.assert_allclose(out[0, 0], arguments["value"][0, 30:33, 0].mean(0), rtol=1e-5)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((0.0, 5.0, -5.0), "low must be less than high, got 5.0 and -5.0"),
            ((0.0, -5.0, 500.0), r"high must be a number within \+-60.0, got 500.0"),
            ((float("nan"), -5.0, 5.0), "phi must be finite, got nan"),
        ],
    )
    def test_bounds_that_make_no_sense(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            UnifiedMax(*arguments)
