# SPDX-License-Identifier: Apache-2.0
"""Which multiprocessor does what: a persistent kernel, its work list, and the walk through it inside the kernel.

An item is one row of tiles of one head of one batch element (or of the heads of a group, one after another). Its cost
goes by the number of its live tiles, so causal rows differ by two orders of magnitude. Where costs are known while
tracing they are dealt greedily, longest first, each to the multiprocessor with the least; where only the device knows
them, sorted and dealt in snake order. Either way a few planes at a time, whose keys the L2 cache holds.
"""

import functools
import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.mosaic_gpu.plane import broadcast_index
from pallas_kernels.flash_attention.tiles import Schedule

NO_ITEM = -1
# Loads are even if the largest is no more than this times the mean. Fewer planes share the cache better: grouped
# heads at 8k, dealt to within 2 %, took 11 % longer.
EVEN = 1.06


class Work(NamedTuple):
    """What the kernel reads.

    Attributes:
      items: int32 [rounds, multiprocessors]; item numbers (b * N / group + n / group) * rows + row, or NO_ITEM.
      rows: int32 [B|1, N|1, rows, 6]: live tiles, mixed tiles, and the four `runs` of a row of tiles.
      order: int32 [B|1, N|1, rows, cols] or None, as in `tiles.Schedule`.
      rounds: int32 [1], how many of the rounds hold items; None: all.
    """

    items: jax.Array
    rows: jax.Array
    order: jax.Array | None
    rounds: jax.Array | None = None


class Item(NamedTuple):
    """A row of tiles: which one, how many of its tiles are live and mixed, and the four `runs` of `tiles.Schedule`."""

    b: Any
    n: Any
    row: Any
    live: Any
    mixed: Any
    runs: Sequence


class Walk(NamedTuple):
    """One multiprocessor's way through its items, inside a kernel.

    Attributes:
      work: references to the arrays of a `Work`.
      schedule: what it was made of.
      N, group: as `plan` was given them.
      sm: the multiprocessor.
    """

    work: Work
    schedule: Schedule
    N: int
    group: int
    sm: Any

    def item(self, b: Any, n: Any, row: Any) -> Item:
        def number(field: int, known: int | None) -> Any:
            # + 0: inside shard_map what is read varies over the mesh and what is computed does not; a loop that starts
            # at the one and goes on with the other has no type.
            return _entry(self.work.rows, b, n, row, field) + 0 if known is None else jnp.int32(known)

        live, mixed, *runs = itertools.starmap(number, enumerate(_constants(self.schedule)))
        return Item(b, n, row, live, mixed, runs)

    def column(self, item: Item, step: Any) -> Any:
        """Tile column of a step of an item."""
        order = functools.partial(_entry, self.work.order, item.b, item.n, item.row)
        return self.schedule.column(step, item.runs, order)

    def for_each(self, do: Callable[[Item, Any], Any], carry: Any, ahead: bool = True) -> Any:
        """carry = do(item, carry) for this multiprocessor's items, `item` being that of a group's first head.

        With `ahead` the next one is read while this one is worked on, which takes registers: two reads that depend on
        each other take a microsecond.
        """
        most, rows = self.work.items.shape[0], self.schedule.live.shape[-1]
        rounds = most if self.work.rounds is None else self.work.rounds[0]
        heads = self.N // self.group

        def numbered(number):
            number = jnp.maximum(number, 0)
            b, head, row = number // (heads * rows), number // rows % heads, number % rows
            return self.item(b, head * self.group, row)

        def now(r, carry):
            number = self.work.items[r, self.sm]
            return lax.cond(number >= 0, lambda: do(numbered(number), carry), lambda: carry)

        if not ahead:
            return lax.fori_loop(0, rounds, now, carry)

        def one(r, state):
            number, item, carry = state
            following = self.work.items[jnp.minimum(r + 1, most - 1), self.sm]
            following_item = numbered(following)
            carry = lax.cond(number >= 0, lambda: do(item, carry), lambda: carry)
            return following, following_item, carry

        first = self.work.items[0, self.sm]
        return lax.fori_loop(0, rounds, one, (first, numbered(first), carry))[2]

    def sweep(self, item: Item, tile: Callable[[bool, Any, Any], Any], carry: Any, first: int = 0) -> Any:
        """carry = tile(masked, step, carry) for an item's tiles from number `first` on: mixed ones, then full ones."""
        start: Any = first
        if some_mixed(self.schedule):
            carry = lax.fori_loop(first, item.mixed, functools.partial(tile, True), carry)
            start = jnp.maximum(item.mixed, first)
        if some_full(self.schedule):
            carry = lax.fori_loop(start, item.live, functools.partial(tile, False), carry)
        return carry


def some_mixed(schedule: Schedule) -> bool:
    """Whether a loop over mixed tiles has to be compiled: rows that see nothing have one hidden tile."""
    if isinstance(schedule.live, jax.Array):
        return True
    return bool((schedule.mixed > 0).any() or (schedule.live == 0).any())


def some_full(schedule: Schedule) -> bool:
    """Whether a loop over full tiles has to be compiled."""
    return isinstance(schedule.live, jax.Array) or bool((schedule.live > schedule.mixed).any())


def _constants(schedule: Schedule) -> list[int | None]:
    """Of the six numbers of a row of tiles, those that are the same for every row: registers saved."""
    if schedule.runs is None or isinstance(schedule.live, jax.Array):
        return [None] * 6
    return [int(column[0]) if (column == column[0]).all() else None for column in _six(schedule)[0, 0].T]


def _entry(ref: Any, b: Any, n: Any, *rest: Any) -> Any:
    return ref[(broadcast_index(b, ref.shape[0]), broadcast_index(n, ref.shape[1]), *rest)]


def plan(schedule: Schedule, B: int, N: int, num_sms: int, planes_in_cache: int, group: int = 1) -> Work:
    """Deals the rows of tiles of B x N attention planes to `num_sms` multiprocessors.

    Args:
      planes_in_cache: how many planes of an item the L2 cache holds: these are worked on together.
      group: how many successive heads share an item.

    A row without a live tile gets one that is hidden as a whole, so that every row has a first tile.
    """
    rows = _six(schedule)
    live, mixed, heads = rows[..., 0], rows[..., 1], N // group
    together = max(1, planes_in_cache)
    # In halves of a full tile: a mixed one takes one and a half, and an item half of one beside its tiles.
    costs: Any = 2 * live + mixed
    if isinstance(rows, np.ndarray):
        items = _greedy(tuple(int(cost) + 1 for cost in group * costs[0, 0]), B * heads, num_sms, together)
    else:
        costs = jnp.broadcast_to(costs, (B, N, costs.shape[-1])).reshape(B, heads, group, -1).sum(2) + 1
        items = _sorted(costs.reshape(B * heads, -1), num_sms, together)
    order = None if schedule.order is None else jnp.asarray(schedule.order)
    return Work(jnp.asarray(items), jnp.asarray(rows), order)


def some_of(work: Work, wanted: jax.Array) -> Work:
    """The items of rows of tiles where `wanted`, bool [B, N, rows]; each stays with its multiprocessor."""
    keep = (work.items >= 0) & wanted.reshape(-1)[jnp.maximum(work.items, 0)]
    ends = jnp.arange(1, len(work.items) + 1, dtype=jnp.int32)[:, None]
    rounds = jnp.max(jnp.where(keep, ends, 0)).reshape(1)
    return work._replace(items=jnp.where(keep, work.items, NO_ITEM), rounds=rounds)


def _six(schedule: Schedule) -> Any:
    """[B|1, N|1, rows, 6]: live tiles, mixed tiles, and the four `runs` of each row of tiles."""
    xp: Any = np if isinstance(schedule.live, np.ndarray) else jnp
    unseen = schedule.live == 0
    live, mixed = xp.maximum(schedule.live, 1), xp.where(unseen, 1, schedule.mixed)
    if schedule.runs is None:
        runs = xp.zeros((*live.shape, 4), np.int32)
    else:
        runs = np.where(unseen[..., None], np.array([0, 1, 1, 1], np.int32), schedule.runs[None, None])
    return xp.concatenate([live[..., None], mixed[..., None], runs], axis=-1).astype(np.int32)


def persistent(body: Callable, out_type: Any, scratch: Any, num_sms: int, consumers: int, **options: Any) -> Callable:
    """A kernel with a block for each multiprocessor: `consumers` warpgroups that compute, and one more that copies."""
    return plgpu.kernel(
        body,
        out_type=tuple(out_type),
        scratch_types=list(scratch),
        grid=(num_sms,),
        grid_names=("sm",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        # No thread reads what it wrote to shared memory; barriers of the kernel's own order all that is exchanged.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        **options,
    )


@functools.lru_cache(256)
def _greedy(costs: tuple[int, ...], planes: int, num_sms: int, together: int) -> np.ndarray:
    """Longest first within each `together` planes, to the multiprocessor that has the least so far.

    Of the last planes so many are together that loads end up even: a few long rows at the end would leave most
    multiprocessors idle. In the order of their numbers if all cost the same: neighbors then share keys in the cache.
    """
    rows = len(costs)
    if len(set(costs)) == 1:
        return _rounds(np.arange(planes * rows, dtype=np.int32)[None], num_sms)
    starts = list(range(0, planes, together))
    even, last = EVEN * planes * sum(costs) / num_sms, 1
    lists, most = _deal(costs, [*starts, planes], num_sms)
    while most > even and last < len(starts):
        last *= 2
        lists, most = _deal(costs, [*starts[: 1 - last], planes] if last < len(starts) else [0, planes], num_sms)
    items = np.full((max(map(len, lists)), num_sms), NO_ITEM, np.int32)
    for sm, mine in enumerate(lists):
        items[: len(mine), sm] = mine
    return items


def _deal(costs: tuple[int, ...], bounds: list[int], num_sms: int) -> tuple[list[list[int]], int]:
    """The items of each multiprocessor, and the largest load; planes between two `bounds` are dealt together."""
    lists: list[list[int]] = [[] for _ in range(num_sms)]
    load = [(0, sm) for sm in range(num_sms)]
    longest_first = sorted(range(len(costs)), key=lambda row: -costs[row])
    for start, end in itertools.pairwise(bounds):
        for row, plane in itertools.product(longest_first, range(start, end)):
            total, sm = heapq.heappop(load)
            lists[sm].append(plane * len(costs) + row)
            heapq.heappush(load, (total + costs[row], sm))
    return lists, max(load)[0]


def _sorted(costs: jax.Array, num_sms: int, together: int) -> jax.Array:
    """As `_greedy`, of costs [planes, rows] that only the device knows: longest first within each `together` planes.

    Every other round is dealt backwards, and each pair of rounds starts at another multiprocessor, evenly spread: heads
    cost the same row by row, and without that the same multiprocessors would have the most each time. For packed
    documents the largest load is 1.00 to 1.09 times the mean.
    """
    planes, rows = costs.shape
    together = min(together, planes)
    groups = -(-planes // together)
    costs = jnp.pad(costs, ((0, groups * together - planes), (0, 0)), constant_values=NO_ITEM).reshape(groups, -1)
    longest_first = jnp.argsort(-costs, axis=1, stable=True) + jnp.arange(groups)[:, None] * (together * rows)
    dealt = _rounds(jnp.where(longest_first < planes * rows, longest_first, NO_ITEM).astype(jnp.int32), num_sms)
    sm, pair = np.arange(num_sms), np.arange(len(dealt))[:, None] // 2
    position = (sm - pair * num_sms // -(-len(dealt) // 2)) % num_sms if groups > 1 else sm + 0 * pair
    backwards = np.arange(len(dealt))[:, None] % 2 == 1
    return jnp.take_along_axis(dealt, np.where(backwards, num_sms - 1 - position, position), axis=1)


def _rounds(items: Any, num_sms: int) -> Any:
    """[groups, items] -> [rounds, num_sms], one item a multiprocessor in each round; groups do not share a round."""
    xp: Any = np if isinstance(items, np.ndarray) else jnp
    padding = ((0, 0), (0, -items.shape[1] % num_sms))
    return xp.pad(items, padding, constant_values=NO_ITEM).reshape(-1, num_sms)
