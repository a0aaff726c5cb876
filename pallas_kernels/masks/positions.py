# SPDX-License-Identifier: Apache-2.0
"""Masks that compare positions: Causal and Window.

Query row t sits at position i, key column s at position j. By default j = s and i = t + S - T, so that the last
query sees the last key (bottom-right alignment). With positions given, order in memory does not matter: ring
attention, chunked prefill and caches pass theirs.

    Causal, T=2 S=5      Causal, T=5 S=2      Causal & Window(1, 0), T=S=5
      1 1 1 1 0            0 0                  1 0 0 0 0
      1 1 1 1 1            0 0                  1 1 0 0 0
                           0 0                  0 1 1 0 0
                           1 0                  0 0 1 1 0
                           1 1                  0 0 0 1 1
"""

from typing import TYPE_CHECKING

import jax
import numpy as np

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


class _Positions(Mask):
    """Positions of rows and columns, given or by default, and their range in each block."""

    query_positions: jax.Array | None
    key_positions: jax.Array | None

    def positions(self, T: int, S: int) -> tuple[Array, Array]:
        """Query positions [T] or [B, T] and key positions [S] or [B, S]; NumPy where they are the default."""
        query, key = self.query_positions, self.key_positions
        query = np.arange(S - T, S, dtype=np.int32) if query is None else query
        return query, np.arange(S, dtype=np.int32) if key is None else key

    def check(self, axes: "Axes") -> None:
        for field, letter in (("query_positions", "T"), ("key_positions", "S")):
            array = getattr(self, field)
            if array is not None:
                name = f"mask.{type(self).__name__}.{field}"
                check_index_array(name, array)
                axes.bind(name, array.shape, letter if array.ndim == 1 else f"B {letter}")

    def _at(self, rows: Array, cols: Array, T: int, S: int) -> tuple[Array, Array]:
        i, j = self.positions(T, S)
        return as_rows(take(i, rows)), as_cols(take(j, cols))

    def _ranges(self, T: int, S: int, block_q: int, block_k: int) -> tuple[Array, Array, Array, Array]:
        i, j = self.positions(T, S)
        i_min, i_max = block_range(i, block_q)
        j_min, j_max = block_range(j, block_k)
        return as_rows(i_min), as_rows(i_max), as_cols(j_min), as_cols(j_max)


@mask_dataclass
class Causal(_Positions):
    """Key position j is visible to query position i when j <= i.

    Attributes:
      query_positions: int32 [T] or [B, T]; None means t + S - T.
      key_positions: int32 [S] or [B, S]; None means s.
    """

    query_positions: jax.Array | None = None
    key_positions: jax.Array | None = None

    def allowed(self, rows: Array, cols: Array, T: int, S: int) -> Array:
        i, j = self._at(rows, cols, T, S)
        return j <= i

    def tiles(self, T: int, S: int, block_q: int, block_k: int) -> Tiles:
        i_min, i_max, j_min, j_max = self._ranges(T, S, block_q, block_k)
        return Tiles(j_min <= i_max, j_max <= i_min)

    def __str__(self) -> str:
        return "Causal" if self.query_positions is None and self.key_positions is None else "Causal(positions)"


@mask_dataclass(static=("left", "right"))
class Window(_Positions):
    """Key position j is visible to query position i when i - left <= j <= i + right.

    Attributes:
      left: how many earlier positions are visible; None means all.
      right: how many later positions are visible; None means all.
      query_positions: int32 [T] or [B, T]; None means t + S - T.
      key_positions: int32 [S] or [B, S]; None means s.
    """

    left: int | None
    right: int | None
    query_positions: jax.Array | None = None
    key_positions: jax.Array | None = None

    def __post_init__(self):
        for name in ("left", "right"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (int, np.integer)) or value < 0):
                raise ValueError(f"mask.Window.{name} must be None (unbounded) or an integer >= 0, got {value!r}.")

    def allowed(self, rows: Array, cols: Array, T: int, S: int) -> Array:
        i, j = self._at(rows, cols, T, S)
        visible = (j == j) & (i == i)
        if self.left is not None:
            visible = visible & (j >= i - self.left)
        if self.right is not None:
            visible = visible & (j <= i + self.right)
        return visible

    def tiles(self, T: int, S: int, block_q: int, block_k: int) -> Tiles:
        i_min, i_max, j_min, j_max = self._ranges(T, S, block_q, block_k)
        live = full = (i_min == i_min) & (j_min == j_min)
        if self.left is not None:
            live, full = live & (j_max >= i_min - self.left), full & (j_min >= i_max - self.left)
        if self.right is not None:
            live, full = live & (j_min <= i_max + self.right), full & (j_max <= i_min + self.right)
        return Tiles(live, full)

    def __str__(self) -> str:
        given = self.query_positions is not None or self.key_positions is not None
        return f"Window({self.left}, {self.right}{', positions' if given else ''})"
