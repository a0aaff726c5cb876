# SPDX-License-Identifier: Apache-2.0
"""What follows a matrix product in a model, by name.

silu(z) = z / (1 + exp(-z))       gelu(z) = z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z^3)))
swiglu(z)[m, o] = silu(z[m, o]) * z[m, N / 2 + o]          N / 2 columns remain of N
"""

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp

Activation = Literal["silu", "gelu", "swiglu"]


def swiglu(z: jax.Array) -> jax.Array:
    """The first half of the columns are gates, the second what they let through."""
    gate, up = jnp.split(z, 2, axis=-1)
    return jax.nn.silu(gate) * up


# All but swiglu keep the columns.
ACTIVATIONS: Mapping[str | None, Callable[[jax.Array], jax.Array]] = {
    None: lambda z: z,
    "silu": jax.nn.silu,
    "gelu": lambda z: jax.nn.gelu(z, approximate=True),
    "swiglu": swiglu,
}


def parts_of(activation: str | None) -> int:
    """How many columns of the weight make one of the output: a gate and what it lets through are two."""
    return 2 if activation == "swiglu" else 1


def check_activation(op: str, activation: str | None, N: int, weight: str) -> None:
    """ValueError for an unknown activation, or an odd number of columns N of the argument `weight` for "swiglu"."""
    if activation not in ACTIVATIONS:
        known = ", ".join(f'"{name}"' for name in ACTIVATIONS if name)
        raise ValueError(f"{op}: activation must be one of {known} or None, got {activation!r}.")
    if activation == "swiglu" and N % 2:
        raise ValueError(f'{op}: activation "swiglu" needs gate and up columns, an even number; {weight} has N={N}.')
