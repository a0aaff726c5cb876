# SPDX-License-Identifier: Apache-2.0
"""THE SPECIFICATION of quantized_matmul: plain jnp in float32 (float64), no speed. If in doubt, this is right.

    z[m, n]   = sum_k x[m, k] w[k, n] + bias[n]           w = weight.dequantize(), exact in float32
    out[m, o] = activation(z)[m, o]                       core/activations.py

With `activation_bits=8` integers take the place of x, row by row:

    scale[m] = max_k |x[m, k]| / 127       x^[m, k] = round(x[m, k] / scale[m]) * scale[m]        in float32

and a gradient passes through the rounding as if it were not there. `naively` is the same in the precision of the
input: its error is what core/tolerance.py calls normal.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.core.activations import ACTIVATIONS
from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.quantized_matmul.weights import Weight


def supports(call: Call, device: Device) -> Refusal | None:
    return None  # everything; "auto" never asks


def matmul(x: jax.Array, weight: Weight, bias: jax.Array | None = None, *, activation: str | None = None) -> jax.Array:
    """[..., O], float32 (float64 for float64 input)."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return _matmul(x.astype(dtype), weight.dequantize().astype(dtype), weight, bias, activation)


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 [..., K] and float32 [..., 1]: integers and their scale, of each row by itself.

    Always in float32, so that every implementation rounds to the same integers.
    """
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / 127
    integers = jnp.round(wide / jnp.where(scale == 0, 1, scale))
    return jnp.clip(integers, -127, 127).astype(jnp.int8), scale


def _matmul(x: jax.Array, w: jax.Array, weight: Weight, bias: jax.Array | None, activation: str | None) -> jax.Array:
    """All in the dtype of x and w."""
    if getattr(weight, "activation_bits", None) == 8:
        integers, scale = quantize_rows(x)
        x += lax.stop_gradient(integers.astype(x.dtype) * scale.astype(x.dtype) - x)
    z = x @ w
    return ACTIVATIONS[activation](z if bias is None else z + bias.astype(z.dtype))


def specified(arguments: dict[str, Any]) -> jax.Array:
    """Output by `matmul`, of the public function's arguments by name; what is not given has its default."""
    return matmul(**arguments)


def naively(arguments: dict[str, Any]) -> jax.Array:
    """The same, every step rounded to the dtype of x."""
    options = dict(arguments)
    x, weight = options.pop("x"), options.pop("weight")
    w = weight.dequantize().astype(x.dtype)
    return _matmul(x, w, weight, options.get("bias"), options.get("activation"))
