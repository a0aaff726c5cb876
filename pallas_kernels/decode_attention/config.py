# SPDX-License-Identifier: Apache-2.0
"""How much of the cache each implementation works on at a time: what it may be, a good guess, and where to search."""

import dataclasses
from collections.abc import Iterator

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call


@dataclasses.dataclass(frozen=True)
class XlaConfig:
    """Chunks of the `xla` implementation.

    Attributes:
      block_k: keys of a chunk; in a paged cache as many whole pages as that is, but at least one.
    """

    block_k: int

    def __post_init__(self):
        if not isinstance(self.block_k, int) or self.block_k < 1:
            raise ValueError(f"XlaConfig.block_k must be an integer >= 1, got {self.block_k!r}.")


Config = XlaConfig
KINDS = (XlaConfig,)


def kinds(call: Call, device: Device, implementation: str | None) -> tuple[type[Config], ...]:
    """The configurations that an implementation takes for a call; the first is the kind of its own choice."""
    return (XlaConfig,) if implementation == "xla" else ()


def heuristic(call: Call, device: Device, implementation: str) -> Config:
    """A good configuration without measuring anything."""
    s = call.sizes
    # Entries of a float32 chunk of logits: on a CPU they should stay in the cache; a GPU wants few steps.
    budget = 2**18 if device.platform == "cpu" else 2**24
    return XlaConfig(max(64, min(call.option("S"), budget // (s["B"] * s["T"] * s["N"]))))


def search_space(call: Call, device: Device, implementation: str) -> Iterator[Config]:
    """Configurations worth measuring."""
    for block_k in (64, 256, 1024, 4096, 16384):
        if block_k < 2 * call.option("S"):
            yield XlaConfig(block_k)
