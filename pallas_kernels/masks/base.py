# SPDX-License-Identifier: Apache-2.0
"""The mask algebra: `&`, `|`, and the three questions an implementation asks.

allowed(rows, cols, T, S)     is (row, col) visible?      bool  [B|1, N|1, rows, cols]
tiles(T, S, block_q, block_k) is a tile live, is it full? Tiles [B|1, N|1, rows of tiles, columns of tiles]
as_array(T, S)                the dense array, for tests and pictures
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from pallas_kernels.core.check import Axes

Array = jax.Array | np.ndarray


class Tiles(NamedTuple):
    """What is known of each tile. Static masks give NumPy arrays, so that a grid can be built from them.

    Attributes:
      live: False means that no pair of the tile is visible; True that some may be.
      full: True means that every pair of the tile (inside T x S) is visible.
    """

    live: Array
    full: Array

    @property
    def classes(self) -> Array:
        """0 = empty, 1 = mixed, 2 = full, int8."""
        return self.live.astype(np.int8) + (self.live & self.full).astype(np.int8)


@dataclass_transform(frozen_default=True, eq_default=False)
def mask_dataclass(cls=None, *, static: tuple[str, ...] = ()) -> Any:
    """A frozen dataclass that is a pytree: fields in `static` are compared, all others are array leaves."""
    if cls is None:
        return functools.partial(mask_dataclass, static=static)
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    data = [f.name for f in dataclasses.fields(cls) if f.name not in static]
    return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=list(static))


class Mask:
    """Base of all masks. Combine with `&` (both allow) and `|` (either allows)."""

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other) if isinstance(other, Mask) else NotImplemented

    def __bool__(self):
        raise TypeError("a mask has no truth value; combine masks with & and |, not with `and` and `or`.")

    def check(self, axes: "Axes") -> None:
        """ValueError unless the mask's arrays fit the axes B, N, T, S bound by query and key."""
        raise NotImplementedError

    def allowed(self, rows: Array, cols: Array, T: int, S: int) -> Array:
        """Visibility of query rows [R] and key columns [C]: bool, broadcastable to [B, N, R, C].

        Indices past the end (the ragged tail of a last block) are allowed and give arbitrary answers.
        """
        raise NotImplementedError

    def tiles(self, T: int, S: int, block_q: int, block_k: int) -> Tiles:
        """Live and full tiles, each broadcastable to [B, N, ceil(T / block_q), ceil(S / block_k)]."""
        raise NotImplementedError

    def as_array(self, T: int, S: int) -> jax.Array:
        """The dense mask, bool, broadcastable to [B, N, T, S]. Quadratic memory: for tests and pictures.

        >>> import numpy as np
        >>> from pallas_kernels import masks
        >>> print(np.asarray(masks.Causal().as_array(2, 4)[0, 0]).astype(int))
        [[1 1 1 0]
         [1 1 1 1]]
        """
        allowed = self.allowed(np.arange(T, dtype=np.int32), np.arange(S, dtype=np.int32), T, S)
        return jnp.broadcast_to(jnp.asarray(allowed), (*allowed.shape[:2], T, S))


class _Pair(Mask):
    left: Mask
    right: Mask

    def check(self, axes: "Axes") -> None:
        self.left.check(axes)
        self.right.check(axes)

    def __str__(self) -> str:
        sign = "&" if isinstance(self, And) else "|"
        return " ".join([_bracket(self.left, self), sign, _bracket(self.right, self)])


def _bracket(inner: Mask, outer: Mask) -> str:
    return f"({inner})" if isinstance(inner, _Pair) and type(inner) is not type(outer) else str(inner)


@mask_dataclass
class And(_Pair):
    left: Mask
    right: Mask

    def allowed(self, rows: Array, cols: Array, T: int, S: int) -> Array:
        return self.left.allowed(rows, cols, T, S) & self.right.allowed(rows, cols, T, S)

    def tiles(self, T: int, S: int, block_q: int, block_k: int) -> Tiles:
        a, b = (m.tiles(T, S, block_q, block_k) for m in (self.left, self.right))
        return Tiles(a.live & b.live, a.full & b.full)


@mask_dataclass
class Or(_Pair):
    left: Mask
    right: Mask

    def allowed(self, rows: Array, cols: Array, T: int, S: int) -> Array:
        return self.left.allowed(rows, cols, T, S) | self.right.allowed(rows, cols, T, S)

    def tiles(self, T: int, S: int, block_q: int, block_k: int) -> Tiles:
        a, b = (m.tiles(T, S, block_q, block_k) for m in (self.left, self.right))
        return Tiles(a.live | b.live, a.full | b.full)


def take(values: Array, indices: Array, axis: int = -1) -> Array:
    """values[..., indices] with indices past the end clamped; stays NumPy when both are."""
    xp = np if isinstance(values, np.ndarray) and isinstance(indices, np.ndarray) else jnp
    return xp.take(values, indices, axis=axis, mode="clip")


def block_range(values: Array, block: int) -> tuple[Array, Array]:
    """Smallest and largest value in each block of the last axis: two arrays [..., ceil(n / block)]."""
    n = values.shape[-1]
    xp = np if isinstance(values, np.ndarray) else jnp
    # A ragged last block is filled with its own last value, which changes neither bound.
    widths = [(0, 0)] * (values.ndim - 1) + [(0, -n % block)]
    blocks = xp.pad(values, widths, mode="edge").reshape(*values.shape[:-1], -1, block)
    return blocks.min(-1), blocks.max(-1)


def as_rows(values: Array) -> Array:
    """[n] or [B, n] -> [B|1, 1, n, 1]: along query rows."""
    return values.reshape((-1, 1, values.shape[-1], 1))


def as_cols(values: Array) -> Array:
    """[n] or [B, n] -> [B|1, 1, 1, n]: along key columns."""
    return values.reshape((-1, 1, 1, values.shape[-1]))


def check_index_array(name: str, array: Array) -> None:
    """TypeError unless `array` is an array of integers."""
    if not isinstance(array, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} must be an integer array, got {type(array).__name__}; wrap it in jnp.asarray(...).")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must be an integer array, got {array.dtype}.")
