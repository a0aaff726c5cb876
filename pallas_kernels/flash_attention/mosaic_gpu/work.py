# SPDX-License-Identifier: Apache-2.0
"""Which multiprocessor does what: the work list of a persistent kernel.

An item is one row of tiles of one head of one batch element. Its cost is the number of its live tiles, so causal
rows differ by two orders of magnitude. Where costs are known while tracing they are dealt greedily, longest first,
each to the multiprocessor with the least; where only the device knows them, sorted and dealt in snake order.
"""

import functools
import heapq
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention.tiles import Schedule

NO_ITEM = -1


class Work(NamedTuple):
    """What the kernel reads.

    Attributes:
      items: int32 [rounds, multiprocessors]; item numbers (b * N + n) * rows + row, or NO_ITEM.
      rows: int32 [B|1, N|1, rows, 6]: live tiles, mixed tiles, and the four `runs` of a row of tiles.
      order: int32 [B|1, N|1, rows, cols] or None, as in `tiles.Schedule`.
    """

    items: jax.Array
    rows: jax.Array
    order: jax.Array | None


def plan(schedule: Schedule, B: int, N: int, num_sms: int, planes_in_cache: int) -> Work:
    """Deals the rows of tiles of B x N attention planes to `num_sms` multiprocessors.

    Args:
      planes_in_cache: of how many planes the L2 cache holds the keys and values: these are worked on together.

    A row without a live tile gets one that is hidden as a whole, so that every row has a first tile.
    """
    xp: Any = np if isinstance(schedule.live, np.ndarray) else jnp
    live, mixed = xp.maximum(schedule.live, 1), xp.where(schedule.live == 0, 1, schedule.mixed)
    if schedule.runs is None:
        runs = xp.zeros((*live.shape, 4), np.int32)
    else:
        unseen = (schedule.live[0, 0] == 0)[:, None]
        runs = np.where(unseen, np.array([0, 1, 1, 1], np.int32), schedule.runs)[None, None]
    rows = xp.concatenate([live[..., None], mixed[..., None], runs], axis=-1).astype(np.int32)
    costs = xp.broadcast_to(live, (B, N, live.shape[-1])).reshape(-1)
    if isinstance(costs, np.ndarray):
        row_costs: Any = live[0, 0]
        items = _greedy(tuple(int(cost) for cost in row_costs), B * N, num_sms, max(1, planes_in_cache))
    else:
        items = _snake(jnp.argsort(-costs, stable=True).astype(jnp.int32), num_sms)
    order = None if schedule.order is None else jnp.asarray(schedule.order)
    return Work(jnp.asarray(items), jnp.asarray(rows), order)


@functools.lru_cache(256)
def _greedy(costs: tuple[int, ...], planes: int, num_sms: int, together: int) -> np.ndarray:
    """Longest first within each `together` planes, to the multiprocessor that has the least so far.

    In the order of their numbers if all cost the same: neighbors then share keys in the cache.
    """
    rows = len(costs)
    if len(set(costs)) == 1:
        return _snake(np.arange(planes * rows, dtype=np.int32), num_sms, straight=True)
    lists: list[list[int]] = [[] for _ in range(num_sms)]
    load = [(0.0, sm) for sm in range(num_sms)]
    longest_first = sorted(range(rows), key=lambda row: -costs[row])
    for start in range(0, planes, together):
        for row, plane in itertools.product(longest_first, range(start, min(start + together, planes))):
            total, sm = heapq.heappop(load)
            lists[sm].append(plane * rows + row)
            heapq.heappush(load, (total + costs[row] + 1, sm))  # + 1: what an item costs apart from its tiles
    items = np.full((max(map(len, lists)), num_sms), NO_ITEM, np.int32)
    for sm, mine in enumerate(lists):
        items[: len(mine), sm] = mine
    return items


def _snake(items: Any, num_sms: int, straight: bool = False) -> Any:
    xp: Any = np if isinstance(items, np.ndarray) else jnp
    padding = xp.full(-len(items) % num_sms, NO_ITEM, np.int32)
    dealt = xp.concatenate([items, padding]).reshape(-1, num_sms)
    if straight:
        return dealt
    odd = xp.arange(len(dealt))[:, None] % 2 == 1
    return xp.where(odd, dealt[:, ::-1], dealt)
