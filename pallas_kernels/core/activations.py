# SPDX-License-Identifier: Apache-2.0
"""What follows a matrix product in a model, by name.

silu(z) = z / (1 + exp(-z))       gelu(z) = z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z^3)))
                                  gelu_exact(z) = z / 2 * (1 + erf(z / sqrt(2)))
swiglu(z)[m, o] = silu(z[m, o]) * z[m, N / 2 + o]          N / 2 columns remain of N
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp

Activation = Literal["silu", "gelu", "gelu_exact", "swiglu"]


def gelu_exact(z: jax.Array) -> jax.Array:
    """By erf, which kernels for TPUs have, too, and not erfc: far below 0 it is right to 1e-7 of z, not of itself."""
    return z / 2 * (1 + jax.lax.erf(z * math.sqrt(0.5)))


def _gelu_without_erf(z: jax.Array) -> jax.Array:
    """In kernels for NVIDIA GPUs, which have no erf: right to 1e-7 of z.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 7.1.26.
    """
    size = jnp.abs(z)
    t = 1 / (1 + 0.3275911 * math.sqrt(0.5) * size)
    rest = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    # 1 - erf(|z| / sqrt(2)) = rest exp(-z^2 / 2).
    return jnp.maximum(z, 0) - size / 2 * rest * jnp.exp(-0.5 * size * size)


def swiglu(z: jax.Array) -> jax.Array:
    """The first half of the columns are gates, the second what they let through."""
    gate, up = jnp.split(z, 2, axis=-1)
    return jax.nn.silu(gate) * up


# All but swiglu keep the columns.
ACTIVATIONS: Mapping[str | None, Callable[[jax.Array], jax.Array]] = {
    None: lambda z: z,
    "silu": jax.nn.silu,
    "gelu": lambda z: jax.nn.gelu(z, approximate=True),
    "gelu_exact": gelu_exact,
    "swiglu": swiglu,
}


def parts_of(activation: str | None) -> int:
    """How many columns of the weight make one of the output: a gate and what it lets through are two."""
    return 2 if activation == "swiglu" else 1


def activate_parts(z: list[jax.Array], activation: str | None) -> jax.Array:
    """The same in a kernel, of the parts of a tile: a sigmoid takes one exponential, and the hardware's own tanh has
    only 11 bits."""
    match activation:
        case None:
            return z[0]
        case "silu":
            return z[0] / (1 + jnp.exp(-z[0]))
        case "gelu":  # tanh(y) = 2 sigmoid(2 y) - 1
            return z[0] / (1 + jnp.exp(-2 * math.sqrt(2 / math.pi) * (z[0] + 0.044715 * z[0] * z[0] * z[0])))
        case "gelu_exact":
            return _gelu_without_erf(z[0])
        case "swiglu":
            return z[0] / (1 + jnp.exp(-z[0])) * z[1]
        case _:
            raise ValueError(f"unknown activation {activation!r}.")


def check_activation(op: str, activation: str | None, N: int, weight: str) -> None:
    """ValueError for an unknown activation, or an odd number of columns N of the argument `weight` for "swiglu"."""
    if activation not in ACTIVATIONS:
        known = ", ".join(f'"{name}"' for name in ACTIVATIONS if name)
        raise ValueError(f"{op}: activation must be one of {known} or None, got {activation!r}.")
    if activation == "swiglu" and N % 2:
        raise ValueError(f'{op}: activation "swiglu" needs gate and up columns, an even number; {weight} has N={N}.')
