# SPDX-License-Identifier: Apache-2.0
"""The specification against SciPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from pallas_kernels import decode_attention

B, T, S, N, K, H, Hv, PAGE = 3, 2, 12, 4, 2, 6, 5, 4


def by_scipy(query, key, value, lengths, sink, scale, soft_cap, window):
    """Row by row, with scipy.special doing the softmax over the visible keys and the sink."""
    out, lse = np.zeros((B, T, N, Hv)), np.zeros((B, N, T))
    for b, t, n in np.ndindex(B, T, N):
        k, position = n // (N // K), lengths[b] - T + t
        seen = [s for s in range(S) if s < lengths[b] and position - window < s <= position]
        row = np.append(soft_cap * np.tanh(key[b, seen, k] @ query[b, t, n] * scale / soft_cap), sink[n])
        lse[b, n, t] = scipy.special.logsumexp(row)
        out[b, t, n] = scipy.special.softmax(row)[:-1] @ value[b, seen, k]
    return out, lse


def test_reference_equals_scipy(float64):
    random = np.random.default_rng(0)
    shapes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, Hv), "sink": (N,)}
    arrays = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    lengths, options = np.array([12, 0, 7]), {"scale": 0.7, "soft_cap": 2.0, "window": 5}
    want = by_scipy(**arrays, lengths=lengths, **options)
    arguments = jax.tree.map(jnp.asarray, arrays) | {"lengths": jnp.asarray(lengths)} | options
    got = decode_attention(**arguments, return_lse=True, implementation="reference")
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-13)

    # The same cache in pages, and as integers that a scale for each head makes numbers.
    table = random.permutation(B * S // PAGE).reshape(B, S // PAGE)
    pages = {}
    for name in ("key", "value"):
        whole = np.zeros((B * S // PAGE, PAGE, *arrays[name].shape[2:]))
        whole[table.ravel()] = arrays[name].reshape(whole.shape)
        pages[name] = jnp.asarray(whole)
    paged = decode_attention(
        **(arguments | pages), page_table=jnp.asarray(table), return_lse=True, implementation="reference"
    )
    for g, w in zip(paged, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-13)


def test_scales_are_those_of_heads(float64):
    random = np.random.default_rng(1)
    key, value = (random.integers(-9, 10, (B, S, K, H)) for _ in range(2))
    key_scale, value_scale = random.uniform(0.1, 1, (2, K))
    query, lengths = jnp.asarray(random.standard_normal((B, N, H))), jnp.full(B, S)
    plain = decode_attention(
        query,
        jnp.asarray(key * key_scale[:, None]),
        jnp.asarray(value * value_scale[:, None]),
        lengths,
        implementation="reference",
    )
    quantized = decode_attention(
        query,
        jnp.asarray(key, jnp.int8),
        jnp.asarray(value, jnp.int8),
        lengths,
        key_scale=jnp.asarray(key_scale),
        value_scale=jnp.asarray(value_scale),
        implementation="reference",
    )
    np.testing.assert_allclose(plain, quantized, rtol=1e-12, atol=1e-13)
