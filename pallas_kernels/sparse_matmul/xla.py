# SPDX-License-Identifier: Apache-2.0
"""sparse_matmul by XLA: any call, any device, on the weight made dense; and the gradient of every implementation.

    w = dequantize(weight)        z = x w        two comparisons for each input, which XLA fuses; no sparse hardware

TPUs have no unit for 2:4, and here nothing is gained from the pattern but the bytes that are stored. Integers are
multiplied as such, int8 x int8 -> int32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.core.activations import ACTIVATIONS
from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.sparse_matmul.reference import Scales, Weight, dense, quantized
from pallas_kernels.sparse_matmul.weights import Sparse24Weight


def supports(call: Call, device: Device) -> Refusal | None:
    return None


def forward(
    x: jax.Array,
    weight: Weight,
    bias: jax.Array | None,
    scales: Scales | None,
    *,
    activation: str | None,
    out_dtype: Any,
    config: None = None,
) -> jax.Array:
    """[M, N] (N / 2 for swiglu) in `out_dtype`, of x [M, K]."""
    return ACTIVATIONS[activation](_affine(x, dense(weight), bias, scales)).astype(out_dtype)


def backward(
    x: jax.Array,
    weight: Weight,
    bias: jax.Array | None,
    scales: Scales | None,
    dout: jax.Array,
    *,
    activation: str | None,
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """Gradients of x, of the values that are kept and of bias, for that of the output; None of what is of integers."""
    w = dense(weight)
    dz = dout.astype(jnp.float32)
    if activation is not None:
        (dz,) = jax.vjp(ACTIVATIONS[activation], _affine(x, w, bias, scales))[1](dz)
    dbias = None if bias is None else jnp.sum(dz, 0).astype(bias.dtype)
    if scales is None:
        dx = _product(dz.astype(x.dtype), w, 1, jnp.float32).astype(x.dtype)
        dw = _product(x.T, dz.astype(x.dtype), 0, jnp.float32).astype(x.dtype)
        return dx, weight.kept_of(dw) if isinstance(weight, Sparse24Weight) else dw, dbias
    if x.dtype == jnp.int8:
        return None, None, dbias
    dx = (dz * scales[1]) @ w.astype(jnp.float32).T
    inside = jnp.abs(x.astype(jnp.float32) / scales[0]) <= 127
    return jnp.where(inside, dx, 0).astype(x.dtype), None, dbias


def _affine(x: jax.Array, w: jax.Array, bias: jax.Array | None, scales: Scales | None) -> jax.Array:
    """float32 [M, N]."""
    if scales is None:
        z = _product(x, w, 0, jnp.float32)
    else:
        z = _product(quantized(x, scales[0]), w, 0, jnp.int32).astype(jnp.float32) * (scales[0] * scales[1])
    return z if bias is None else z + bias.astype(jnp.float32)


def _product(a: jax.Array, b: jax.Array, b_axis: int, dtype: Any) -> jax.Array:
    """Sum over the last axis of a and an axis of b; the axes that are left, in order."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((1,), (b_axis,)), ((), ())), precision=precision, preferred_element_type=dtype)
