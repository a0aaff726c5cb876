# SPDX-License-Identifier: Apache-2.0
"""A key/value cache in pages that all rows share (Kwon et al., "Efficient Memory Management for Large Language Model
Serving with PagedAttention", 2023, arXiv:2309.06180), and the account of which pages are free.

    page_table [B, pages of a row]      key, value of each layer [P, page, K, H]
      row 0:  5 2 .                       token s of row b lies in page page_table[b, s // page], at s % page
      row 1:  0 . .

A row takes as many pages as its tokens need, wherever they are, so requests of different lengths share the memory
without gaps. The arrays live on the device; who owns a page is decided on the host, between two programs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from models.cache import Places
from models.layers import BlockConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Keys and values of all layers for B rows in P pages; a pytree, used as a `KVCache` is.

    Attributes:
      key, value: L arrays [P, page, K, H]; keys are stored rotated.
      page_table: int32 [B, pages of a row]; entries beyond a row's tokens may be anything.
      lengths: int32 [B], valid tokens of each row.
    """

    key: tuple[jax.Array, ...]
    value: tuple[jax.Array, ...]
    page_table: jax.Array
    lengths: jax.Array

    @classmethod
    def zeros(
        cls,
        config: BlockConfig,
        batch: int,
        *,
        num_pages: int,
        page_size: int,
        pages_per_row: int,
        dtype: DTypeLike = jnp.bfloat16,
    ) -> PagedCache:
        """Empty pages, and a table that has yet to be filled in."""
        shape = (num_pages, page_size, config.num_kv_heads, config.head_dim)
        key, value = (tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)) for _ in range(2))
        table = jnp.zeros((batch, pages_per_row), jnp.int32)
        return cls(key, value, table, jnp.zeros((batch,), jnp.int32))

    @property
    def size(self) -> int:
        """The most tokens that a row can hold."""
        return self.page_table.shape[1] * self.key[0].shape[1]

    def places(self, positions: jax.Array, valid: jax.Array) -> Places:
        """Where tokens at `positions`, int32 [B, T], go; nowhere if they are not `valid` or beyond the row's pages."""
        pages, page_size = self.key[0].shape[:2]
        numbers = jnp.minimum(positions // page_size, self.page_table.shape[1] - 1)
        page = jnp.take_along_axis(self.page_table, numbers, axis=1)
        # No two tokens have one place, not even those that are dropped: `write` promises so.
        nowhere = pages + jnp.arange(positions.size, dtype=jnp.int32).reshape(positions.shape)
        return jnp.where(valid & (positions < self.size), page, nowhere), positions % page_size


class BlockAllocator:
    """Which of `num_pages` pages are free; on the host, and of no array.

    >>> allocator = BlockAllocator(4)
    >>> allocator.allocate(3), allocator.allocate(2), allocator.available
    ([0, 1, 2], None, 1)
    >>> allocator.free([0, 1, 2])
    >>> allocator.available
    4
    """

    def __init__(self, num_pages: int):
        if num_pages < 1:
            raise ValueError(f"num_pages must be an integer >= 1, got {num_pages!r}")
        self.num_pages = num_pages
        self._free = list(range(num_pages))[::-1]  # the last one is handed out next
        self._taken: set[int] = set()

    @property
    def available(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, or None, and nothing taken, where fewer are free."""
        if count < 0:
            raise ValueError(f"count must be an integer >= 0, got {count!r}")
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        self._taken.update(pages)
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Takes pages back; ValueError, and none taken back, for a page that is not out or is named twice."""
        pages = list(pages)
        if wrong := [page for page in pages if page not in self._taken] or len(set(pages)) < len(pages):
            named = wrong if isinstance(wrong, list) else pages
            raise ValueError(f"pages {named} cannot be freed: each must have been allocated, and be freed once")
        self._taken.difference_update(pages)
        self._free.extend(reversed(pages))
