# SPDX-License-Identifier: Apache-2.0
"""Tiles of the weight that a block works on at a time: what they may be, a good guess, and where to search. `xla` and
`reference` have none."""

import dataclasses
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
CONFIGS: dict[str, type] = {"mosaic_gpu": MosaicGpuConfig, "mosaic_tpu": MosaicTpuConfig}


def kinds(implementation: str) -> tuple[type, ...]:
    """The configurations that an implementation takes."""
    return (CONFIGS[implementation],) if implementation in CONFIGS else ()


def heuristic(call: Call, device: Device, implementation: str) -> MosaicGpuConfig | MosaicTpuConfig:
    """A good configuration without measuring anything (but once: docs/performance.md). About three blocks for each
    multiprocessor; for more rows larger ones, for each block reads all of x.
    """
    if implementation not in CONFIGS:
        raise ValueError(f"quantized_matmul has no configuration for {implementation!r}.")
    if implementation == "mosaic_tpu":
        return mosaic_tpu_heuristic(call)
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


def mosaic_tpu_heuristic(call: Call) -> MosaicTpuConfig:
    """The most outputs that fit what kernels plan with, but not more than an eighth of them: the first block is waited
    for, and a step's own cost, a third of a microsecond, is little beside what it takes to decode a few tiles."""
    sizes = [MosaicTpuConfig(tiles) for tiles in (8, 4, 2) if 8 * tiles * TPU_TILE <= call.sizes["N"]]
    fitting = (config for config in sizes if config.vmem_bytes(call) <= 3 * VMEM_BYTES // 4)
    return next(fitting, MosaicTpuConfig())


def chunk_inputs(bits: int | str) -> int:
    """Inputs of 16 words."""
    return 16 * 32 // (2 if bits == "mixed_2_4" else int(bits))


def search_space(call: Call, device: Device, implementation: str) -> Iterator[MosaicGpuConfig | MosaicTpuConfig]:
    """Configurations worth measuring."""
    if implementation not in CONFIGS:
        return
    if implementation == "mosaic_tpu":
        sizes = (MosaicTpuConfig(tiles) for tiles in (1, 2, 4, 8))
        yield from (config for config in sizes if config.vmem_bytes(call) <= 3 * VMEM_BYTES // 4)
        return
    for stages in (2, 3, 4):
        for num_splits in (1, 2, 3, 4) if device.arch == "sm90" else (1,):
            for tiles in (1, 2):
                yield MosaicGpuConfig(tiles, stages, num_splits=num_splits)
        for shares in (2, 4):
            yield MosaicGpuConfig(1, stages, shares)
