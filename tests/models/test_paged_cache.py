# SPDX-License-Identifier: Apache-2.0
"""The account of pages against a model of it, and decoding from pages against decoding from rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import Decoder, KVCache, preset
from models.cache import write
from models.paged_cache import BlockAllocator, PagedCache
from tests.models.random_model import random_model

CONFIG = dataclasses.replace(preset("tiny"), num_layers=2, sliding_window=20)


@given(
    num_pages=st.integers(1, 12),
    actions=st.lists(st.tuples(st.booleans(), st.integers(0, 13)), max_size=60),
)
def test_no_page_has_two_owners_and_none_is_lost(num_pages, actions):
    """Any order of allocating (a count) and freeing (one of the owners)."""
    allocator = BlockAllocator(num_pages)
    owners: list[list[int]] = []
    for allocate, number in actions:
        free = num_pages - sum(map(len, owners))
        assert allocator.available == free
        if allocate:
            pages = allocator.allocate(number)
            assert (pages is None) == (number > free)
            owners += [] if pages is None else [pages]
        elif owners:
            allocator.free(owners.pop(number % len(owners)))
        taken = [page for pages in owners for page in pages]
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(range(num_pages))


def test_a_page_is_freed_once():
    allocator = BlockAllocator(4)
    first, second = allocator.allocate(2), allocator.allocate(1)
    assert allocator.allocate(2) is None
    allocator.free(first)
    for wrong in (first, [*second, *second], [*second, 7]):
        with pytest.raises(ValueError, match="cannot be freed: each must have been allocated, and be freed once"):
            allocator.free(wrong)
    assert allocator.available == 3  # the page that was named beside a wrong one is still out
    with pytest.raises(ValueError, match="num_pages must be an integer >= 1, got 0"):
        BlockAllocator(0)
    with pytest.raises(ValueError, match="count must be an integer >= 0, got -1"):
        allocator.allocate(-1)


def test_decoding_from_pages_equals_decoding_from_rows():
    """Pages in any order, a prompt over several of them, a row that is not live; nobody else's page is touched."""
    decoder = Decoder.from_model(random_model(CONFIG))
    lengths, page_size = np.asarray([21, 5, 9], np.int32), 8
    tokens = np.random.default_rng(0).integers(0, 256, (3, 26)).astype(np.int32)
    dense = KVCache.zeros(CONFIG, 3, 32, jnp.float32)
    pages = PagedCache.zeros(CONFIG, 3, num_pages=16, page_size=page_size, pages_per_row=4, dtype=jnp.float32)
    table = np.asarray([[14, 3, 9, 0], [5, 99, -1, 7], [11, 2, 1, 4]], np.int32)  # row 1 has only one page of its own
    pages = dataclasses.replace(pages, page_table=jnp.asarray(table))
    assert pages.size == dense.size

    prefill = jax.jit(lambda decoder, tokens, cache: decoder.prefill(tokens, jnp.asarray(lengths), cache))
    step = jax.jit(lambda decoder, token, live, cache: decoder.step(token, cache, live=live))
    expected, dense = prefill(decoder, tokens[:, :21], dense)
    actual, pages = prefill(decoder, tokens[:, :21], pages)
    np.testing.assert_array_equal(actual, expected)
    for t in range(21, 25):
        live = jnp.asarray([True, t != 22, True])
        expected, dense = step(decoder, tokens[:, t], live, dense)
        actual, pages = step(decoder, tokens[:, t], live, pages)
        np.testing.assert_allclose(actual[live], expected[live], rtol=0, atol=2e-5)
        np.testing.assert_array_equal(pages.lengths, dense.lengths)
    owned = {14, 3, 9, 0, 5, 11, 2}
    for array in pages.key + pages.value:
        written = {page for page in range(16) if np.any(array[page])}
        assert written <= owned
    np.testing.assert_array_equal(pages.key[1][jnp.asarray([14, 3])].reshape(16, 2, 32), dense.key[1][0, :16])


def test_tokens_beyond_a_rows_pages_are_dropped():
    pages = PagedCache.zeros(CONFIG, 1, num_pages=3, page_size=4, pages_per_row=2, dtype=jnp.float32)
    positions = jnp.asarray([[6, 7, 8, 9]])
    places = pages.places(positions, jnp.ones((1, 4), bool))
    array = write(pages.key[0], places, jnp.ones((1, 4, 2, 32)))
    assert float(array.sum()) == 2 * 2 * 32
    assert len({tuple(place) for place in np.stack(places).reshape(2, -1).T.tolist()}) == 4  # none is named twice
