# SPDX-License-Identifier: Apache-2.0
"""THE SPECIFICATION of flat_gemm: plain jnp in float32 (float64), no speed. If in doubt, this is right.

    z[m, n]   = sum_k x[m, k] w[k, n] + bias[n]
    out[m, o] = residual[m, o] + activation(z)[m, o]

With `rms_norm_eps`, x[m, k] / sqrt(mean_k x[m, k]^2 + eps) takes the place of x.

Activations are those of core/activations.py; after swiglu N / 2 columns remain of N.

`naively` is the unfused way in the precision of the input: its error is what core/tolerance.py calls normal.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.core.activations import ACTIVATIONS
from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal


def supports(call: Call, device: Device) -> Refusal | None:
    return None  # everything; "auto" never asks


def gemm(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    activation: str | None = None,
    transpose_w: bool = False,
    rms_norm_eps: float | None = None,
) -> jax.Array:
    """[..., M, N] (N / 2 for swiglu), float32 (float64 for float64 input)."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    x = x.astype(dtype) * scale_of_rows(x.astype(dtype), rms_norm_eps)
    z = jnp.einsum("...mk,nk->...mn" if transpose_w else "...mk,kn->...mn", x, w.astype(dtype))
    return epilogue(z, bias, residual, activation)


def scale_of_rows(x: jax.Array, rms_norm_eps: float | None) -> jax.Array:
    """What normalizes the rows of x, [..., M, 1]; 1 if they are not to be."""
    if rms_norm_eps is None:
        return jnp.ones((), x.dtype)
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + rms_norm_eps)


def epilogue(z: jax.Array, bias: jax.Array | None, residual: jax.Array | None, activation: str | None) -> jax.Array:
    """What happens to the products, in their dtype."""
    z = z if bias is None else z + bias.astype(z.dtype)
    z = ACTIVATIONS[activation](z)
    return z if residual is None else residual.astype(z.dtype) + z


def specified(arguments: dict[str, Any]) -> jax.Array:
    """Output by `gemm`, of the public function's arguments by name; what is not given has its default."""
    return gemm(**arguments)


def naively(arguments: dict[str, Any]) -> jax.Array:
    """The same, every step rounded to the dtype of x."""
    options = dict(arguments)
    x, w, activation = options.pop("x"), options.pop("w"), options.pop("activation", None)
    x = x * scale_of_rows(x, options.pop("rms_norm_eps", None))
    z = x @ (w.T if options.pop("transpose_w", False) else w)
    return epilogue(z, options.pop("bias", None), options.pop("residual", None), activation)
