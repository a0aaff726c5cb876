# SPDX-License-Identifier: Apache-2.0
"""The dense key/value cache: one array a layer for keys and one for values, every row with room for S tokens.

Letters as in layers.py. Layers have arrays of their own, not slices of one, because a kernel must be given a whole
array: XLA would copy the slice. `paged_cache.py` has the cache whose rows share their memory.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from models.layers import BlockConfig

# Where new tokens [B, T] go: index arrays for the first two axes of a layer's array. Out of range is nowhere.
Places = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers for B rows of up to S tokens; a pytree.

    Entries at or beyond a row's length are never visible and are overwritten by the next tokens.

    Attributes:
      key, value: L arrays [B, S, K, H]; keys are stored rotated.
      lengths: int32 [B], valid tokens of each row.
    """

    key: tuple[jax.Array, ...]
    value: tuple[jax.Array, ...]
    lengths: jax.Array
    page_table: ClassVar[None] = None

    @classmethod
    def zeros(cls, config: BlockConfig, batch: int, size: int, dtype: DTypeLike = jnp.bfloat16) -> KVCache:
        """An empty cache for `batch` rows of up to `size` tokens."""
        shape = (batch, size, config.num_kv_heads, config.head_dim)
        key, value = (tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)) for _ in range(2))
        return cls(key, value, jnp.zeros((batch,), jnp.int32))

    @property
    def size(self) -> int:
        """S, the most tokens that a row can hold."""
        return self.key[0].shape[1]

    def places(self, positions: jax.Array, valid: jax.Array) -> Places:
        """Where tokens at `positions`, int32 [B, T], go; nowhere if they are not `valid` or beyond S."""
        rows = jnp.arange(len(positions), dtype=jnp.int32)[:, None]
        # No two tokens have one place, not even those that are dropped: `write` promises so.
        return rows, jnp.where(valid, positions, self.size + positions)


def write(array: jax.Array, places: Places, new: jax.Array) -> jax.Array:
    """One layer's keys or values with `new` [B, T, K, H] at its places; in place if the array is donated."""
    return array.at[places].set(new.astype(array.dtype), mode="drop", unique_indices=True)
