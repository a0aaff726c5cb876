# SPDX-License-Identifier: Apache-2.0
"""flat_gemm by XLA: the library's matrix product, any shape, any device (route C); and the gradient of every route.

z  = x w + bias                      again, if there is an activation
dz = activation'(z) dout             in float32, then in the dtype of x
dx = dz w^T,  dw = x^T dz,  dbias = sum_m dz[m],  dresidual = dout
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.core.activations import ACTIVATIONS
from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.flat_gemm.reference import epilogue, scale_of_rows


def supports(call: Call, device: Device) -> Refusal | None:
    return None


def forward(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    *,
    activation: str | None,
    transpose_w: bool,
    rms_norm_eps: float | None,
    config: None = None,
) -> jax.Array:
    """[M, N] (N / 2 for swiglu) in the dtype of x, of x [M, K] and w [K, N] ([N, K])."""
    # Libraries sum in float32 whatever they write; what nothing is done to afterwards need not be written in float32.
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    plain = bias is None and residual is None and activation is None
    z = _product(_normalized(x, rms_norm_eps), w, 1, 1 if transpose_w else 0, x.dtype if plain else dtype)
    return epilogue(z, bias, residual, activation).astype(x.dtype)


def backward(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    dout: jax.Array,
    *,
    activation: str | None,
    transpose_w: bool,
    rms_norm_eps: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Gradients of x, w, bias and residual, for that of the output."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    dz = dout.astype(dtype)
    x, normalize = jax.vjp(lambda x: _normalized(x, rms_norm_eps), x)
    if activation is not None:
        z = _product(x, w, 1, 1 if transpose_w else 0, dtype)
        z = z if bias is None else z + bias.astype(dtype)
        (dz,) = jax.vjp(ACTIVATIONS[activation], z)[1](dz)
    dbias = None if bias is None else jnp.sum(dz, 0).astype(bias.dtype)
    dz = dz.astype(x.dtype)
    dx = _product(dz, w, 1, 0 if transpose_w else 1, x.dtype)
    dw = _product(dz, x, 0, 0, w.dtype) if transpose_w else _product(x, dz, 0, 0, w.dtype)
    (dx,) = normalize(dx)
    return dx, dw, dbias, None if residual is None else dout


def _normalized(x: jax.Array, rms_norm_eps: float | None) -> jax.Array:
    if rms_norm_eps is None:
        return x
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * scale_of_rows(wide, rms_norm_eps)).astype(x.dtype)


def _product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int, dtype) -> jax.Array:
    """Sum over one axis of each; the axes that are left, in order."""
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=dtype)
