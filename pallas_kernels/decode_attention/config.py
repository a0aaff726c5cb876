# SPDX-License-Identifier: Apache-2.0
"""How much of the cache each implementation works on at a time: what it may be, a good guess, and where to search."""

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call
from pallas_kernels.core.tpu import LANES, VMEM_BYTES, padded_bytes, round_up, sublanes


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
      stages: how many chunks of keys, and of values, shared memory holds, in the cache's dtype.
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


@dataclasses.dataclass(frozen=True)
class MosaicTpuConfig:
    """Work of one grid step of the `mosaic_tpu` implementation.

    Attributes:
      block_k: keys of a chunk, of all key heads; a multiple of 32, the rows of a tile of int8. Caches that are shorter
        get a shorter chunk, and pages one that they divide or that divides them.
      num_splits: in how many pieces the keys of a sequence are cut, if the call does not say.
    """

    block_k: int
    num_splits: int = 1

    def __post_init__(self):
        if not isinstance(self.block_k, int) or self.block_k < 1 or self.block_k % 32:
            raise ValueError(f"MosaicTpuConfig.block_k must be a positive multiple of 32, got {self.block_k!r}.")
        if not isinstance(self.num_splits, int) or self.num_splits < 1:
            raise ValueError(f"MosaicTpuConfig.num_splits must be an integer >= 1, got {self.num_splits!r}.")

    def copies(self, S: int, page: int | None, K: int, dtype) -> tuple[int, int]:
        """Keys that one copy brings, and how many copies make a chunk; `dtype` is the cache's.

        >>> MosaicTpuConfig(512).copies(8192, 64, 8, "bfloat16")
        (64, 8)
        """
        if page is None:
            return min(self.block_k, S), 1
        if page >= self.block_k:
            return (page if page % self.block_k else self.block_k), 1
        # Pages are put together in registers, where they have to begin at a tile's first row.
        if page * K % sublanes(dtype):
            return page, 1
        return page, min(self.block_k // page, S // page, MAX_COPIES)

    def vmem_bytes(self, call: Call) -> int:
        """On-chip memory of a call: blocks twice (one computes, one is copied), scratch once."""
        s, cache, dtype = call.sizes, call.arguments[1].dtype, call.arguments[0].dtype
        keys, copies = self.copies(call.option("S"), s.get("page"), s["K"], cache)
        rows, columns = decode_rows(call), keys * copies * s["K"]
        widths = s["H"], s["Hv"]
        blocks = sum(copies * padded_bytes(keys * s["K"], width, cache) for width in widths)
        blocks += padded_bytes(rows, s["H"], dtype) + 4 * rows * (round_up(s["Hv"], LANES) + 5 * LANES)
        whole = max(padded_bytes(columns, width, dtype) for width in widths)  # put together, or dequantized
        return 2 * blocks + padded_bytes(rows, columns, "float32") + padded_bytes(rows, columns, dtype) + whole


# Of keys, and as many of values: each copy of a grid step costs the scalar unit some tens of cycles.
MAX_COPIES = 16


def decode_rows(call: Call) -> int:
    """Rows of queries, all heads and new tokens of a sequence, in whole tiles of bfloat16."""
    return round_up(call.sizes["T"] * call.sizes["N"], 16)


Config = XlaConfig | MosaicGpuConfig | MosaicTpuConfig
KINDS = (XlaConfig, MosaicGpuConfig, MosaicTpuConfig)


def kinds(call: Call, device: Device, implementation: str | None) -> tuple[type[Config], ...]:
    """The configurations that an implementation takes for a call; the first is the kind of its own choice."""
    by_name = {"xla": XlaConfig, "mosaic_gpu": MosaicGpuConfig, "mosaic_tpu": MosaicTpuConfig}
    return (by_name[implementation],) if implementation in by_name else ()


def heuristic(call: Call, device: Device, implementation: str) -> Config:
    """A good configuration without measuring anything."""
    if implementation == "mosaic_gpu":
        return _mosaic_gpu(call, device)
    if implementation == "mosaic_tpu":
        return mosaic_tpu_heuristic(call, device)
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
    if implementation == "mosaic_tpu":
        splits = mosaic_tpu_heuristic(call, device).num_splits
        yield from (MosaicTpuConfig(block_k, splits) for block_k in _mosaic_tpu_blocks(call))
        return
    for block_k in (64, 256, 1024, 4096, 16384):
        if block_k < 2 * call.option("S"):
            yield XlaConfig(block_k)


# Shared memory of a multiprocessor that its blocks share, in bytes.
_SMEM_BYTES = {"sm80": 160 * 2**10, "sm90": 220 * 2**10}


def _mosaic_gpu(call: Call, device: Device) -> MosaicGpuConfig:
    """One block a multiprocessor, with as many chunks in flight as it has room for, where sequences and key heads come
    out even; else two blocks share one, and the fewest splits that leave less than a tenth of the places empty. Caches
    of 8 bits always have two, since to widen a chunk takes more than half the time of its bytes: one does while one
    waits."""
    s, S, num_sms = call.sizes, call.option("S"), device.num_cores or 132
    itemsize = jnp.dtype(call.arguments[1].dtype).itemsize
    block_k, bytes_each = 64, itemsize * 64 * (s["H"] + s["Hv"])
    planes = s["B"] * s["K"]
    even = planes <= num_sms and num_sms % planes < num_sms // 10
    blocks = 1 if even and itemsize == 2 else 2
    most = max(1, -(-S // (2 * block_k)))  # each split has two chunks, at least
    if even:
        splits = blocks * num_sms // planes
    else:

        def filled(splits: int) -> float:
            return planes * splits / (blocks * num_sms) / -(-planes * splits // (blocks * num_sms))

        splits = next((n for n in range(1, most) if filled(n) > 0.9), max(range(1, most + 1), key=filled))
    # Queries, weights and sums take up to 14 KB, values in 16 bits what they take.
    others = 14 * 2**10 + (0 if itemsize == 2 else 2 * block_k * s["Hv"])
    room = _SMEM_BYTES.get(device.arch or "", 96 * 2**10) // blocks - others
    return MosaicGpuConfig(block_k, max(2, min(6, room // bytes_each)), max(1, min(most, splits)))


def mosaic_tpu_heuristic(call: Call, device: Device) -> MosaicTpuConfig:
    """The most bytes a grid step, up to 4 MiB of keys and values: a step's own cost, a third of a microsecond, hides
    under the time that they take. But an eighth of the cache at most, since the last chunk of a sequence is read whole.
    Splits where there would be no work for a chip's second core; none depends on anything but S, heads and dtypes."""
    s, cache = call.sizes, call.arguments[1].dtype
    most = max(128, call.option("S") // 8)
    row = sum(padded_bytes(s["K"] * 32, s[letter], cache) for letter in ("H", "Hv")) // 32
    fitting = [block_k for block_k in _mosaic_tpu_blocks(call) if block_k <= most and block_k * row <= 2**22]
    cores = device.num_cores or 1
    alone = s["B"] % cores and s["B"] < 4 * cores
    return MosaicTpuConfig(max(fitting, default=32), cores if alone else 1)


def _mosaic_tpu_blocks(call: Call) -> Iterator[int]:
    """Chunks that fit half of what kernels plan with."""
    for exponent in range(5, 14):
        if MosaicTpuConfig(2**exponent).vmem_bytes(call) <= VMEM_BYTES // 2:
            yield 2**exponent
