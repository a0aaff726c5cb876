# SPDX-License-Identifier: Apache-2.0
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import UnsupportedError, flash_attention, masks
from pallas_kernels.flash_attention import api
from pallas_kernels.flash_attention.config import XlaConfig


def arrays(B=2, T=8, S=12, N=4, K=2, H=16, dtype=jnp.float32):
    return jnp.ones((B, T, N, H), dtype), jnp.ones((B, S, K, H), dtype), jnp.ones((B, S, K, H), dtype)


q, k, v = arrays()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: flash_attention(q, k[..., :8], v),
            ValueError,
            "flash_attention: key must have shape [B, S, K, H] with B=2, H=16, got (2, 12, 2, 8).\n"
            "  axes so far: B=2 (query), T=8 (query), N=4 (query), H=16 (query)",
        ),
        (lambda: flash_attention(q[0], k, v), ValueError, "query must have shape [B, T, N, H], got (8, 4, 16)."),
        (
            lambda: flash_attention(q, k, v[:, :5]),
            ValueError,
            "value must have shape [B, S, K, Hv] with B=2, S=12, K=2",
        ),
        (
            lambda: flash_attention(q[:, :, :3], k, v),
            ValueError,
            "query heads N=3 must be a multiple of key heads K=2.",
        ),
        (lambda: flash_attention(q, k[:, :0], v[:, :0]), ValueError, "S=0 (key); every axis needs a size > 0."),
        (
            lambda: flash_attention(q, k, v.astype(jnp.bfloat16)),
            TypeError,
            "query, key, value must have one dtype, got query float32, key float32, value bfloat16; cast them",
        ),
        (
            lambda: flash_attention(*(x.astype(jnp.int8) for x in (q, k, v))),
            TypeError,
            "query must be one of float32, bfloat16, float16, float64, got int8.",
        ),
        (
            lambda: flash_attention(q, k, v, jnp.ones((3, 12))),
            ValueError,
            "bias must be broadcastable to [B, N, T, S] = [B=2, N=4, T=8, S=12], got (3, 12).",
        ),
        (
            lambda: flash_attention(q, k, v, jnp.ones((8, 12), bool)),
            TypeError,
            "bias must be floating point, got bool; a boolean mask goes to mask=.",
        ),
        (
            lambda: flash_attention(q, k, v, sink=jnp.ones(3)),
            ValueError,
            "sink must have shape [N] with N=4, got (3,).",
        ),
        (lambda: flash_attention(q, k, v, scale=jnp.ones(())), TypeError, "for a learned scale multiply query by it"),
        (
            lambda: flash_attention(q, k, v, scale=float("nan")),
            TypeError,
            "scale must be a finite Python number, got nan",
        ),
        (lambda: flash_attention(q, k, v, soft_cap=0.0), ValueError, "soft_cap must be > 0 or None, got 0.0."),
        (
            lambda: flash_attention(q, k, v, config=3),
            TypeError,
            "config must be one of XlaConfig, MosaicTpuConfig, Sm90Config, Sm80Config, got int.",
        ),
        (
            lambda: flash_attention(q, k, v, implementation="reference", config=XlaConfig(8, 8)),
            ValueError,
            'implementation "reference" runs, which takes no config, but config is a XlaConfig; name the',
        ),
        (lambda: XlaConfig(0, 8), ValueError, "XlaConfig.block_q must be an integer >= 1, got 0."),
        (
            lambda: flash_attention(q, k, v, implementation="cudnn"),
            ValueError,
            'implementation must be one of "auto", "mosaic_gpu", "mosaic_tpu", "xla", "reference", or a sequence of '
            "them, got 'cudnn'.",
        ),
    ],
)
def test_bad_calls_are_refused_in_words(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


def test_a_named_implementation_runs_or_raises():
    with pytest.raises(UnsupportedError) as caught:
        flash_attention(q, k, v, mask=masks.Causal(), implementation="mosaic_gpu")
    assert str(caught.value) == (
        'flash_attention(implementation="mosaic_gpu") cannot run this call.\n'
        "  why : it is for NVIDIA GPUs of Ampere, Ada and Hopper, and this is cpu\n"
        "  call: q f32[B=2,T=8,N=4,H=16] k f32[B=2,S=12,K=2,H=16] v f32[B=2,S=12,K=2,Hv=16] mask=Causal scale=0.25 "
        "on cpu\n"
        '  try : implementation="auto" (would run "xla")'
    )


def test_a_sequence_takes_the_first_that_accepts():
    out = flash_attention(q, k, v, implementation=("mosaic_gpu", "reference"))
    np.testing.assert_array_equal(out, flash_attention(q, k, v, implementation="reference"))


def test_heads_first_layout_is_pointed_out_once():
    api._warn_layout_once.cache_clear()
    swapped = jnp.ones((1, 4, 64, 16))  # [B, N, T, H]
    with pytest.warns(
        UserWarning, match=r"more heads than rows \(N=64 > T=4\); the layout is \[B, T, N, H\]"
    ) as caught:
        flash_attention(swapped, swapped, swapped)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flash_attention(swapped, swapped, swapped)


def test_decoding_is_no_layout_mistake():
    api._warn_layout_once.cache_clear()
    flash_attention(jnp.ones((1, 1, 32, 8)), jnp.ones((1, 64, 8, 8)), jnp.ones((1, 64, 8, 8)))


def test_lse_is_natural_and_float32():
    out, lse = flash_attention(*arrays(dtype=jnp.bfloat16), scale=0.5, return_lse=True)
    assert out.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, 16 * 0.5 + np.log(12), rtol=1e-6)  # every logit is 8


def test_forward_mode_is_left_to_the_reference():
    tangent = (jnp.ones_like(q),)
    with pytest.raises(TypeError, match="jvp"):
        jax.jvp(lambda x: flash_attention(x, k, v), (q,), tangent)
    jax.jvp(lambda x: flash_attention(x, k, v, implementation="reference"), (q,), tangent)


def test_memory_is_linear_in_length():
    """XLA's own account of the temporary memory of forward and backward: doubling T and S must not quadruple it."""

    def temporary(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)
        grad = jax.grad(lambda x: jnp.sum(flash_attention(x, x, x, mask=masks.Causal(), config=XlaConfig(128, 128))))
        return jax.jit(grad).lower(x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 2.2 * temporary(4096)
    assert temporary(8192) < 8192 * 8192  # bytes: a T x S array of logits alone would take 8 times as much
