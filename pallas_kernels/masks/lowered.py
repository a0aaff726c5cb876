# SPDX-License-Identifier: Apache-2.0
"""A mask as kernels evaluate it: integers along rows and columns, and a comparison of the two for each tile.

    Causal, Window    nothing stored: tile coordinates alone decide (or the positions that were given)
    Segments          ids along rows == ids along columns
    Lengths           one flag a column
    Dense             the array itself, as int8

Kernels cannot index arrays the way `Mask.allowed` does; they load pieces of these vectors with a tile and hand them
to `visible`. Equal to `Mask.as_array`, which tests prove for every kind of mask.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.masks.base import And, Array, Mask, Or
from pallas_kernels.masks.dense import Dense
from pallas_kernels.masks.lengths import Lengths
from pallas_kernels.masks.positions import Causal, Window
from pallas_kernels.masks.segments import Segments

# Pieces of a tile: whatever the kernel computes with, all of the tile's shape or broadcastable to it.
Piece = Any
Numbers = Callable[[], Piece]


class Lowered(NamedTuple):
    """A mask in the form that kernels want.

    Attributes:
      rows: int32 [B|1, T] each; values that belong to query rows.
      cols: int32 [B|1, S] each; values that belong to key columns.
      dense: int8 [B|1, N|1, T|1, S|1] each.
      visible: (i, j, rows, cols, dense) -> bool tile, of the tile's row numbers i() and column numbers j() (int32),
        which are called for if the mask wants them, and its pieces of the arrays above, in their order.
    """

    rows: tuple[jax.Array, ...]
    cols: tuple[jax.Array, ...]
    dense: tuple[jax.Array, ...]
    visible: Callable[[Numbers, Numbers, Sequence[Piece], Sequence[Piece], Sequence[Piece]], Piece]

    @property
    def is_static(self) -> bool:
        """Whether tile coordinates alone decide."""
        return not (self.rows or self.cols or self.dense)


def lower(mask: Mask, T: int, S: int) -> Lowered:
    """The same mask for kernels; T and S are the lengths of query and key.

    >>> from pallas_kernels import masks
    >>> lowered = lower(masks.Causal() & masks.Lengths(jnp.asarray([3])), 2, 4)
    >>> [x.shape for x in lowered.cols]
    [(1, 4)]
    """
    store = _Store()
    rule = _rule(mask, T, S, store)
    return Lowered(tuple(store.rows), tuple(store.cols), tuple(store.dense), lambda *pieces: rule(_Tile(*pieces)))


class _Tile(NamedTuple):
    """What a rule sees of one tile."""

    i: Numbers
    j: Numbers
    rows: Sequence[Piece]
    cols: Sequence[Piece]
    dense: Sequence[Piece]


_Rule = Callable[[_Tile], Piece]


class _Store:
    """The arrays met so far; a rule keeps the number of its own."""

    def __init__(self):
        self.rows: list[jax.Array] = []
        self.cols: list[jax.Array] = []
        self.dense: list[jax.Array] = []

    def row(self, values: Array) -> _Rule:
        n = _append(self.rows, values)
        return lambda tile: tile.rows[n]

    def col(self, values: Array) -> _Rule:
        n = _append(self.cols, values)
        return lambda tile: tile.cols[n]


def _append(arrays: list[jax.Array], values: Array) -> int:
    arrays.append(jnp.asarray(values, jnp.int32).reshape(-1, values.shape[-1]))
    return len(arrays) - 1


def _rule(mask: Mask, T: int, S: int, store: _Store) -> _Rule:
    match mask:
        case (
            And(left=Causal() as causal, right=Segments() as segments)
            | And(left=Segments() as segments, right=Causal() as causal)
        ) if causal.query_positions is None and causal.key_positions is None:
            # Packed documents. One comparison a logit: of two, a GPU's compiler keeps more results than it has
            # predicate registers. Differences of coordinates cannot overflow; those of positions might.
            i, j = _positions(causal, T, S, store)
            row, col = store.row(segments.query_ids), store.col(segments.key_ids)
            return lambda tile: (jnp.maximum(j(tile) - i(tile), 0) | (row(tile) ^ col(tile))) == 0
        case And():
            left, right = (_rule(m, T, S, store) for m in (mask.left, mask.right))
            return lambda tile: left(tile) & right(tile)
        case Or():
            left, right = (_rule(m, T, S, store) for m in (mask.left, mask.right))
            return lambda tile: left(tile) | right(tile)
        case Causal():
            i, j = _positions(mask, T, S, store)
            return lambda tile: j(tile) <= i(tile)
        case Window():
            i, j = _positions(mask, T, S, store)
            return _window(mask, i, j)
        case Segments():
            row, col = store.row(mask.query_ids), store.col(mask.key_ids)
            return lambda tile: row(tile) == col(tile)
        case Lengths():
            exists = np.arange(S, dtype=np.int32) < mask.key_lengths.reshape(-1, 1)
            flag = store.col(exists)
            return lambda tile: flag(tile) != 0
        case Dense():
            array = mask.array.reshape((1,) * (4 - mask.array.ndim) + mask.array.shape)
            store.dense.append(jnp.asarray(array, jnp.int8))
            n = len(store.dense) - 1
            return lambda tile: tile.dense[n] != 0
    raise TypeError(f"masks.lowered.lower: unknown kind of mask {type(mask).__name__}; add a case for it.")


def _positions(mask: Causal | Window, T: int, S: int, store: _Store) -> tuple[_Rule, _Rule]:
    """Positions of rows and columns of a tile: the given ones, else bottom-right aligned coordinates."""
    query, key = mask.query_positions, mask.key_positions
    i = (lambda tile: tile.i() + (S - T)) if query is None else store.row(query)
    j = (lambda tile: tile.j()) if key is None else store.col(key)
    return i, j


def _window(mask: Window, i: _Rule, j: _Rule) -> _Rule:
    left, right = mask.left, mask.right
    if left is None and right is None:
        return lambda tile: j(tile) == j(tile)
    if left is None:
        return lambda tile: j(tile) <= i(tile) + right
    if right is None:
        return lambda tile: j(tile) >= i(tile) - left
    return lambda tile: (j(tile) >= i(tile) - left) & (j(tile) <= i(tile) + right)
