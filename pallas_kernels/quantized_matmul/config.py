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
      chunks: input features of one step, in chunks of 16 words.
      stages: how many steps shared memory holds; with 1 nothing is on its way while a step is decoded.
      num_splits: in how many pieces the inputs are cut, each the work of another block of a cluster.
      centered: of a `MixedBitWeight`, zeros are taken out of each weight, not multiplied with the rows: more arithmetic
        and half the products, for many rows.
    """

    tiles: int = 1
    chunks: int = 2
    stages: int = 4
    num_splits: int = 1
    centered: bool = False

    def __post_init__(self):
        rules = {
            "tiles": (1, 2, 4),
            "chunks": (1, 2, 4),
            "stages": (1, 2, 3, 4, 5, 6, 8),
            "num_splits": (1, 2, 4, 8),
            "centered": (False, True),
        }
        for name, allowed in rules.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"MosaicGpuConfig.{name} must be one of {allowed}, got {value!r}.")


CONFIGS: dict[str, type] = {"mosaic_gpu": MosaicGpuConfig}
SMEM_BYTES = 110 * 2**10  # of a block, so that a multiprocessor has two


def kinds(implementation: str) -> tuple[type, ...]:
    """The configurations that an implementation takes."""
    return (CONFIGS[implementation],) if implementation in CONFIGS else ()


def heuristic(call: Call, device: Device, implementation: str) -> MosaicGpuConfig:
    """A good configuration without measuring anything: blocks enough for two on each multiprocessor, in wide strips if
    there are many rows, which all blocks read."""
    if implementation not in CONFIGS:
        raise ValueError(f"quantized_matmul has no configuration for {implementation!r}.")
    s, parts, hopper = call.sizes, parts_of(call.option("activation")), device.arch == "sm90"
    rows, num_sms = s["M"] + -s["M"] % 8, device.num_cores or 132
    outputs = s["N"] // parts
    tiles = 2 if rows > 8 and parts == 1 and outputs >= 64 * num_sms else 1
    bits = call.option("bits")
    chunks = 2 if rows <= 16 or bits == 8 else 1
    # A step is within one group of scales, or of whole groups; Ampere's copies do not stop where inputs do.
    while chunks > 1 and not _whole_steps(call, chunks, hopper):
        chunks //= 2
    blocks = -(-outputs // (64 * tiles))
    num_splits = next((n for n in (1, 2, 4, 8) if n * blocks >= 2 * num_sms), 8) if hopper else 1
    config = MosaicGpuConfig(tiles, chunks, 1, num_splits, rows > 16)
    room = SMEM_BYTES - 2 * rows * 64 * tiles - (4 * parts * 64 * tiles * rows if num_splits > 1 else 0)
    return dataclasses.replace(config, stages=max(2, min(6, room // slot_bytes(call, config))))


def chunk_inputs(bits: int | str) -> int:
    """Inputs of 16 words."""
    return 16 * 32 // (2 if bits == "mixed_2_4" else int(bits))


def _whole_steps(call: Call, chunks: int, hopper: bool) -> bool:
    """Whether steps of so many chunks end where groups of scales do; and where the inputs do on Ampere, whose copies do
    not stop there."""
    inputs, group = chunk_inputs(call.option("bits")), call.option("group_size")
    if group is not None and group > inputs and group % (chunks * inputs):
        return False
    tail = call.option("tail_strips") or 0
    return hopper or not (call.sizes["K"] % (chunks * inputs) or tail % (16 * chunks))


def slot_bytes(call: Call, config: MosaicGpuConfig) -> int:
    """Shared memory of one step."""
    rows, bits = call.sizes["M"] + -call.sizes["M"] % 8, call.option("bits")
    words = 64 * config.tiles * parts_of(call.option("activation")) * 16 * config.chunks
    return words * (4 + 1) + words // 8 + 2 * rows * chunk_inputs(bits) * config.chunks


def search_space(call: Call, device: Device, implementation: str) -> Iterator[MosaicGpuConfig]:
    """Configurations worth measuring."""
    hopper = device.arch == "sm90"
    best = heuristic(call, device, implementation)
    rows = call.sizes["M"] + -call.sizes["M"] % 8
    for tiles in (1, 2):
        for chunks in (1, 2) if rows > 16 else (1, 2, 4):
            if not _whole_steps(call, chunks, hopper):
                continue
            for num_splits in (1, 2, 4, 8) if hopper else (1,):
                config = MosaicGpuConfig(tiles, chunks, 1, num_splits, best.centered)
                stages = max(2, min(6, SMEM_BYTES // slot_bytes(call, config)))
                yield dataclasses.replace(config, stages=stages)
