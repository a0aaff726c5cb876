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


@dataclasses.dataclass(frozen=True)
class MosaicGpuConfig:
    """Work of one block of the `mosaic_gpu` implementation.

    Attributes:
      block_k: keys of a chunk.
      stages: how many chunks of keys, and of values, shared memory holds.
      num_splits: in how many pieces the keys of a sequence are cut, if the call does not say.
      cluster: so many splits, or fewer, are one cluster on Hopper and need no second kernel to add them up.
    """

    block_k: int = 64
    stages: int = 3
    num_splits: int = 1
    cluster: int = 2

    def __post_init__(self):
        rules = {"block_k": (64, 128, 256), "stages": (2, 3, 4, 5, 6)}
        for name, allowed in rules.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"MosaicGpuConfig.{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        for name in ("num_splits", "cluster"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"MosaicGpuConfig.{name} must be an integer >= 1, got {value!r}.")
        if self.cluster > 8:
            raise ValueError(f"MosaicGpuConfig.cluster must be 8 or less, as Hopper's are, got {self.cluster}.")


Config = XlaConfig | MosaicGpuConfig
KINDS = (XlaConfig, MosaicGpuConfig)


def kinds(call: Call, device: Device, implementation: str | None) -> tuple[type[Config], ...]:
    """The configurations that an implementation takes for a call; the first is the kind of its own choice."""
    return {"xla": (XlaConfig,), "mosaic_gpu": (MosaicGpuConfig,)}.get(implementation or "", ())


def heuristic(call: Call, device: Device, implementation: str) -> Config:
    """A good configuration without measuring anything."""
    if implementation == "mosaic_gpu":
        return _mosaic_gpu(call, device)
    s = call.sizes
    # Entries of a float32 chunk of logits: on a CPU they should stay in the cache; a GPU wants few steps.
    budget = 2**18 if device.platform == "cpu" else 2**24
    return XlaConfig(max(64, min(call.option("S"), budget // (s["B"] * s["T"] * s["N"]))))


def search_space(call: Call, device: Device, implementation: str) -> Iterator[Config]:
    """Configurations worth measuring."""
    if implementation == "mosaic_gpu":
        best = _mosaic_gpu(call, device)
        for factor in (1, 2, 4):
            for block_k in (64, 128):
                stages = max(2, best.stages * best.block_k // block_k)  # as many bytes in flight
                yield MosaicGpuConfig(block_k, stages, max(1, best.num_splits // 2 * factor))
        return
    for block_k in (64, 256, 1024, 4096, 16384):
        if block_k < 2 * call.option("S"):
            yield XlaConfig(block_k)


# Shared memory of a multiprocessor that its blocks share, in bytes.
_SMEM_BYTES = {"sm80": 160 * 2**10, "sm90": 220 * 2**10}


def _mosaic_gpu(call: Call, device: Device) -> MosaicGpuConfig:
    """One block a multiprocessor, with as many chunks in flight as it has room for, where sequences and key heads come
    out even; else two blocks share one, and the fewest splits that leave less than a tenth of the places empty."""
    s, S, num_sms = call.sizes, call.option("S"), device.num_cores or 132
    block_k, bytes_each = 64, 2 * 64 * (s["H"] + s["Hv"])
    planes = s["B"] * s["K"]
    alone = planes <= num_sms and num_sms % planes < num_sms // 10
    most = max(1, -(-S // (2 * block_k)))  # each split has two chunks, at least
    if alone:
        splits = num_sms // planes
    else:

        def filled(splits: int) -> float:
            return planes * splits / (2 * num_sms) / -(-planes * splits // (2 * num_sms))

        splits = next((n for n in range(1, most) if filled(n) > 0.9), max(range(1, most + 1), key=filled))
    # Queries, weights and sums take up to 14 KB.
    room = _SMEM_BYTES.get(device.arch or "", 96 * 2**10) // (1 if alone else 2) - 14 * 2**10
    return MosaicGpuConfig(block_k, max(2, min(6, room // bytes_each)), max(1, min(most, splits)))
