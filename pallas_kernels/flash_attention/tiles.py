# SPDX-License-Identifier: Apache-2.0
"""Which tiles of the T x S plane exist, and which of them an implementation has to touch.

A tile is block_q query rows by block_k key columns; the last ones may be ragged. A mask sorts tiles in three
classes: an empty tile is skipped, a full one needs no masking code, a mixed one evaluates the mask. Static masks
(Causal, Window, no mask) are sorted while tracing, in NumPy; masks that hold arrays are sorted on the device.
"""

import math
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
