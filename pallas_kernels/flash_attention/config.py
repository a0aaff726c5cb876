# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of each implementation: what they may be, a good guess, and where to search."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call
from pallas_kernels.core.tpu import VMEM_BYTES, round_up


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


@dataclasses.dataclass(frozen=True)
class MosaicTpuConfig:
    """Tiles of the `mosaic_tpu` implementation, on the two levels of FastAttention (Lin et al., 2024, section 4.1).

    A first-level block is block_q x block_k_major logits: what one grid step copies in, and one update of the online
    softmax. Inside it the matrix unit works through sub-blocks of block_k columns, the vector unit through slices of
    block_rows rows. block_k == block_k_major is tiling on one level. The kernels narrow blocks to arrays that are
    shorter, so that a configuration fits any length.

    Attributes:
      block_q: query rows of a first-level block, a multiple of 128.
      block_k_major: key columns of a first-level block, a multiple of block_k.
      block_k: key columns of one matrix product, a multiple of 128 (the lanes of a register).
      block_rows: rows that the vector unit takes at a time, a multiple of 32 that divides block_q.
      mask: how mixed tiles of a plain causal mask hide logits: "window" looks the tile up in one constant M-mask
        whose sides are twice the larger block edge (FastAttention, section 4.2), "iota" compares row and column
        numbers, which costs no memory and less code. Every other mask compares, whatever this says.
    """

    block_q: int
    block_k_major: int
    block_k: int
    block_rows: int
    mask: Literal["window", "iota"] = "iota"

    def __post_init__(self):
        def ask(name: str, holds: bool, rule: str) -> None:
            if not holds:
                raise ValueError(f"MosaicTpuConfig.{name} must be {rule}, got {getattr(self, name)!r}.")

        def multiple(n: object, of: int) -> bool:
            return isinstance(n, int) and n > 0 and n % of == 0

        ask("block_q", multiple(self.block_q, 128), "a positive multiple of 128")
        ask("block_k", multiple(self.block_k, 128), "a positive multiple of 128")
        ask("block_k_major", multiple(self.block_k_major, self.block_k), f"a multiple of block_k={self.block_k}")
        rows = multiple(self.block_rows, 32) and self.block_q % self.block_rows == 0
        ask("block_rows", rows, f"a multiple of 32 that divides block_q={self.block_q}")
        ask("mask", self.mask in ("window", "iota"), '"window" or "iota"')

    def vmem_bytes(self, call: Call) -> int:
        """On-chip memory of the call's largest kernel: blocks twice (one computes, one is copied), scratch once."""
        q, width, bytes_each = self.block_q, self.block_k_major, _ITEM_BYTES.get(call.arguments[0].dtype, 4)
        H, Hv = (round_up(call.sizes[letter], 128) for letter in ("H", "Hv"))
        blocks, scratch = (q + width) * (H + Hv) * bytes_each, q * width * (4 + bytes_each) + q * (256 + Hv) * 4
        if call.direction == "backward":  # the pass over keys: gradients beside keys and values, S and dP, P and dS
            blocks += width * (H + Hv) * bytes_each
            scratch = 2 * q * width * (4 + bytes_each) + width * (H + Hv) * 4 + 256 * q * 4
        whole_tiles = (call.argument("bias") is not None) + ("Dense" in str(call.option("mask")))
        window = (2 * max(q, width)) ** 2 if self.mask == "window" and call.option("mask") == "Causal" else 0
        return 2 * (blocks + whole_tiles * q * width * 4) + scratch + window


@dataclasses.dataclass(frozen=True)
class Sm90Config:
    """Tiles of the `mosaic_gpu` implementation for Hopper.

    Attributes:
      consumers: warpgroups that compute, of 64 query rows each.
      block_k: key columns of a tile.
      stages: how many tiles of keys, and of values, shared memory holds.
      lazy_rescale: raise a row's maximum, and rescale what was summed up, only when the maximum has grown by 2^8. Not
        of an asynchronous softmax, which has none.
      q_stages: how many tiles of queries it holds. Outputs leave from there if head dims are equal: with one, the next
        queries are not loaded before these outputs have left.
      backward_stages: how many tiles of queries, and of output gradients, shared memory holds in the backward pass;
        its other sizes follow from the head dimension.
    """

    consumers: int = 2
    block_k: int = 128
    stages: int = 2
    lazy_rescale: bool = False
    q_stages: int = 2
    backward_stages: int = 2

    def __post_init__(self):
        stages = (1, 2, 3, 4)
        rules = {"consumers": (2, 3), "block_k": (64, 128, 160, 192, 256), "q_stages": (1, 2)}
        rules |= {"stages": stages, "backward_stages": stages}
        for name, allowed in rules.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Sm90Config.{name} must be one of {allowed}, got {getattr(self, name)!r}.")

    def smem_bytes(self, H: int, Hv: int) -> int:
        """Shared memory of the forward pass: queries, keys and values, outputs."""
        rows = 64 * self.consumers
        out = 0 if Hv == H else rows * Hv
        return 2 * (self.q_stages * rows * H + self.stages * self.block_k * (H + Hv) + out)

    def check_smem(self, H: int, Hv: int) -> None:
        """Raises ValueError if the forward pass does not fit a multiprocessor's shared memory."""
        if (needed := self.smem_bytes(H, Hv)) > SMEM_BYTES:
            raise ValueError(
                f"{self} needs {needed // 1024} KiB of shared memory for head dims of {H} and {Hv}, and there are "
                f"{SMEM_BYTES // 1024}: make block_k, stages or q_stages smaller, or leave config out."
            )


@dataclasses.dataclass(frozen=True)
class Sm80Config:
    """Tiles of the `mosaic_gpu` implementation for Ampere and Ada (it runs on Hopper too, if given this).

    Attributes:
      block_q: query rows of a block of the forward pass: 16 or 32 for each of 4 warps, so 64 or 128.
      block_k: key columns of a tile.
      stages: how many tiles of keys, and of values, shared memory holds.
      dkv_block_q, dkv_block_k, dkv_stages: the pass for dK and dV; a block has dkv_block_k keys, and holds dkv_stages
        tiles of dkv_block_q rows of queries.
      dq_block_q, dq_block_k, dq_stages: the pass for dQ; as in the forward pass.
    """

    block_q: int = 128
    block_k: int = 64
    stages: int = 2
    dkv_block_q: int = 64
    dkv_block_k: int = 64
    dkv_stages: int = 2
    dq_block_q: int = 64
    dq_block_k: int = 64
    dq_stages: int = 2

    def __post_init__(self):
        rows, cols, stages = (64, 128), (32, 64, 128), (1, 2, 3, 4)
        rules = {"block_q": rows, "block_k": cols, "stages": stages}
        rules |= {"dkv_block_q": cols, "dkv_block_k": rows, "dkv_stages": stages}
        rules |= {"dq_block_q": rows, "dq_block_k": cols, "dq_stages": stages}
        for name, allowed in rules.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Sm80Config.{name} must be one of {allowed}, got {getattr(self, name)!r}.")


Config = XlaConfig | MosaicTpuConfig | Sm90Config | Sm80Config
KINDS = (XlaConfig, MosaicTpuConfig, Sm90Config, Sm80Config)


def kinds(call: Call, device: Device, implementation: str | None) -> tuple[type[Config], ...]:
    """The configurations that an implementation takes for a call; the first is the kind of its own choice."""
    match implementation:
        case "xla":
            return (XlaConfig,)
        case "mosaic_tpu":
            return (MosaicTpuConfig,)
        case "mosaic_gpu" if call.direction == "forward" and call.option("unified_max") is not None:
            return (Sm90Config,)
        case "mosaic_gpu" if device.arch == "sm90" and (
            call.direction == "forward" or max(call.sizes["H"], call.sizes["Hv"]) <= 128
        ):
            return (Sm90Config, Sm80Config)
        case "mosaic_gpu":
            return (Sm80Config,)
    return ()


def heuristic(call: Call, device: Device, implementation: str) -> Config:
    """A good configuration without measuring anything."""
    if implementation == "mosaic_tpu":
        return mosaic_tpu_heuristic(call)
    if implementation == "mosaic_gpu":
        (kind, *_) = kinds(call, device, implementation)
        return _sm90(call) if kind is Sm90Config else sm80_heuristic(call, device)
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


def for_arch(call: Call, device: Device, implementation: str, arch: str) -> Config:
    """The heuristic's configuration of the kernels for another architecture, for the device that is here.

    Raises:
      ValueError: the implementation has no kernels of its own for `arch`.
    """
    match implementation, arch:
        case "mosaic_gpu", "sm90":
            return _sm90(call)
        case "mosaic_gpu", "sm80":
            return sm80_heuristic(call, device)
    raise ValueError(f'{implementation!r} has no kernels for {arch!r} alone; "mosaic_gpu" has, for "sm90" and "sm80".')


def search_space(call: Call, device: Device, implementation: str) -> Iterator[Config]:
    """Configurations worth measuring."""
    if implementation == "mosaic_gpu":
        yield from _mosaic_gpu_space(call, device)
        return
    if implementation == "mosaic_tpu":
        yield from _mosaic_tpu_space(call)
        return
    T, S = call.sizes["T"], call.sizes["S"]
    seen = set()
    for block_q in (64, 128, 256, 512, 1024):
        for block_k in (128, 256, 512, 1024, 4096):
            config = XlaConfig(min(block_q, T), min(block_k, S))
            if config not in seen:
                seen.add(config)
                yield config


# Shared memory of a block on Hopper, less what barriers and Mosaic take.
SMEM_BYTES = 225 * 2**10


def _sm90(call: Call) -> Sm90Config:
    """Three consumers where accumulators are small; the widest tiles and the most stages that fit."""
    H, Hv = (width + -width % 16 for width in (call.sizes["H"], call.sizes["Hv"]))
    plain = call.option("mask") in (None, "Causal") and call.argument("bias") is None
    if max(H, Hv) <= 64 and plain:
        # Softmax is the bottleneck: a third consumer helps, except where rows of 192 queries waste most of a diagonal.
        short = call.option("mask") == "Causal" and call.sizes["S"] <= 2048
        lazy = call.option("mask") is None and call.option("unified_max") is None
        return Sm90Config(2 if short else 3, stages=3, lazy_rescale=lazy)
    return next(config for config in _sm90_space() if _fits_sm90(config, H, Hv))


def _sm90_space() -> Iterator[Sm90Config]:
    for block_k in (128, 64):
        for q_stages in (2, 1):
            yield Sm90Config(consumers=2, block_k=block_k, stages=2, q_stages=q_stages)
    yield Sm90Config(consumers=2, block_k=64, stages=1, q_stages=1)


def _fits_sm90(config: Sm90Config, H: int, Hv: int, most: int = 180) -> bool:
    """Whether shared memory holds the tiles, and `most` registers logits, output and probabilities of a thread."""
    registers = config.block_k // 2 + Hv // 2 + config.block_k // 4
    return config.smem_bytes(H, Hv) <= SMEM_BYTES and registers <= most


def sm80_heuristic(call: Call, device: Device) -> Sm80Config:
    """Two blocks a multiprocessor where shared memory allows, and accumulators that a warpgroup's registers hold."""
    width = max(call.sizes["H"], call.sizes["Hv"])
    tight = device.arch in ("sm86", "sm87", "sm89")  # 100 KB of shared memory; Ampere's A100 has 164, Hopper 228
    backward = Sm80Config(
        dkv_block_q=32,
        dkv_stages=2 if width <= 64 else 1,
        dq_block_k=32,
        dq_stages=1 if width > 128 and tight else 2,
    )
    if width <= 64:
        return backward
    if width <= 128 and device.arch == "sm90":
        # Measured: on Hopper these are 10 and 20 % faster than the ones below, though a few registers are spilled.
        return Sm80Config(block_q=128, block_k=64, dkv_block_q=64, dkv_stages=1, dq_block_q=128, dq_block_k=32)
    if width <= 128:
        return dataclasses.replace(backward, block_q=64 if tight else 128, block_k=32)
    return dataclasses.replace(backward, block_q=64, block_k=32, stages=1 if tight else 2)


def _mosaic_gpu_space(call: Call, device: Device) -> Iterator[Sm90Config | Sm80Config]:
    (kind, *_) = kinds(call, device, "mosaic_gpu")
    H, Hv = (width + -width % 16 for width in (call.sizes["H"], call.sizes["Hv"]))
    if kind is Sm80Config:
        for block_q in (64, 128):
            for block_k in (32, 64, 128):
                for stages in (2, 3):
                    yield Sm80Config(block_q=block_q, block_k=block_k, stages=stages)
        return
    for consumers in (2, 3) if max(H, Hv) <= 64 else (2,):
        for block_k in (64, 128, 160):
            for stages in (2, 3):
                for lazy in (False, True) if call.option("unified_max") is None else (False,):
                    config = Sm90Config(consumers, block_k, stages, lazy)
                    if _fits_sm90(config, H, Hv, most=184):  # compiles without spills where nothing is masked
                        yield config


_ITEM_BYTES = {"bfloat16": 2, "float32": 4}


def mosaic_tpu_block(
    block_q: int, block_k_major: int, block_k: int = 128, mask: Literal["window", "iota"] = "iota"
) -> MosaicTpuConfig:
    """A first-level block whose slices for the vector unit are 32 registers of logits, half of what there is."""
    rows = max(32, min(block_q, _power_of_two_below(2**15 // block_k_major)))
    return MosaicTpuConfig(block_q, block_k_major, block_k, rows, mask)


def mosaic_tpu_heuristic(call: Call) -> MosaicTpuConfig:
    """The widest first-level block that fits: each doubling halves the softmax updates of a row of tiles."""
    fitting = [config for config in _mosaic_tpu_space(call) if config.mask == "iota"]
    best = max(fitting, key=lambda c: (c.block_k_major, -abs(c.block_q - 256)), default=None)
    return best or mosaic_tpu_block(128, 128)


def _mosaic_tpu_space(call: Call) -> Iterator[MosaicTpuConfig]:
    for block_q in (128, 256, 512):
        for block_k_major in (128, 256, 512, 1024):
            for mask in ("iota", "window") if call.option("mask") == "Causal" else ("iota",):
                config = mosaic_tpu_block(block_q, block_k_major, mask=mask)
                if config.vmem_bytes(call) <= VMEM_BYTES // 2:
                    yield config


def _power_of_two_below(n: int) -> int:
    return 1 << max(n.bit_length() - 1, 0)
