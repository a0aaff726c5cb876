# SPDX-License-Identifier: Apache-2.0
"""Bad calls of flat_gemm say what is wrong and what to do."""

import jax.numpy as jnp
import pytest

from pallas_kernels import flat_gemm
from pallas_kernels.flat_gemm.config import MatrixConfig, VectorConfig

x, w = jnp.ones((2, 3, 16)), jnp.ones((16, 12))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: flat_gemm(x[0, 0], w), ValueError, "flat_gemm: x must have shape [..., M, K], got (16,)."),
        (
            lambda: flat_gemm(x, w.T),
            ValueError,
            "w must have shape [K, N] with K=16, got (12, 16).\n  axes so far: B0=2 (x), M=3 (x), K=16 (x)",
        ),
        (lambda: flat_gemm(x, w, transpose_w=True), ValueError, "w must have shape [N, K] with K=16, got (16, 12)."),
        (lambda: flat_gemm(x[:, :0], w), ValueError, "M=0 (x); every axis needs a size > 0."),
        (lambda: flat_gemm(x, w, bias=jnp.ones(6)), ValueError, "bias must have shape [N] with N=12, got (6,)."),
        (
            lambda: flat_gemm(x, w, residual=jnp.ones((2, 3, 12)), activation="swiglu"),
            ValueError,
            "residual must have shape [B0, M, O] with B0=2, M=3, O=6, got (2, 3, 12).",
        ),
        (lambda: flat_gemm(x, w[:, :5], activation="swiglu"), ValueError, "an even number; w has N=5."),
        (
            lambda: flat_gemm(x, w, activation="relu"),
            ValueError,
            'activation must be one of "silu", "gelu", "gelu_exact", "swiglu" or None, got \'relu\'.',
        ),
        (lambda: flat_gemm(x, w, transpose_w=1), TypeError, "transpose_w must be True or False, got 1."),
        (lambda: flat_gemm(x.astype(int), w), TypeError, "x must be one of float32, bfloat16, float16, float64, got"),
        (
            lambda: flat_gemm(x, w.astype(jnp.bfloat16)),
            TypeError,
            "x, w must have one dtype, got x float32, w bfloat16; cast them with .astype(...).",
        ),
        (
            lambda: flat_gemm(x, w, bias=jnp.ones(12, jnp.bfloat16)),
            TypeError,
            "x, w, bias must have one dtype, got x float32, w float32, bias bfloat16",
        ),
        (
            lambda: flat_gemm(x, w, config=VectorConfig()),
            ValueError,
            'flat_gemm: implementation "xla" takes no config, got VectorConfig(',
        ),
        (
            lambda: VectorConfig(block_n=24),
            ValueError,
            "VectorConfig.block_n must be one of (16, 32, 64, 128), got 24.",
        ),
        (lambda: MatrixConfig(num_splits=0), ValueError, "MatrixConfig.num_splits must be an integer >= 1, got 0."),
    ],
)
def test_bad_calls(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
