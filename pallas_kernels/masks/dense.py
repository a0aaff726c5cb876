# SPDX-License-Identifier: Apache-2.0
"""Dense: any mask at all, as a boolean array."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.masks.base import Array, Mask, Tiles, mask_dataclass, take

if TYPE_CHECKING:
    from pallas_kernels.core.check import Axes


@mask_dataclass
class Dense(Mask):
    """Visible where `array` is True. Costs its own memory: prefer the other masks, which cost none.

    Attributes:
      array: bool, broadcastable to [B, N, T, S] from the right; a different mask per head is [N, T, S].
    """

    array: Array

    def check(self, axes: "Axes") -> None:
        if not isinstance(self.array, (jax.Array, np.ndarray)):
            raise TypeError(f"mask.Dense.array must be a boolean array, got {type(self.array).__name__}.")
        if self.array.dtype != jnp.bool_:
            raise TypeError(f"mask.Dense.array must be bool, got {self.array.dtype}; an additive mask goes to `bias`.")
        axes.bind_broadcast("mask.Dense.array", self.array.shape, "B N T S")

    def _array4(self) -> Array:
        return self.array.reshape((1,) * (4 - self.array.ndim) + self.array.shape)

    def allowed(self, rows: Array, cols: Array, T: int, S: int) -> Array:
        array = self._array4()  # an axis of size 1 is clamped, and so broadcast, by `take`
        return take(take(array, rows, axis=2), cols, axis=3)

    def tiles(self, T: int, S: int, block_q: int, block_k: int) -> Tiles:
        array = self._array4()
        padding = [(0, 0), (0, 0), (0, -T % block_q), (0, -S % block_k)]
        xp = np if isinstance(array, np.ndarray) else jnp
        array = xp.broadcast_to(array, (*array.shape[:2], T, S))

        def blocks(fill: bool) -> Array:
            padded = xp.pad(array, padding, constant_values=fill)
            return padded.reshape(*array.shape[:2], padded.shape[2] // block_q, block_q, -1, block_k)

        return Tiles(blocks(False).any((3, 5)), blocks(True).all((3, 5)))

    def __str__(self) -> str:
        return "Dense"


def as_mask(mask) -> Mask | None:
    """A Mask as it is, a boolean array as Dense, None as None; anything else is a TypeError."""
    if mask is None or isinstance(mask, Mask):
        return mask
    if isinstance(mask, (jax.Array, np.ndarray)):
        return Dense(mask)
    raise TypeError(f"mask must be a mask of pallas_kernels.masks, a boolean array or None, got {type(mask).__name__}.")
