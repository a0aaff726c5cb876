# SPDX-License-Identifier: Apache-2.0
"""Error compensation: against GPTQ by its definition in NumPy, and by what it is for, the error of outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantize
from pallas_kernels.quantized_matmul import fit, gptq


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def correlated(rows, K, seed=1):
    """Inputs [rows, K] that are mixtures of a few, of very different sizes."""
    mixture = normal((K // 8, K), seed) * np.geomspace(0.1, 3, K)[None]
    return normal((rows, K // 8), seed + 1) @ mixture + 0.1 * normal((rows, K), seed + 2)


def one_by_one(w, hessian, groups, fitted):
    """Codes [K, N], GPTQ in float64 by its definition: after each input, the best change of all that are left, from the
    inverse of what is left of H (no factorization, no blocks)."""
    w, K = w.astype(np.float64), len(w)
    hessian = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(K)
    codes = np.zeros(w.shape)
    for k in range(K):
        if k % groups == 0:
            grid, _ = fitted(k // groups, w[k : k + groups])
            scale, zero, least, most = (np.asarray(x, np.float64) for x in grid)
        codes[k] = np.clip(np.round(w[k] / scale) + zero, least, most)
        error = w[k] - (codes[k] - zero) * scale
        # Minimizes d^T H d over d = change of inputs k ... K-1, where that of k is -error.
        w[k + 1 :] += np.linalg.solve(hessian[k + 1 :, k + 1 :], hessian[k + 1 :, k])[:, None] * error
    return codes


@pytest.mark.parametrize("groups", [16, 48, 192])
def test_codes_are_those_of_gptq(groups):
    """Of blocks that are smaller than a group (192), as large, and of a size of their own (48)."""
    K, N = 192, 16
    w, x = normal((K, N)), correlated(400, K)
    hessian = (x.T @ x).astype(np.float64)
    rule = fit.FitGroup(4, "float32")
    want = one_by_one(w, hessian, groups, lambda g, part: rule(jnp.asarray(part, jnp.float32), None))
    got, _ = gptq.compensated(jnp.asarray(w.reshape(-1, groups, N)), jnp.zeros(K // groups), rule, hessian)
    # A weight within rounding of the middle between two points may fall to either side, and moves those after it.
    assert np.mean(np.asarray(got).reshape(K, N) != want) < 0.01


def output_error(x, w, weight):
    return float(np.sum((x @ (np.asarray(weight.dequantize(), np.float64) - w)) ** 2))


@pytest.mark.parametrize("scheme", ["mixed_2_4", "int4", "int8"])
def test_outputs_are_nearer_than_by_plain_rounding(scheme):
    w, x = normal((256, 35)), correlated(300, 256)
    options = {"strips": np.arange(16) % 4 == 0} if scheme == "mixed_2_4" else {}
    plain = output_error(x, w, quantize(w, scheme, **options))
    assert output_error(x, w, quantize(w, scheme, hessian=x.T @ x, **options)) < 0.7 * plain


@pytest.mark.parametrize("scheme", ["mixed_2_4", "int2", "int8"])
def test_uncorrelated_inputs_are_rounded_by_themselves(scheme):
    """H = identity, and a K that is no multiple of a strip or a group."""
    w = normal((200, 35))
    got, want = quantize(w, scheme, hessian=np.eye(200)), quantize(w, scheme)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_inputs_that_were_never_there_are_rounded_by_themselves():
    """No error goes to their weights, and none comes from them."""
    w, x = normal((64, 16)), correlated(200, 64)
    w[5] /= 4  # far from the largest, which makes the scale
    x[:, 5] = 0
    dead = np.asarray(quantize(w, "int8", hessian=x.T @ x).dequantize())
    np.testing.assert_array_equal(dead[5], quantize(w, "int8").dequantize()[5])
    others = np.delete(np.arange(64), 5)
    w[5] *= 2
    again = np.asarray(quantize(w, "int8", hessian=x.T @ x).dequantize())
    np.testing.assert_array_equal(again[others], dead[others])
    assert (dead[others] != np.asarray(quantize(w, "int8").dequantize())[others]).any()
    none = quantize(w, "int4", hessian=np.zeros((64, 64)))
    jax.tree.map(np.testing.assert_array_equal, none, quantize(w, "int4"))


def test_the_factor_is_that_of_the_inverse():
    x = correlated(100, 48).astype(np.float64)
    hessian = x.T @ x / np.mean(np.sum(x**2, 0))
    U = gptq.factor(7 * x.T @ x)
    np.testing.assert_array_equal(U, np.triu(U))
    np.testing.assert_allclose(U.T @ U @ (hessian + 0.01 * np.eye(48)), np.eye(48), atol=1e-9)
