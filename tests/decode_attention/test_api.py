# SPDX-License-Identifier: Apache-2.0
"""Bad calls of decode_attention say what is wrong and what to do."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import decode_attention
from pallas_kernels.flash_attention.config import XlaConfig

q, k, lengths = jnp.ones((2, 4, 16)), jnp.ones((2, 12, 2, 16)), jnp.asarray([3, 12])
int8, table = k.astype(jnp.int8), jnp.zeros((2, 3), jnp.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: decode_attention(q, k[..., :8], k, lengths),
            ValueError,
            "decode_attention: key must have shape [B, S, K, H] with B=2, H=16, got (2, 12, 2, 8).\n"
            "  axes so far: B=2 (query), N=4 (query), H=16 (query)",
        ),
        (lambda: decode_attention(q[0], k, k, lengths), ValueError, "query must have shape [B, T, N, H], got (4, 16)."),
        (lambda: decode_attention(q[:, :3], k, k, lengths), ValueError, "N=3 must be a multiple of key heads K=2."),
        (lambda: decode_attention(q[:, :0], k, k, lengths), ValueError, "N=0 (query); every axis needs a size > 0."),
        (lambda: decode_attention(q, k, k, lengths[:1]), ValueError, "lengths must have shape [B] with B=2, got (1,)."),
        (lambda: decode_attention(q, k, k, lengths * 1.0), TypeError, "lengths must be an integer array, got float32."),
        (
            lambda: decode_attention(q, k, k, lengths, page_table=table[0]),
            ValueError,
            "page_table must have shape [B, pages] with B=2, got (3,).",
        ),
        (
            lambda: decode_attention(q, int8, int8, lengths),
            ValueError,
            "a key of int8 needs key_scale, [K] in floating",
        ),
        (lambda: decode_attention(q, k, int8, lengths), TypeError, "key, value must have one dtype"),
        (
            lambda: decode_attention(q, k, k, lengths, window=0),
            ValueError,
            "window must be a Python integer >= 1 or None",
        ),
        (lambda: decode_attention(q, k, k, lengths, num_splits=1.5), ValueError, "num_splits must be a Python integer"),
        (lambda: decode_attention(q, k, k, lengths, soft_cap=0), ValueError, "soft_cap must be > 0 or None, got 0."),
        (
            lambda: decode_attention(q, k, k, lengths, scale=jnp.ones(())),
            TypeError,
            "scale must be a finite Python number",
        ),
        (
            lambda: decode_attention(q, k, k, lengths, unified_max=3.0),
            TypeError,
            "unified_max must be a UnifiedMax or None",
        ),
        (
            lambda: decode_attention(q, k, k, lengths, implementation="xla", config=XlaConfig(16, 16)),
            ValueError,
            'implementation "xla" takes a XlaConfig, got XlaConfig(block_q=16, block_k=16).',
        ),
        (
            lambda: jax.grad(lambda q: decode_attention(q, k, k, lengths).sum())(q),
            TypeError,
            "decode_attention has no gradient: it reads a cache. Train with pallas_kernels.flash_attention.",
        ),
    ],
)
def test_bad_calls(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
