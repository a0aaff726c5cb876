# SPDX-License-Identifier: Apache-2.0
"""Lengths: only the first keys of each row exist."""

from typing import TYPE_CHECKING

import jax
import numpy as np

from pallas_kernels.masks.base import (
    Array,
    Mask,
    Tiles,
    as_cols,
    block_range,
    check_index_array,
    mask_dataclass,
)

if TYPE_CHECKING:
    from pallas_kernels.core.check import Axes


@mask_dataclass
class Lengths(Mask):
    """Key column s is visible when s < key_lengths[b]; a length of 0 hides every key.

    Attributes:
      key_lengths: integer [B].
    """

    key_lengths: jax.Array

    def check(self, axes: "Axes") -> None:
        check_index_array("mask.Lengths.key_lengths", self.key_lengths)
        axes.bind("mask.Lengths.key_lengths", self.key_lengths.shape, "B")

    def allowed(self, rows: Array, cols: Array, T: int, S: int) -> Array:
        return as_cols(cols) < self.key_lengths.reshape(-1, 1, 1, 1)

    def tiles(self, T: int, S: int, block_q: int, block_k: int) -> Tiles:
        first, last = (as_cols(bound) for bound in block_range(np.arange(S, dtype=np.int32), block_k))
        lengths = self.key_lengths.reshape(-1, 1, 1, 1)
        return Tiles(first < lengths, last < lengths)

    def __str__(self) -> str:
        return "Lengths"
