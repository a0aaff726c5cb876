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
    """

    tiles: int = 1
    stages: int = 3
    shares: int = 1
    num_splits: int = 1

    def __post_init__(self):
        rules = {"tiles": (1, 2, 4), "stages": range(1, 9), "shares": (1, 2, 4), "num_splits": range(1, 9)}
        for name, allowed in rules.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"MosaicGpuConfig.{name} must be one of {tuple(allowed)}, got {value!r}.")
        if self.shares > 1 and self.tiles > 1:
            raise ValueError(f"MosaicGpuConfig.tiles must be 1 with shares, got {self}.")


CONFIGS: dict[str, type] = {"mosaic_gpu": MosaicGpuConfig}


def kinds(implementation: str) -> tuple[type, ...]:
    """The configurations that an implementation takes."""
    return (CONFIGS[implementation],) if implementation in CONFIGS else ()


def heuristic(call: Call, device: Device, implementation: str) -> MosaicGpuConfig:
    """A good configuration without measuring anything: blocks enough for four on each multiprocessor."""
    if implementation not in CONFIGS:
        raise ValueError(f"quantized_matmul has no configuration for {implementation!r}.")
    s, parts = call.sizes, parts_of(call.option("activation"))
    rows, num_sms = s["M"] + -s["M"] % 8, device.num_cores or 132
    outputs = s["N"] // parts
    tiles = 2 if rows > 16 and parts == 1 and outputs >= 128 * num_sms else 1
    blocks = -(-outputs // (64 * tiles))
    num_splits = max(1, min(8, 4 * num_sms // blocks)) if device.arch == "sm90" else 1
    return MosaicGpuConfig(tiles, 3, num_splits=num_splits)


def chunk_inputs(bits: int | str) -> int:
    """Inputs of 16 words."""
    return 16 * 32 // (2 if bits == "mixed_2_4" else int(bits))


def search_space(call: Call, device: Device, implementation: str) -> Iterator[MosaicGpuConfig]:
    """Configurations worth measuring."""
    best = heuristic(call, device, implementation)
    near = {1, best.num_splits - 1, best.num_splits, best.num_splits + 1} if device.arch == "sm90" else {1}
    for tiles in (1, 2):
        for stages in (2, 3, 4):
            for num_splits in sorted(near & set(range(1, 9))):
                yield MosaicGpuConfig(tiles, stages, num_splits=num_splits)
