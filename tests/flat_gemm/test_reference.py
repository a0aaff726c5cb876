# SPDX-License-Identifier: Apache-2.0
"""The specification against NumPy and SciPy in float64, and gradients against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from pallas_kernels import flat_gemm

M, N, K = 5, 12, 7


def silu(z):
    return z * scipy.special.expit(z)


def gelu(z):
    return z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def swiglu(z):
    return silu(z[..., : N // 2]) * z[..., N // 2 :]


def gelu_exact(z):
    return z * scipy.special.ndtr(z)


BY_NUMPY = {None: lambda z: z, "silu": silu, "gelu": gelu, "gelu_exact": gelu_exact, "swiglu": swiglu}


def draw(activation, transpose_w, leading=()):
    random = np.random.default_rng(0)
    O = N // 2 if activation == "swiglu" else N
    shapes = {"x": (*leading, M, K), "w": (K, N), "bias": (N,), "residual": (*leading, M, O)}
    arrays = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    z = np.einsum("...mk,kn->...mn", arrays["x"], arrays["w"]) + arrays["bias"]
    want = arrays["residual"] + BY_NUMPY[activation](z)
    if transpose_w:
        arrays["w"] = arrays["w"].T
    return {name: jnp.asarray(array) for name, array in arrays.items()}, want


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("transpose_w", [False, True])
@pytest.mark.parametrize("activation", BY_NUMPY)
def test_it_equals_numpy(float64, activation, transpose_w, implementation):
    arrays, want = draw(activation, transpose_w, leading=(2, 3))
    got = flat_gemm(**arrays, activation=activation, transpose_w=transpose_w, implementation=implementation)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("transpose_w", [False, True])
@pytest.mark.parametrize("activation", BY_NUMPY)
def test_gradients_equal_finite_differences(float64, activation, transpose_w):
    """Of every input at once, along a random direction; central differences, whose error is of order step^2."""
    arrays, want = draw(activation, transpose_w)
    random = np.random.default_rng(1)
    weights = jnp.asarray(random.standard_normal(want.shape))

    def loss(arrays):
        out = flat_gemm(**arrays, activation=activation, transpose_w=transpose_w, implementation="xla")
        return jnp.sum(out * weights)

    gradients = jax.grad(loss)(arrays)
    for name, array in arrays.items():
        direction = jnp.asarray(random.standard_normal(array.shape))
        step = 1e-5
        ahead, behind = (loss({**arrays, name: array + sign * step * direction}) for sign in (1, -1))
        along = jnp.sum(gradients[name] * direction)
        np.testing.assert_allclose(along, (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-8, err_msg=name)


def test_half_precision_sums_in_float32():
    """4096 products of 1 are lost beyond 256 in bfloat16, and the bias is added before the one rounding."""
    x, w, bias = jnp.ones((1, 4096), jnp.bfloat16), jnp.ones((4096, 8), jnp.bfloat16), jnp.full(8, -4095, jnp.bfloat16)
    for implementation in ("reference", "xla"):
        np.testing.assert_array_equal(np.float32(flat_gemm(x, w, implementation=implementation)), 4096)
        # -4095 is -4096 in bfloat16.
        out = flat_gemm(x, w, bias=bias, implementation=implementation)
        np.testing.assert_array_equal(np.float32(out), 0)
        out = flat_gemm(x, w.at[0].set(1.5), bias=bias, implementation=implementation)
        np.testing.assert_array_equal(np.float32(out), 0.5)
