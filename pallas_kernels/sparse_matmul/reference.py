# SPDX-License-Identifier: Apache-2.0
"""THE SPECIFICATION of sparse_matmul: plain jnp in float32 (float64), no speed. If in doubt, this is right.

    floating weights   z[m, n] = sum_k x[m, k] w[k, n] + bias[n]                          w = weight.dequantize()
    integer weights    z[m, n] = a b[n] sum_k q[m, k] w[k, n] + bias[n]                   scales = a, b
                       q[m, k] = clip(round(x[m, k] / a), -127, 127), or x if it is int8

    out = activation(z)                                                                   core/activations.py

A gradient passes through the rounding as if it were not there, and not where q was clipped. `naively` is the same in
the precision of the output: its error is what core/tolerance.py calls normal.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.core.activations import ACTIVATIONS
from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.sparse_matmul.weights import Sparse24Weight

Weight = Sparse24Weight | jax.Array
Scales = tuple[jax.Array, jax.Array]


def supports(call: Call, device: Device) -> Refusal | None:
    return None  # everything; "auto" never asks


def dense(weight: Weight) -> jax.Array:
    """[K, N]."""
    return weight.dequantize() if isinstance(weight, Sparse24Weight) else weight


def quantized(x: jax.Array, scale: jax.Array) -> jax.Array:
    """int8 of x, which may be int8 already. Always in float32, so that every implementation rounds to the same."""
    if x.dtype == jnp.int8:
        return x
    return jnp.clip(jnp.round(x.astype(jnp.float32) / scale.astype(jnp.float32)), -127, 127).astype(jnp.int8)


def matmul(
    x: jax.Array,
    weight: Weight,
    bias: jax.Array | None = None,
    *,
    activation: str | None = None,
    scales: Scales | None = None,
    out_dtype: Any = None,
) -> jax.Array:
    """[..., O], float32 (float64 for float64 input)."""
    del out_dtype  # the sums are not rounded here
    return _matmul(x, weight, bias, activation, scales, jnp.promote_types(jnp.float32, _floating(x, weight)))


def _floating(x: jax.Array, weight: Weight) -> Any:
    return next((a.dtype for a in (x, weight) if jnp.issubdtype(a.dtype, jnp.floating)), jnp.float32)


def _matmul(
    x: jax.Array, weight: Weight, bias: jax.Array | None, activation: str | None, scales: Scales | None, dtype: Any
) -> jax.Array:
    """All in one dtype."""
    w = dense(weight).astype(dtype)
    if scales is None:
        z = x.astype(dtype) @ w
    else:
        a, b = (lax.stop_gradient(scale).astype(dtype) for scale in scales)
        z = (_straight_through(x, scales[0], dtype) @ w) * (a * b)
    return ACTIVATIONS[activation](z if bias is None else z + bias.astype(dtype))


def _straight_through(x: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    q = quantized(x, scale).astype(dtype)
    if x.dtype == jnp.int8:
        return q
    ratio = x.astype(dtype) / lax.stop_gradient(scale).astype(dtype)
    inside = jnp.where(jnp.abs(ratio) <= 127, ratio, lax.stop_gradient(ratio))
    return inside + lax.stop_gradient(q - inside)


def specified(arguments: dict[str, Any]) -> jax.Array:
    """Output by `matmul`, of the public function's arguments by name; what is not given has its default."""
    return matmul(**arguments)


def naively(arguments: dict[str, Any]) -> jax.Array:
    """The same, every step rounded to the dtype of the output."""
    options = dict(arguments)
    x, weight, out_dtype = options.pop("x"), options.pop("weight"), options.pop("out_dtype", None)
    # Sums of integers do not fit 16 bits.
    dtype = jnp.float32 if options.get("scales") is not None else out_dtype or x.dtype
    out = _matmul(x, weight, options.get("bias"), options.get("activation"), options.get("scales"), dtype)
    return out.astype(out_dtype or x.dtype)
