# SPDX-License-Identifier: Apache-2.0
"""Bad calls of quantized_matmul say what is wrong and what to do; a quantized weight has no gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import UnsupportedError, explain, quantized_matmul
from pallas_kernels.quantized_matmul import xla
from pallas_kernels.quantized_matmul.config import heuristic
from pallas_kernels.quantized_matmul.shapes import SHAPES, Shape

IMPLEMENTATIONS = ("xla", "reference")


@pytest.fixture
def x(float64):
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 40)))


@pytest.fixture(scope="module")
def weight():
    return Shape(1, 15, 40).make("float32", jax.random.key(0))["weight"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"weight": jnp.ones((40, 15))},
            TypeError,
            "weight must be a MixedBitWeight or an IntWeight, got ArrayImpl; pal",
        ),
        ({"x": jnp.ones((3, 41))}, ValueError, "weight must have shape [K, N] with K=41, got (40, 15)."),
        ({"x": jnp.ones(())}, ValueError, "x must have shape [..., K], got ()."),
        ({"x": jnp.ones((0, 40))}, ValueError, "B0=0 (x); every axis needs a size > 0."),
        ({"bias": jnp.ones(16)}, ValueError, "bias must have shape [N] with N=15, got (16,)."),
        ({"bias": jnp.ones(15, jnp.bfloat16)}, TypeError, "x, bias must have one dtype, got x float64, bias bfloat16"),
        ({"x": jnp.ones((3, 40), int)}, TypeError, "x must be one of float32, bfloat16, float16, float64, got int32."),
        (
            {"activation": "relu"},
            ValueError,
            'activation must be one of "silu", "gelu", "gelu_exact", "swiglu" or None, got \'relu\'.',
        ),
        ({"activation": "swiglu"}, ValueError, "an even number; weight has N=15."),
        ({"config": 3}, ValueError, 'implementation "xla" takes no config, got 3.'),
        ({"implementation": "mosaic_tpu"}, UnsupportedError, "why : its kernels are for TPUs, and this is cpu"),
    ],
)
def test_bad_calls(x, weight, change, error, message):
    with pytest.raises(error) as caught:
        quantized_matmul(**{"x": x, "weight": weight, "implementation": "xla"} | change)
    assert message in str(caught.value)


def test_a_weight_that_does_not_fit_together_is_refused(x, weight):
    shorter = dataclasses.replace(weight, main=dataclasses.replace(weight.main, words=weight.main.words[:, :3]))
    with pytest.raises(ValueError, match=r"quantized_matmul: weight: main.words of a weight \[K=40, N=15\] must have"):
        quantized_matmul(x, shorter)
    other = dataclasses.replace(weight, tail_index=weight.tail_index.astype(jnp.float32))
    with pytest.raises(TypeError, match=r"quantized_matmul: weight: tail_index must be int32, got float32."):
        quantized_matmul(x, other)
    with pytest.raises(ValueError, match="has no configuration for 'xla'"):
        heuristic(None, None, "xla")  # type: ignore[arg-type]


def test_one_row_needs_no_axis_of_rows(x, weight):
    np.testing.assert_allclose(quantized_matmul(x[0, 0], weight), quantized_matmul(x, weight)[0, 0], rtol=1e-12)


def test_explain_says_what_the_program_depends_on(x, weight):
    outliers = Shape(1, 16, 300, outliers=2).abstract("float32")["weight"]
    for given, text in (
        (outliers, "weight bf16[K=300,N=16] bits=mixed_2_4 tail_strips=16 outliers=32"),
        (Shape(1, 16, 300, "int8", activation_bits=8).abstract("float32")["weight"], "bits=8 activation_bits=8"),
        (Shape(1, 16, 300, "int4").abstract("float32")["weight"], "bits=4 group_size=128"),
    ):
        assert text in str(explain(quantized_matmul, jax.ShapeDtypeStruct((5, 300), jnp.float32), given))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.checkpoint])
def test_a_gradient_of_the_weight_is_refused(x, weight, implementation, transform):
    def loss(steps, x):
        changed = dataclasses.replace(weight, tail=dataclasses.replace(weight.tail, steps=steps))
        return jnp.sum(quantized_matmul(x, changed, implementation=implementation) ** 2)

    with pytest.raises(TypeError) as caught:
        jax.grad(transform(loss))(weight.tail.steps, x)
    assert "weights that are quantized have no gradient, and tail.steps of the weight is differ" in str(caught.value)
    assert "train an adapter" in str(caught.value)
    # Beside a weight that is an argument too, but not differentiated, x has its gradient.
    gradient = jax.grad(transform(loss), argnums=1)(weight.tail.steps, x)
    w = weight.dequantize()
    np.testing.assert_allclose(gradient, 2 * x @ w @ w.T, rtol=1e-12, atol=1e-13)


def test_an_adapter_trains_beside_a_weight(x, weight):
    """Through a scan over stacked layers, whose weights are data."""
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), weight)
    random = np.random.default_rng(1)
    down, up = (jnp.asarray(random.standard_normal(s)) for s in ((2, 40, 3), (2, 3, 15)))

    def loss(adapter, multiply):
        def layer(total, this):
            layer_weight, down, up = this
            return total + jnp.sum(jnp.square(multiply(x, layer_weight) + x @ down @ up)), None

        return jax.lax.scan(layer, 0.0, (stacked, *adapter))[0]

    got = jax.jit(jax.grad(lambda a: loss(a, quantized_matmul)))((down, up))
    want = jax.grad(lambda a: loss(a, lambda x, w: jnp.einsum("bmk,kn->bmn", x, w.dequantize())))((down, up))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mixed_5", "outliers_8", "int8_rows_8", "int4_3"])
def test_blocks_of_outputs_are_as_all_at_once(float64, monkeypatch, name):
    """Blocks of 32 of N' = 48 and 64: the last one overlaps the one before, or not."""
    arguments = SHAPES[name].make("float64", jax.random.key(0))
    weight, options = arguments.pop("weight"), {"activation": arguments.pop("activation"), "implementation": "xla"}

    def run(arrays, weight):
        out, gradients = jax.vjp(lambda arrays: quantized_matmul(**arrays, weight=weight, **options), arrays)
        return out, gradients(jnp.cos(out))

    whole = jax.jit(run)(arguments, weight)
    monkeypatch.setattr(xla, "BLOCK_WEIGHTS", 32 * weight.shape[0])
    in_blocks = jax.jit(lambda *inputs: run(*inputs))(arguments, weight)
    for got, want in zip(jax.tree.leaves(in_blocks), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_weights_can_be_mapped_over(x):
    """A weight for each element, as experts have."""
    weights = [Shape(1, 24, 40, four_bit_strips=1).make("float32", jax.random.key(i))["weight"] for i in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    got = jax.vmap(quantized_matmul)(x, stacked)
    for out, rows, weight in zip(got, x, weights, strict=True):
        np.testing.assert_allclose(out, rows @ weight.dequantize(), rtol=1e-12, atol=1e-13)
