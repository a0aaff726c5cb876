# SPDX-License-Identifier: Apache-2.0
"""The specification against SciPy in float64, finite differences, and jax.nn where the two overlap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from pallas_kernels import flash_attention, masks
from pallas_kernels.flash_attention import reference
from pallas_kernels.flash_attention.config import XlaConfig

B, T, S, N, K, H, Hv = 2, 5, 7, 4, 2, 6, 3


def inputs(seed=0):
    random = np.random.default_rng(seed)
    shapes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, Hv), "bias": (B, N, T, S), "sink": (N,)}
    return {name: random.standard_normal(shape) for name, shape in shapes.items()}


def by_scipy(query, key, value, bias, sink, visible, scale, soft_cap):
    """Head by head, with scipy.special doing the softmax over the visible keys and the sink."""
    out, lse = np.zeros((B, T, N, Hv)), np.zeros((B, N, T))
    for b, n, t in np.ndindex(B, N, T):
        k = n // (N // K)
        logits = soft_cap * np.tanh(key[b, :, k] @ query[b, t, n] * scale / soft_cap) + bias[b, n, t]
        seen = np.flatnonzero(visible[b, n, t])
        row = np.append(logits[seen], sink[n])
        lse[b, n, t] = scipy.special.logsumexp(row)
        out[b, t, n] = scipy.special.softmax(row)[:-1] @ value[b, seen, k]
    return out, lse


def test_reference_equals_scipy(float64):
    a = inputs()
    mask = masks.Causal() & masks.Lengths(jnp.asarray([S, 3]))
    visible = np.broadcast_to(np.asarray(mask.as_array(T, S)), (B, N, T, S))
    want = by_scipy(**a, visible=visible, scale=0.7, soft_cap=2.0)
    got = reference.attention(**jax.tree.map(jnp.asarray, a), mask=mask, scale=0.7, soft_cap=2.0)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-13)


def test_an_empty_row_is_zero_with_infinite_lse_and_no_gradient(float64):
    a = {name: jnp.asarray(x) for name, x in inputs().items() if name in ("query", "key", "value")}
    mask = masks.Lengths(jnp.asarray([0, S]))

    def total(a):
        out, lse = reference.attention(**a, mask=mask, scale=1.0)
        return jnp.sum(out**2) + jnp.sum(lse[1]), (out, lse)

    grads, (out, lse) = jax.grad(total, has_aux=True)(a)
    assert np.all(np.asarray(out[0]) == 0)
    assert np.all(np.isneginf(lse[0]))
    assert np.isfinite(lse[1]).all()
    assert all(np.all(np.asarray(g[0]) == 0) and np.all(np.isfinite(g)) for g in grads.values())


@pytest.mark.parametrize(
    ("implementation", "config"),
    [("reference", None), ("xla", None), ("xla", XlaConfig(2, 3))],  # the last in many ragged tiles
)
def test_gradients_equal_finite_differences(float64, implementation, config):
    a = jax.tree.map(jnp.asarray, inputs(1))
    mask = masks.Causal() & masks.Window(4, None) & masks.Lengths(jnp.asarray([S, 4]))
    weights = jax.tree.map(jnp.asarray, inputs(2))

    def total(a):
        out, lse = flash_attention(
            **a, mask=mask, soft_cap=3.0, return_lse=True, implementation=implementation, config=config
        )
        return jnp.sum(out * weights["query"][..., :Hv]) + jnp.sum(jnp.sin(lse) * weights["sink"][:, None])

    grads = jax.grad(total)(a)
    step = 1e-6
    for name, x in a.items():
        direction = jnp.asarray(np.random.default_rng(3).standard_normal(x.shape))
        slope = (total({**a, name: x + step * direction}) - total({**a, name: x - step * direction})) / (2 * step)
        np.testing.assert_allclose(jnp.sum(grads[name] * direction), slope, rtol=1e-7, err_msg=name)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_equals_jax_nn(implementation):
    """jax.nn.dot_product_attention is another team's word on scale, bias, GQA, causal, window and lengths."""
    a = {name: jnp.asarray(x, jnp.float32) for name, x in inputs(4).items()}
    key, value, bias = a["key"][:, :T], a["value"][:, :T], a["bias"][..., :T]  # it aligns causal masks top-left
    lengths = jnp.asarray([T, 3])
    want = jax.nn.dot_product_attention(
        a["query"],
        key,
        jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, H - Hv))),  # it wants Hv = H
        bias,
        scale=0.3,
        is_causal=True,
        key_value_seq_lengths=lengths,
        local_window_size=(2, 0),
    )
    mask = masks.Causal() & masks.Window(2, 0) & masks.Lengths(lengths)
    got = flash_attention(a["query"], key, value, bias, mask=mask, scale=0.3, implementation=implementation)
    # The last row of the second element sees keys 2..4, of which only key 2 exists: no row is empty here.
    np.testing.assert_allclose(got, want[..., :Hv], rtol=2e-5, atol=2e-6)
