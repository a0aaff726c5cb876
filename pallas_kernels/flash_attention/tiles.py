# SPDX-License-Identifier: Apache-2.0
"""Which tiles of the T x S plane exist, and which of them an implementation has to touch.

A tile is block_q query rows by block_k key columns; the last ones may be ragged. A mask sorts tiles in three
classes: an empty tile is skipped, a full one needs no masking code, a mixed one evaluates the mask. Static masks
(Causal, Window, no mask) are sorted while tracing, in NumPy; masks that hold arrays are sorted on the device.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.masks import Mask

EMPTY, MIXED, FULL = 0, 1, 2


def classify(mask: Mask | None, T: int, S: int, block_q: int, block_k: int) -> jax.Array | np.ndarray:
    """Class of every tile: int8 [B|1, N|1, ceil(T / block_q), ceil(S / block_k)]; NumPy for a static mask."""
    rows, cols = math.ceil(T / block_q), math.ceil(S / block_k)
    if mask is None:
        return np.full((1, 1, rows, cols), FULL, np.int8)
    classes = mask.tiles(T, S, block_q, block_k).classes
    xp = np if isinstance(classes, np.ndarray) else jnp
    return xp.broadcast_to(classes, (*classes.shape[:2], rows, cols))


class WorkList(NamedTuple):
    """The tiles to visit, row by row and from left to right, so that results repeat bit for bit.

    Attributes:
      rows, cols: int32 [number of tiles]; entries from `count` on are padding.
      count: how many to visit; a Python int for a static mask, so that the loop has a known trip count.
    """

    rows: jax.Array | np.ndarray
    cols: jax.Array | np.ndarray
    count: jax.Array | int


def work_list(mask: Mask | None, T: int, S: int, block_q: int, block_k: int) -> WorkList:
    """Every tile that is live for some batch element and head, in row-major order."""
    live = (classify(mask, T, S, block_q, block_k) != EMPTY).any((0, 1))
    if live.size == 1:  # one tile: visiting it costs less than asking whether to
        return WorkList(np.zeros(1, np.int32), np.zeros(1, np.int32), 1)
    if isinstance(live, np.ndarray):
        rows, cols = (index.astype(np.int32) for index in np.nonzero(live))
        return WorkList(rows, cols, len(rows))
    rows, cols = (index.astype(jnp.int32) for index in jnp.nonzero(live, size=live.size, fill_value=0))
    return WorkList(rows, cols, jnp.sum(live, dtype=jnp.int32))


def count(mask: Mask | None, T: int, S: int, block_q: int, block_k: int, *, B: int = 1, N: int = 1) -> dict[str, int]:
    """How many tiles of each class B x N attention planes have; for reports, not inside jit.

    >>> from pallas_kernels import masks
    >>> count(masks.Causal(), 512, 512, 128, 128)
    {'empty': 6, 'mixed': 4, 'full': 6}
    """
    classes = np.asarray(classify(mask, T, S, block_q, block_k))
    classes = np.broadcast_to(classes, (B, N, *classes.shape[2:]))
    return {name: int(np.sum(classes == c)) for name, c in (("empty", EMPTY), ("mixed", MIXED), ("full", FULL))}


class Schedule(NamedTuple):
    """The live tiles of each row of tiles, in the order in which a kernel visits them: mixed ones, then full ones.

    Softmax does not mind the order, and two loops need no branch. Step n of a row visits tile column

        order[..., row, n]                                          where `order` is given, else, by `runs`,
        a + n           n < b - a             mixed tiles left of the full ones          a   b     c   d
        c + n - (b - a) n < (b - a) + (d - c) mixed tiles right of them                  |mmm|fffff|mmm|
        b + n - mixed   beyond                the full ones

    Attributes:
      mixed: int32 [B|1, N|1, rows]; how many of the row's tiles are mixed.
      live: int32 [B|1, N|1, rows]; how many it has in all.
      runs: int32 [rows, 4], the (a, b, c, d) of each row, for static masks whose tiles lie in one run; else None.
      order: int32 [B|1, N|1, rows, cols]; entries from `live` on are padding; None where `runs` says it.
    """

    mixed: jax.Array | np.ndarray
    live: jax.Array | np.ndarray
    runs: np.ndarray | None
    order: jax.Array | np.ndarray | None

    def column(self, n: jax.Array | int, runs: Sequence, order: Callable) -> jax.Array:
        """Tile column of step n, from the row's four numbers `runs`, or by asking `order(n)`."""
        if self.order is not None:
            return order(n)
        a, b, c, d = runs
        left, mixed = b - a, (b - a) + (d - c)
        return jnp.where(n < left, a + n, jnp.where(n < mixed, c + n - left, b + n - mixed))


def schedule(
    mask: Mask | None, T: int, S: int, block_q: int, block_k: int, *, transpose: bool = False, mix_tail: bool = True
) -> Schedule:
    """Which tiles a kernel visits, and in which order.

    Args:
      transpose: columns of tiles take the part of rows: what the pass over keys of a backward pass needs.
      mix_tail: count the ragged last column of tiles as mixed, for kernels that hide what lies beyond S by masking.
    """
    classes = classify(mask, T, S, block_q, block_k)
    xp = np if isinstance(classes, np.ndarray) else jnp
    if mix_tail and S % block_k:
        last = xp.arange(classes.shape[-1]) == classes.shape[-1] - 1
        classes = xp.where(last & (classes == FULL), np.int8(MIXED), classes)
    if transpose:
        classes = xp.swapaxes(classes, 2, 3)
    mixed = (classes == MIXED).sum(-1, dtype=np.int32)
    live = (classes != EMPTY).sum(-1, dtype=np.int32)
    runs = _runs(classes) if isinstance(classes, np.ndarray) else None
    order = None
    if runs is None:
        # Stable, so that tiles of one class keep their order from left to right.
        rank = xp.where(classes == MIXED, 0, xp.where(classes == FULL, 1, 2))
        order = xp.argsort(rank, axis=-1, stable=True).astype(np.int32)
    return Schedule(mixed, live, runs, order)


def _runs(classes: np.ndarray) -> np.ndarray | None:
    """(a, b, c, d) of each row, or None where some row's live or full tiles do not lie in one run."""
    classes = classes[0, 0]
    cols = np.arange(classes.shape[1])

    def run(chosen):
        any_, n = chosen.any(1), chosen.sum(1)
        first = np.where(any_, chosen.argmax(1), 0)
        inside = (cols >= first[:, None]) & (cols < (first + n)[:, None])
        return first, first + n, bool((inside == chosen).all())

    a, d, live_is_run = run(classes != EMPTY)
    b, c, full_is_run = run(classes == FULL)
    if not (live_is_run and full_is_run):
        return None
    none = b == c
    return np.stack([a, np.where(none, d, b), np.where(none, d, c), d], axis=1).astype(np.int32)


def mask_window(row: jax.Array, col: jax.Array, T: int, S: int, block_q: int, block_k: int, align: int = 1) -> tuple:
    """Where in the M-mask (`m_mask`) the causal mask of the tile that starts at (row, col) begins: (row, column).

    FastAttention (Lin et al., 2024, section 4.2): hidden is b - a > row - col + S - T at entry (a, b) of a tile, so
    tiles of one diagonal look alike, and moving the window right or down in the M-mask is moving the diagonal. Both
    clamps are exact: beyond them a tile is all hidden or all visible.

        row - col + S - T <= 0:  start at (0, col - row - S + T), at most block_q     M-mask  0 1 1 1
                          >  0:  start at (row - col + S - T, 0), at most block_k             0 0 1 1
                                                                                              0 0 0 1
    Args:
      row, col: first row and column of the tile; block_q and block_k are its size.
      align: the window starts at multiples of it, if row - col is one; the M-mask is shifted by what then remains.
    """
    shift = (S - T) % align
    diagonal = row - col + S - T - shift
    return jnp.clip(diagonal, 0, block_k), jnp.clip(-diagonal, 0, _last_column(block_q, shift, align))


def m_mask(T: int, S: int, block_q: int, block_k: int, align: int = 1) -> jax.Array:
    """The one causal mask that all tiles of a call share, int8, 1 = hidden: twice the larger tile edge a side,
    whatever T and S are."""
    shift = (S - T) % align
    side = max(2 * max(block_q, block_k), _last_column(block_q, shift, align) + block_k)
    a, b = (jax.lax.broadcasted_iota(jnp.int32, (side, side), axis) for axis in (0, 1))
    return (b > a + shift).astype(jnp.int8)


def _last_column(block_q: int, shift: int, align: int) -> int:
    """From this column on, a window of the M-mask is all hidden."""
    return block_q + shift + -(block_q + shift) % align
