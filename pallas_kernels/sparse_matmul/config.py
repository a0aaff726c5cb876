# SPDX-License-Identifier: Apache-2.0
"""Tiles of the kernels for NVIDIA GPUs: what they may be, a first guess, and where to search. The others have none."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call

TILE = 64  # outputs of a product
CHUNK = 32  # rows of an output that leave at a time, while the next are written
# Of a thread that multiplies, by their warpgroups: the one that copies leaves them all but 24 of its own.
REGISTERS = {1: 240, 2: 240, 3: 160}
OTHERS = 22  # registers that are neither sums nor weights
SHARED_MEMORY = 227 * 1024
SLACK = 512  # of it: barriers
# Measured on an H100, whose power limits its clock. In nanoseconds: a tile's first steps and its end; products of a
# step for each output of a block (of dense weights 1.5 times that); and a byte of weights on its way to them. In bytes
# a nanosecond: what the L2 gives, and the memory.
TILE_TIME, PRODUCT, DENSE, WEIGHT, L2, MEMORY = 1500, 0.0130, 1.5, 0.0045, 9500, 2900


@dataclasses.dataclass(frozen=True)
class Sm90Config:
    """`mosaic_gpu` on Hopper (sm90.py).

    Attributes:
      rows: of x in a tile, a multiple of 8; no more are taken than there are.
      warpgroups: of a block; they share rows of x.
      stages: steps, of 128 bytes of each row of x and their weights, that shared memory holds.
      tiles: of 64 outputs of a warpgroup.
      cluster: blocks that read rows of x for each other, 1 or 2.
    """

    rows: int = 256
    warpgroups: int = 2
    stages: int = 4
    tiles: int = 1
    cluster: int = 1

    def __post_init__(self):
        rules = {
            "rows": range(8, 257, 8),
            "warpgroups": (1, 2, 3),
            "stages": range(2, 33),
            "tiles": (1, 2),
            "cluster": (1, 2),
        }
        for name, allowed in rules.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"Sm90Config.{name} must be one of {tuple(allowed)}, got {value!r}.")
        # The compiler looks at a whole block's registers when it takes an instruction: 168 or 128 of a thread.
        if self.tiles * (self.rows // 2 + 2 * 10) + OTHERS > self.registers or self.warpgroups * self.rows > 3 * 192:
            raise ValueError(f"Sm90Config: sums and weights do not fit {self.registers} registers: {self}.")

    @property
    def registers(self) -> int:
        return REGISTERS[self.warpgroups]

    @property
    def outputs(self) -> int:
        """Of a tile of a cluster."""
        return self.cluster * self.warpgroups * self.tiles * TILE

    def rows_at_a_time(self, rows: int, dtype: Any, clusters: int) -> int:
        """How many tiles of rows `clusters` tiles should cover: as many bytes of x as of weights."""
        kept = 0.5625 if jnp.dtype(dtype).itemsize == 2 else 0.625
        return max(1, round(math.sqrt(clusters * self.outputs * kept / rows)))


@dataclasses.dataclass(frozen=True)
class Sm80Config:
    """`mosaic_gpu` on Ampere and Ada (sm80.py).

    Attributes:
      rows: of x in a tile, 32, 64 or 128: what four warps copy.
      tiles: of 64 outputs of a block.
      stages: steps, of 128 bytes of each row of x, that shared memory holds.
    """

    rows: int = 64
    tiles: int = 1
    stages: int = 4

    def __post_init__(self):
        rules = {"rows": (32, 64, 128), "tiles": (1, 2), "stages": range(2, 7)}  # 99 KiB are there
        for name, allowed in rules.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"Sm80Config.{name} must be one of {tuple(allowed)}, got {value!r}.")


Config = Sm90Config | Sm80Config


def kinds(device: Device, implementation: str) -> tuple[type[Config], ...]:
    """The configurations that an implementation takes; the first is the kind of its own choice."""
    if implementation != "mosaic_gpu":
        return ()
    return (Sm90Config, Sm80Config) if device.arch == "sm90" else (Sm80Config,)


def heuristic(call: Call, device: Device, implementation: str) -> Config:
    """The configuration that should take the least time."""
    return next(search_space(call, device, implementation))


def search_space(call: Call, device: Device, implementation: str) -> Iterator[Config]:
    """Configurations worth measuring, the likeliest first; of Hopper's the twelve that should take the least time."""
    return _of_hopper(call, device) if device.arch == "sm90" else _of_ampere(call)


def _of_ampere(call: Call) -> Iterator[Sm80Config]:
    """As many rows as there are. Two tiles read them half as often; their blocks are fewer."""
    few = 32 if call.sizes["M"] <= 32 else 64 if call.sizes["M"] <= 64 else 128
    for rows in (few, *(rows for rows in (32, 64, 128) if rows < few)):
        for tiles in (2, 1) if call.sizes["M"] > 64 else (1, 2):
            for stages in (4, 3):
                yield Sm80Config(rows, tiles, stages)


def _of_hopper(call: Call, device: Device) -> Iterator[Sm90Config]:
    found: dict[Sm90Config, float] = {}
    # Of those that should take the same time the ones that read less first; few rows are read fast enough.
    several = ((2, 1), (2, 1)) if call.sizes["M"] > 128 else ((1,), (1,))
    for cluster, tiles, warpgroups in itertools.product(*several, (1, 2, 3)):
        for most in range(64, 257, 8):
            rows = rows_of(most, cluster, call.sizes["M"], call.arguments[1].dtype)
            left = SHARED_MEMORY - SLACK - 2 * warpgroups * min(rows, CHUNK) * 2 * TILE
            stages = min(16, left // (128 * rows + warpgroups * tiles * step_bytes(call)))
            # Integers have twice the metadata, for which no registers are left beside two tiles of more rows.
            fits = tiles == 1 or rows <= 160 or call.arguments[1].dtype != "int8"
            if stages >= 3 and fits:
                with contextlib.suppress(ValueError):
                    config = Sm90Config(rows, warpgroups, stages, tiles, cluster)
                    found[config] = nanoseconds(config, call, device)
    yield from sorted(found, key=lambda config: found[config])[:12]


def rows_of(most: int, cluster: int, M: int, kind: Any) -> int:
    """Of a tile of at most so many rows, and of no more than there are."""
    rows = min(most, M + -M % 8)
    # Products of integers have no other widths; halves of a cluster are whole tiles of 8 rows.
    multiple = 16 if cluster > 1 or (jnp.dtype(kind) == jnp.int8 and rows > 32) else 8
    return rows - rows % multiple if rows % multiple and rows == most else rows + -rows % multiple


def step_bytes(call: Call) -> int:
    """Of the weights of 64 outputs, for 128 bytes of a row of x."""
    if not call.option("sparse"):
        return TILE * 128
    return TILE * (64 + (16 if call.arguments[1].dtype == "int8" else 8))


def nanoseconds(config: Sm90Config, call: Call, device: Device) -> float:
    """About what a call takes: of products, of what the L2 gives, or of what the memory does."""
    M, N, K = (call.sizes[name] for name in "MNK")
    kind, num_sms = jnp.dtype(call.arguments[1].dtype), device.num_cores or 132
    rows, weights = (
        rows_of(config.rows, config.cluster, M, kind),
        config.outputs // config.cluster // TILE * step_bytes(call),
    )
    tiles, at_a_time = -(-N // config.outputs) * -(-M // rows), num_sms // config.cluster
    working = min(tiles, at_a_time) * config.cluster
    products = PRODUCT * (1 if call.option("sparse") else DENSE) * rows * config.outputs / config.cluster
    from_l2 = working * (128 * rows / config.cluster + weights) / L2
    # Weights come from the memory once, for all rows.
    from_memory = working * weights / -(-M // rows) / MEMORY
    step = max(products + WEIGHT * weights, from_l2, from_memory)
    return -(-tiles // at_a_time) * (TILE_TIME + step * K * kind.itemsize / 128)
