# SPDX-License-Identifier: Apache-2.0
"""THE SPECIFICATION of flash_attention: plain jnp, quadratic memory, no speed. If in doubt, this is right.

logit[t, s] = soft_cap * tanh(scale * q[t].k[s] / soft_cap)   (or scale * q[t].k[s])   + bias[t, s]
e[t, s]     = exp(logit[t, s] - m[t])  where the mask allows (t, s), else 0
l[t]        = sum_s e[t, s] + exp(sink - m[t])
out[t]      = sum_s e[t, s] v[s] / l[t]          0     where l[t] = 0
lse[t]      = m[t] + log l[t]                    -inf  where l[t] = 0
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.masks import Mask


def supports(call: Call, device: Device) -> Refusal | None:
    return None  # everything; "auto" never asks


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    *,
    mask: Mask | None = None,
    scale: float,
    soft_cap: float | None = None,
    sink: jax.Array | None = None,
    dtype=None,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, Hv] and LSE [B, N, T], both in the working precision.

    Args:
      query, key, value, bias, mask, scale, soft_cap, sink: as for `flash_attention`.
      dtype: precision of the two matrix products. None is the specification: float32, float64 for float64 input.
        A lower one is the naive implementation that core/tolerance.py compares with: products and probabilities
        are rounded to it, the softmax stays in float32.
    """
    softmax_dtype = jnp.promote_types(query.dtype, jnp.float32)
    dtype = softmax_dtype if dtype is None else dtype
    B, T, N, _ = query.shape
    S, K = key.shape[1:3]
    # Query head n reads key/value head n // G: the G heads of a group are neighbors.
    q = query.astype(dtype).reshape(B, T, K, N // K, -1)
    logits = jnp.einsum("btkgh,bskh->bkgts", q, key.astype(dtype)).reshape(B, N, T, S).astype(softmax_dtype)
    logits = logits * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if bias is not None:
        logits = logits + bias.astype(softmax_dtype)
    visible = np.ones((1, 1, T, S), bool) if mask is None else mask.as_array(T, S)

    m = jnp.max(logits, axis=-1, where=visible, initial=-jnp.inf)
    if sink is not None:
        sink = sink.astype(softmax_dtype)[None, :, None]
        m = jnp.maximum(m, sink)
    # The maximum cancels in the result, so it carries no gradient; an empty row has none, and 0 serves.
    m = jax.lax.stop_gradient(jnp.where(jnp.isfinite(m), m, 0))
    e = jnp.where(visible, jnp.exp(jnp.where(visible, logits - m[..., None], 0)), 0)
    l = jnp.sum(e, axis=-1) + (0 if sink is None else jnp.exp(sink - m))
    empty = l == 0
    l = jnp.where(empty, 1, l)
    p = (e / l[..., None]).astype(dtype).reshape(B, K, N // K, T, S)
    out = jnp.einsum("bkgts,bskh->btkgh", p, value.astype(dtype)).reshape(B, T, N, -1)
    return out, jnp.where(empty, -jnp.inf, m + jnp.log(l))
