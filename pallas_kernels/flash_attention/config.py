# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of each implementation: what they may be, a good guess, and where to search."""

import dataclasses
import math
from collections.abc import Iterator

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call


@dataclasses.dataclass(frozen=True)
class XlaConfig:
    """Tiles of the `xla` implementation.

    Attributes:
      block_q: query rows of a tile.
      block_k: key columns of a tile.
    """

    block_q: int
    block_k: int

    def __post_init__(self):
        for name in ("block_q", "block_k"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"XlaConfig.{name} must be an integer >= 1, got {value!r}.")


CONFIGS = {"xla": XlaConfig}


def heuristic(call: Call, device: Device, implementation: str) -> XlaConfig:
    """A good configuration without measuring anything."""
    del implementation  # only `xla` has a configuration so far
    s = call.sizes
    on_cpu = device.platform == "cpu"
    # Entries of a float32 tile of logits: on a CPU it should stay in the last-level cache; a GPU wants few, large
    # matmuls, and square tiles, which read the least for their size.
    budget = (2**21 if on_cpu else 2**26) // (s["B"] * s["N"])
    # On a CPU, dK and dV sum a tile's rows one after another: short tiles keep the rounding of that sum small.
    side = 128 if on_cpu else max(64, _power_of_two_below(math.isqrt(budget)))
    block_q = min(s["T"], side)
    block_k = side if block_q == side and not on_cpu else max(128, _power_of_two_below(budget // block_q))
    block_k = min(s["S"], block_k)
    return XlaConfig(block_q, block_k)


def search_space(call: Call, device: Device, implementation: str) -> Iterator[XlaConfig]:
    """Configurations worth measuring."""
    del device, implementation
    T, S = call.sizes["T"], call.sizes["S"]
    seen = set()
    for block_q in (64, 128, 256, 512, 1024):
        for block_k in (128, 256, 512, 1024, 4096):
            config = XlaConfig(min(block_q, T), min(block_k, S))
            if config not in seen:
                seen.add(config)
                yield config


def _power_of_two_below(n: int) -> int:
    return 1 << max(n.bit_length() - 1, 0)
