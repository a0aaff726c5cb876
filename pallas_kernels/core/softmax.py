# SPDX-License-Identifier: Apache-2.0
"""Asynchronous softmax: one constant in place of the maximum that every chunk of keys would have to wait for.

    softmax(x)_i = exp(x_i - phi) / sum_j exp(x_j - phi)          for any phi

With the same phi everywhere, chunks of keys add up numerators and denominators, and none rescales what came before.
What exp(x - phi) can hold is limited, so phi is chosen from logits seen on real text, and a row is valid only while

    low < x_j - phi < high        for every visible key j

Rows that are not are computed again with the online softmax.

Source: Hong et al., "FlashDecoding++", 2023, section 3.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# exp(x - phi) summed over 2^20 keys and multiplied by values up to 2^20 stays within float32, in both directions.
HIGHEST = 60.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UnifiedMax:
    """The constant of an asynchronous softmax, and how far from it logits may be.

    Logits are meant after scale, soft cap and bias. A key that is hidden, by a mask or a bias of -inf, is never out of
    bounds.

    Attributes:
      phi: what takes the place of the maximum: a number, or an array [N] with one for each head.
      low: a row is computed again if one of its logits is phi + low or less.
      high: or phi + high or more.
    """

    phi: float | jax.Array = 0.0
    low: float = dataclasses.field(default=-HIGHEST, metadata={"static": True})
    high: float = dataclasses.field(default=HIGHEST, metadata={"static": True})

    def __post_init__(self):
        for name in ("low", "high"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not abs(value) <= HIGHEST:
                raise ValueError(f"UnifiedMax.{name} must be a number within +-{HIGHEST}, got {value!r}.")
        if not self.low < self.high:
            raise ValueError(f"UnifiedMax.low must be less than high, got {self.low} and {self.high}.")
        if isinstance(self.phi, (int, float)) and not math.isfinite(self.phi):
            raise ValueError(f"UnifiedMax.phi must be finite, got {self.phi!r}.")

    def per_head(self, N: int) -> jax.Array:
        """phi as float32 [N]."""
        return jnp.broadcast_to(jnp.asarray(self.phi, jnp.float32), (N,))

    def out_of_bounds(self, shifted: jax.Array) -> jax.Array:
        """Where logits less phi are too low or too high."""
        return (shifted <= self.low) | (shifted >= self.high)


class SoftmaxStats(NamedTuple):
    """What an asynchronous softmax had to do again.

    Attributes:
      recomputed_rows: int32 [B]; rows (query heads, times queries) of each batch element that were out of bounds.
    """

    recomputed_rows: jax.Array


def check_unified_max(op: str, unified_max: UnifiedMax | None, N: int) -> tuple[float, float] | None:
    """Its bounds, which are static, for `Call.options`.

    Raises:
      TypeError: it is something else.
      ValueError: there is not one phi for all heads, nor one for each of the N.
    """
    if unified_max is None:
        return None
    if not isinstance(unified_max, UnifiedMax):
        raise TypeError(f"{op}: unified_max must be a UnifiedMax or None, got {type(unified_max).__name__}.")
    if jnp.shape(unified_max.phi) not in ((), (N,)):
        raise ValueError(f"{op}: unified_max.phi must be a number or [N] with N={N}, got {jnp.shape(unified_max.phi)}.")
    return unified_max.low, unified_max.high
