# SPDX-License-Identifier: Apache-2.0
"""Segments: several documents packed in one row see only themselves."""

from typing import TYPE_CHECKING

import jax

from pallas_kernels.masks.base import (
    Array,
    Mask,
    Tiles,
    as_cols,
    as_rows,
    block_range,
    check_index_array,
    mask_dataclass,
    take,
)

if TYPE_CHECKING:
    from pallas_kernels.core.check import Axes


@mask_dataclass
class Segments(Mask):
    """Query and key see each other when their ids are equal.

    Ids need no order; tiles are skipped where the id ranges of the two blocks do not meet, so sorted ids (documents
    laid one after another) skip the most.

    Attributes:
      query_ids: integer [B, T] or [T].
      key_ids: integer [B, S] or [S].
    """

    query_ids: jax.Array
    key_ids: jax.Array

    def check(self, axes: "Axes") -> None:
        for field, letter in (("query_ids", "T"), ("key_ids", "S")):
            array = getattr(self, field)
            check_index_array(f"mask.Segments.{field}", array)
            axes.bind(f"mask.Segments.{field}", array.shape, letter if array.ndim == 1 else f"B {letter}")

    def allowed(self, rows: Array, cols: Array, T: int, S: int) -> Array:
        return as_rows(take(self.query_ids, rows)) == as_cols(take(self.key_ids, cols))

    def tiles(self, T: int, S: int, block_q: int, block_k: int) -> Tiles:
        q_min, q_max = (as_rows(bound) for bound in block_range(self.query_ids, block_q))
        k_min, k_max = (as_cols(bound) for bound in block_range(self.key_ids, block_k))
        one_id = (q_min == q_max) & (k_min == k_max)
        return Tiles((q_min <= k_max) & (k_min <= q_max), one_id & (q_min == k_min))

    def __str__(self) -> str:
        return "Segments"
