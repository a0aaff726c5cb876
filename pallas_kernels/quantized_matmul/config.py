# SPDX-License-Identifier: Apache-2.0
"""Tiles of the weight that a block works on at a time: what they may be, a good guess, and where to search. `xla` and
`reference` have none."""

import dataclasses
import math
from collections.abc import Iterator

from pallas_kernels.core.activations import parts_of
from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call
from pallas_kernels.core.tpu import VMEM_BYTES, padded_bytes


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


@dataclasses.dataclass(frozen=True)
class MosaicTpuConfig:
    """The `mosaic_tpu` implementation.

    Attributes:
      tiles: outputs of a block, which is copied while another is multiplied, in tiles of 256.
    """

    tiles: int = 1

    def __post_init__(self):
        if self.tiles not in (1, 2, 4, 8):
            raise ValueError(f"MosaicTpuConfig.tiles must be one of (1, 2, 4, 8), got {self.tiles!r}.")

    def vmem_bytes(self, call: Call) -> int:
        """On-chip memory of a call: words with their scales and sums twice (one computes, one is copied), all rows
        once, and what a tile is decoded to."""
        s, bits, dtype = call.sizes, call.option("bits"), call.arguments[0].dtype
        inputs = s["K"] + -s["K"] % chunk_inputs(bits)
        tails = 16 * (call.option("tail_strips") or 0)
        words = TPU_TILE * (inputs + tails) * (3 / 8 if bits == "mixed_2_4" else bits / 8 + 1 / 32)
        sums = padded_bytes(s["M"], TPU_TILE, "float32")
        rows = padded_bytes(s["M"], inputs + tails, dtype)
        return int(2 * self.tiles * (words + sums)) + rows + 2**21


TILE = 64  # outputs of four warps
TPU_TILE = 256  # outputs that are decoded at a time
Config = MosaicGpuConfig | Sm90Config | MosaicTpuConfig


def kinds(call: Call, device: Device, implementation: str | None) -> tuple[type[Config], ...]:
    """The configurations that an implementation takes for a call; the first is the kind of its own choice."""
    if implementation == "mosaic_tpu":
        return (MosaicTpuConfig,)
    if implementation != "mosaic_gpu":
        return ()
    if device.arch != "sm90":
        return (MosaicGpuConfig,)
    return (Sm90Config, MosaicGpuConfig) if call.sizes["M"] > 8 else (MosaicGpuConfig, Sm90Config)


def heuristic(call: Call, device: Device, implementation: str) -> Config:
    """A good configuration without measuring anything (but once: docs/performance.md). For a few rows about three
    blocks for each multiprocessor; for more larger ones, for each block reads all of x.
    """
    if not (takes := kinds(call, device, implementation)):
        raise ValueError(f"quantized_matmul has no configuration for {implementation!r}.")
    if implementation == "mosaic_tpu":
        return mosaic_tpu_heuristic(call)
    s, num_sms, hopper = call.sizes, device.num_cores or 132, device.arch == "sm90"
    outputs, stages = s["N"] // parts_of(call.option("activation")), 3 if call.option("bits") == "mixed_2_4" else 4
    blocks = -(-outputs // TILE)
    if s["M"] <= 4:
        shares = next((n for n in (4, 2) if n * blocks <= 5 * num_sms), 1)
        return MosaicGpuConfig(1, stages, shares)
    if takes[0] is Sm90Config:
        return _sm90(call, blocks, num_sms)
    # Two blocks of a cluster, unless one for each strip of outputs comes out even.
    num_splits = 1 if not hopper or 2 * num_sms < blocks < 6 * num_sms else 2
    if s["M"] <= 8:
        return MosaicGpuConfig(1, stages, num_splits=num_splits)
    if parts_of(call.option("activation")) == 1 and blocks >= (2 * num_sms if s["M"] <= 32 else num_sms):
        return MosaicGpuConfig(2, 2)
    return MosaicGpuConfig(1, 2)


# Clusters of so many blocks that 132 multiprocessors hold at once: they come in groups, of 16 and 18.
_CLUSTERS = {1: 132, 2: 66, 3: 32, 5: 22}


def _sm90(call: Call, tiles: int, num_sms: int) -> Sm90Config:
    """The least of a model: microseconds of a chunk for so many warpgroups, of all chunks of all rounds of blocks, and
    of a cluster's sum."""
    s, parts, inputs = call.sizes, parts_of(call.option("activation")), chunk_inputs(call.option("bits"))
    rows, tail = s["M"] + -s["M"] % 8, (call.option("tail_strips") or 0) * 16
    chunks = -(-s["K"] // inputs) + -(-tail // inputs)

    def cost(config: Sm90Config) -> float:
        groups, splits = config.warpgroups, config.num_splits
        rounds = math.ceil(math.ceil(tiles / groups) * 132 / (_CLUSTERS[splits] * num_sms))
        chunk = (0.45 + parts * groups * (0.13 + 0.0025 * rows)) * inputs / 256
        return rounds * -(-chunks // splits) * chunk + (1.2 * splits if splits > 1 else 0)

    def stages(groups: int) -> int:
        # What is left of 224 KiB, of x and of words and scales; those of int4 are less.
        left = 224 * 1024 - groups * 128 * rows
        return max(2, min(6, left // (2 * rows * inputs + 5376 * parts * groups)))

    groups = range(1, 5) if parts == 1 else (1, 2)
    choices = [Sm90Config(g, 1, stages(g), n) for g in groups for n in _CLUSTERS if n <= chunks]
    return min(choices, key=cost)


def mosaic_tpu_heuristic(call: Call) -> MosaicTpuConfig:
    """The most outputs that fit what kernels plan with, but not more than an eighth of them: the first block is waited
    for, and a step's own cost, a third of a microsecond, is little beside what it takes to decode a few tiles."""
    few = (config for config in _mosaic_tpu_space(call) if 8 * config.tiles * TPU_TILE <= call.sizes["N"])
    return max(few, key=lambda config: config.tiles, default=MosaicTpuConfig())


def _mosaic_tpu_space(call: Call) -> Iterator[MosaicTpuConfig]:
    """Blocks that fit what kernels plan with."""
    for tiles in (1, 2, 4, 8):
        config = MosaicTpuConfig(tiles)
        if config.vmem_bytes(call) <= 3 * VMEM_BYTES // 4:
            yield config


def chunk_inputs(bits: int | str) -> int:
    """Inputs of 16 words."""
    return 16 * 32 // (2 if bits == "mixed_2_4" else int(bits))


def search_space(call: Call, device: Device, implementation: str) -> Iterator[Config]:
    """Configurations worth measuring."""
    if not (takes := kinds(call, device, implementation)):
        return
    if implementation == "mosaic_tpu":
        yield from _mosaic_tpu_space(call)
        return
    if takes[0] is Sm90Config:
        for warpgroups in (1, 2, 3, 4):
            for num_splits in (1, 2, 3, 5):
                for stages in (3, 4):
                    yield Sm90Config(warpgroups, 1, stages, num_splits)
        return
    for stages in (2, 3, 4):
        for num_splits in (1, 2, 3, 4) if device.arch == "sm90" else (1,):
            for tiles in (1, 2):
                yield MosaicGpuConfig(tiles, stages, num_splits=num_splits)
        for shares in (2, 4):
            yield MosaicGpuConfig(1, stages, shares)
