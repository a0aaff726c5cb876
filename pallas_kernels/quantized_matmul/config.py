# SPDX-License-Identifier: Apache-2.0
"""Tiles of the weight that a block works on at a time: what they may be, a good guess, and where to search. `xla` and
`reference` have none."""

import dataclasses
from collections.abc import Iterator

from pallas_kernels.core.activations import parts_of
from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call


@dataclasses.dataclass(frozen=True)
class MosaicGpuConfig:
    """The `mosaic_gpu` implementation.

    Attributes:
      tiles: output features of a block, in tiles of 64; of a swiglu, as many gates beside them.
      stages: steps of a chunk of 16 words that shared memory holds; with 1 nothing is on its way while one is decoded.
      shares: in how many pieces the warps of a block cut the inputs, for as many times fewer outputs: smaller blocks,
        and each copies more of x. With one tile only.
      num_splits: in how many pieces the inputs are cut before, each the work of another block of a cluster.
      scales_ahead: scales are copied a step before their words, and computed between the issue of the loads of the
        words and the wait for them.
    """

    tiles: int = 1
    stages: int = 3
    shares: int = 1
    num_splits: int = 1
    scales_ahead: bool = False

    def __post_init__(self):
        rules = {"tiles": (1, 2, 4), "stages": range(1, 9), "shares": (1, 2, 4), "num_splits": range(1, 9)}
        rules["scales_ahead"] = (False, True)
        for name, allowed in rules.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"MosaicGpuConfig.{name} must be one of {tuple(allowed)}, got {value!r}.")
        if self.shares > 1 and self.tiles > 1:
            raise ValueError(f"MosaicGpuConfig.tiles must be 1 with shares, got {self}.")


@dataclasses.dataclass(frozen=True)
class Sm90Config:
    """`mosaic_gpu` with wgmma, on Hopper (sm90.py).

    Attributes:
      warpgroups: of a block; they share rows of x.
      tiles: of 64 output features, of a warpgroup; of a swiglu, as many gates beside them.
      stages: chunks of 16 words that shared memory holds.
      num_splits: in how many pieces the inputs are cut, each the work of another block of a cluster.
    """

    warpgroups: int = 2
    tiles: int = 1
    stages: int = 2
    num_splits: int = 1

    def __post_init__(self):
        rules = {"warpgroups": (1, 2, 3, 4), "tiles": (1, 2, 3, 4), "stages": range(2, 9), "num_splits": range(1, 9)}
        for name, allowed in rules.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"Sm90Config.{name} must be one of {tuple(allowed)}, got {value!r}.")


TILE = 64  # outputs of four warps
CONFIGS: dict[str, tuple[type, ...]] = {"mosaic_gpu": (MosaicGpuConfig, Sm90Config)}


def kinds(implementation: str) -> tuple[type, ...]:
    """The configurations that an implementation takes."""
    return CONFIGS.get(implementation, ())


def heuristic(call: Call, device: Device, implementation: str) -> MosaicGpuConfig:
    """A good configuration without measuring anything (but once: docs/performance.md). About three blocks for each
    multiprocessor; for more rows larger ones, for each block reads all of x.
    """
    if implementation not in CONFIGS:
        raise ValueError(f"quantized_matmul has no configuration for {implementation!r}.")
    s, num_sms, hopper = call.sizes, device.num_cores or 132, device.arch == "sm90"
    outputs, stages = s["N"] // parts_of(call.option("activation")), 3 if call.option("bits") == "mixed_2_4" else 4
    blocks = -(-outputs // TILE)
    if s["M"] <= 4:
        shares = next((n for n in (4, 2) if n * blocks <= 5 * num_sms), 1)
        return MosaicGpuConfig(1, stages, shares)
    # Two blocks of a cluster, unless one for each strip of outputs comes out even.
    num_splits = 1 if not hopper or 2 * num_sms < blocks < 6 * num_sms else 2
    if s["M"] <= 8:
        return MosaicGpuConfig(1, stages, num_splits=num_splits)
    if parts_of(call.option("activation")) == 1 and blocks >= (2 * num_sms if s["M"] <= 32 else num_sms):
        return MosaicGpuConfig(2, 2)
    return MosaicGpuConfig(1, 2, num_splits=2 if hopper else 1)


def chunk_inputs(bits: int | str) -> int:
    """Inputs of 16 words."""
    return 16 * 32 // (2 if bits == "mixed_2_4" else int(bits))


def search_space(call: Call, device: Device, implementation: str) -> Iterator[MosaicGpuConfig]:
    """Configurations worth measuring."""
    if implementation not in CONFIGS:
        return
    for stages in (2, 3, 4):
        for num_splits in (1, 2, 3, 4) if device.arch == "sm90" else (1,):
            for tiles in (1, 2):
                yield MosaicGpuConfig(tiles, stages, num_splits=num_splits)
        for shares in (2, 4):
            yield MosaicGpuConfig(1, stages, shares)
