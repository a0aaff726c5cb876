# SPDX-License-Identifier: Apache-2.0
"""The cache of keys and values, as implementations see it: dense or in pages, plain or quantized.

dense     [B, S, K, H]            sequence b's keys are row b
pages     [P, page, K, H]         its keys s are row s % page of page page_table[b, s // page]
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys, values and where they lie.

    Attributes:
      key, value: as above.
      lengths: int32 [B]; how many keys each sequence has.
      page_table: int32 [B, pages of a sequence], or None. What is out of range is never used, and read as the nearest
        page there is.
      key_scale, value_scale: [K], what one unit of a quantized cache is worth, or None.
    """

    key: jax.Array
    value: jax.Array
    lengths: jax.Array
    page_table: jax.Array | None = None
    key_scale: jax.Array | None = None
    value_scale: jax.Array | None = None

    @property
    def S(self) -> int:
        """How many keys a sequence may have."""
        return self.key.shape[1] * (1 if self.page_table is None else self.page_table.shape[1])

    def keys(self, first: jax.Array | int, count: int, dtype) -> jax.Array:
        """Keys [B, count, K, H] of all sequences from number `first` on, without their scale; in pages both numbers are
        multiples of a page."""
        return self._rows(self.key, first, count, dtype)

    def values(self, first: jax.Array | int, count: int, dtype) -> jax.Array:
        return self._rows(self.value, first, count, dtype)

    def _rows(self, array: jax.Array, first, count: int, dtype) -> jax.Array:
        if self.page_table is None:
            rows = lax.dynamic_slice_in_dim(array, first, count, axis=1)
        else:
            pages, page = array.shape[:2]
            numbers = lax.dynamic_slice_in_dim(self.page_table, first // page, count // page, axis=1)
            rows = array[jnp.clip(numbers, 0, pages - 1)].reshape(len(numbers), count, *array.shape[2:])
        return rows.astype(dtype)
