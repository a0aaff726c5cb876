# SPDX-License-Identifier: Apache-2.0
"""Tiles of the weight that a block works on at a time: what they may be, a good guess, and where to search."""

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp

from pallas_kernels.core.activations import parts_of
from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call
from pallas_kernels.core.tpu import LANES, VMEM_BYTES, padded_bytes
from pallas_kernels.flat_gemm import routes


@dataclasses.dataclass(frozen=True)
class VectorConfig:
    """Route A of the `mosaic_gpu` implementation: multiply and add, without tensor cores.

    Attributes:
      block_n: output features of a block.
      block_k: input features of one step.
      stages: how many tiles of the weight shared memory holds.
    """

    block_n: int = 64
    block_k: int = 256
    stages: int = 4

    def __post_init__(self):
        rules = {"block_n": (16, 32, 64, 128), "block_k": (64, 128, 256), "stages": (2, 3, 4, 5, 6, 8)}
        _check(self, rules)


@dataclasses.dataclass(frozen=True)
class MatrixConfig:
    """Route B of the `mosaic_gpu` implementation: the weight is the wide operand of the tensor cores, and rows are
    padded to a multiple of 8.

    Attributes:
      block_n: output features of a block.
      block_k: input features of one step.
      stages: how many tiles of the weight shared memory holds; 2 is the paper's double buffering.
      num_splits: in how many pieces K is cut, each the work of another block of a cluster; the paper has 1.
    """

    block_n: int = 64
    block_k: int = 128
    stages: int = 4
    num_splits: int = 1

    def __post_init__(self):
        _check(self, {"block_n": (64, 128, 256, 512), "block_k": (64, 128, 256), "stages": (1, 2, 3, 4, 5, 6, 8)})
        if not isinstance(self.num_splits, int) or self.num_splits < 1:
            raise ValueError(f"MatrixConfig.num_splits must be an integer >= 1, got {self.num_splits!r}.")


@dataclasses.dataclass(frozen=True)
class MosaicTpuConfig:
    """A block of the weight, which one grid step of the `mosaic_tpu` implementation multiplies by all rows.

    Attributes:
      block_n: output features of a block; a smaller weight is narrower.
      block_k: input features of one step.
    Both are multiples of 128, the lanes of a register. Blocks become the widest ones up to these that divide K and, for
    swiglu, N / 2; a K that is no multiple of 128 is one step.
    """

    block_n: int
    block_k: int

    def __post_init__(self):
        for name in ("block_n", "block_k"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1 or value % LANES:
                raise ValueError(f"MosaicTpuConfig.{name} must be a positive multiple of {LANES}, got {value!r}.")

    def block(self, N: int, K: int, activation: str | None) -> tuple[int, int]:
        """Output and input features of the blocks of a weight.

        >>> MosaicTpuConfig(512, 1024).block(22016, 4096, "swiglu")
        (256, 1024)
        """
        block_n = _divisor(N // 2, self.block_n) if activation == "swiglu" else min(self.block_n, N)
        return block_n, _divisor(K, self.block_k)

    def vmem_bytes(self, call: Call) -> int:
        """On-chip memory of a call: blocks twice (one computes, one is copied), all rows and the sums once."""
        s, dtype, activation = call.sizes, call.arguments[0].dtype, call.option("activation")
        n, k = self.block(s["N"], s["K"], activation)
        parts = parts_of(activation)
        weight = padded_bytes(n, k, dtype) if call.option("transpose_w") else padded_bytes(k, n, dtype)
        tiles = parts * (weight + padded_bytes(1, n, dtype)) + 2 * padded_bytes(s["M"], n, dtype)
        return 2 * tiles + padded_bytes(s["M"], s["K"], dtype) + padded_bytes(s["M"], parts * n, "float32")


def _divisor(n: int, most: int) -> int:
    """The largest multiple of 128 up to `most` that divides n, or n."""
    return next((size for size in range(most - most % LANES, 0, -LANES) if n % size == 0), n)


def _check(config: object, rules: dict[str, tuple[int, ...]]) -> None:
    for name, allowed in rules.items():
        if (value := getattr(config, name)) not in allowed:
            raise ValueError(f"{type(config).__name__}.{name} must be one of {allowed}, got {value!r}.")


Config = VectorConfig | MatrixConfig | MosaicTpuConfig
_OF_ROUTE: dict[str, type[Config]] = {"A": VectorConfig, "B": MatrixConfig}


def kinds(call: Call, device: Device, implementation: str | None) -> tuple[type[Config], ...]:
    """The configurations that an implementation takes for a call; the first is the kind of its own choice: that of
    the better route."""
    if implementation == "mosaic_tpu":
        return (MosaicTpuConfig,)
    if implementation != "mosaic_gpu":
        return ()  # the library chooses its own tiles
    kernel = routes.choose(call, device).kernel
    return (_OF_ROUTE[kernel], _OF_ROUTE["B" if kernel == "A" else "A"])


def heuristic(call: Call, device: Device, implementation: str) -> Config:
    """A good configuration without measuring anything."""
    if implementation == "mosaic_tpu":
        return for_route(call, device, "B")
    return for_route(call, device, routes.choose(call, device).kernel)


def for_route(call: Call, device: Device, route: str) -> Config:
    """The heuristic's configuration for a route, whether or not it is the one that the call takes.

    Raises:
      ValueError: the route has no configuration.
    """
    if device.platform == "tpu" and route == "B":
        return mosaic_tpu_heuristic(call)
    if route == "A":
        return _vector(call, device)
    if route == "B":
        return _matrix(call, device)
    raise ValueError(f'flat_gemm has no route {route!r} with a configuration; "A" and "B" have.')


def _vector(call: Call, device: Device) -> VectorConfig:
    """Narrow strips make blocks enough for every weight; what a thread adds up stays in its registers."""
    sums = call.sizes["M"] * parts_of(call.option("activation"))
    if device.arch != "sm90":
        return VectorConfig(32, 128 if sums <= 4 else 64, 6)
    if sums == 1 and call.sizes["K"] <= 8192:
        return VectorConfig(32, 256, 4)
    return VectorConfig(16, 256 if sums <= 4 else 128, 6)


def _matrix(call: Call, device: Device) -> MatrixConfig:
    """One block a multiprocessor, with as much in flight as there is room for, or two where there are more strips."""
    s, num_sms = call.sizes, device.num_cores or 132
    strips, rows, parts = -(-outputs(call) // 64), s["M"] + -s["M"] % 8, parts_of(call.option("activation"))
    if device.arch != "sm90":
        return MatrixConfig(64, 128, 3)
    # Half the multiprocessors are too few to draw a long weight in.
    if 2 * strips <= num_sms and s["K"] > 8192:
        block_k = 128 if rows <= 32 else 64
        left = 4 * 64 * rows * parts + 2 * 64 * rows  # by the blocks of a cluster, and what is written
        return MatrixConfig(64, block_k, _stages(110 * 2**10 - left, block_k, rows, parts), 2)
    alone = strips <= num_sms
    block_k = 128 if rows <= 64 or (alone and rows <= 128) else 64
    written = 2 * 64 * rows * (2 if call.argument("residual") else 1)
    return MatrixConfig(64, block_k, _stages(220 * 2**10 - written if alone else 104 * 2**10, block_k, rows, parts))


def _stages(room: int, block_k: int, rows: int, parts: int) -> int:
    return max(2, min(6, room // (2 * block_k * (64 * parts + rows))))


def outputs(call: Call) -> int:
    """O, output features."""
    return call.sizes["N"] // parts_of(call.option("activation"))


def search_space(call: Call, device: Device, implementation: str) -> Iterator[Config]:
    """Configurations worth measuring, of the kind that `kinds` names first."""
    if implementation == "mosaic_tpu":
        yield from _mosaic_tpu_space(call)
        return
    best = heuristic(call, device, implementation)
    if isinstance(best, VectorConfig):
        for block_n in (16, 32, 64):
            for block_k in (128, 256):
                yield VectorConfig(block_n, block_k, max(2, min(6, 2**15 // (block_n * block_k))))
        return
    hopper = device.arch == "sm90"
    for block_k in (64, 128):
        for stages in (2, 3, 4, 6):
            for num_splits in (1, 2) if hopper else (1,):
                yield MatrixConfig(64, block_k, stages, num_splits)


def mosaic_tpu_heuristic(call: Call) -> MosaicTpuConfig:
    """Blocks of a thirty-second of the weight, but of 1 to 4 MiB: the first one is waited for, and a step's own cost, a
    third of a microsecond, hides under the time that a block takes. Of blocks of one size those with the longest rows,
    which are read in one piece."""
    s, activation = call.sizes, call.option("activation")
    item = jnp.dtype(call.arguments[0].dtype).itemsize
    weight = s["N"] * s["K"] * item
    wanted = min(max(weight // 32, 2**20), 2**22)

    def nbytes(config: MosaicTpuConfig) -> int:
        n, k = config.block(s["N"], s["K"], activation)
        return n * k * item * parts_of(activation)

    fitting = list(_mosaic_tpu_space(call)) or [MosaicTpuConfig(LANES, LANES)]
    return min(fitting, key=lambda config: (abs(nbytes(config) - wanted), -config.block_k))


def _mosaic_tpu_space(call: Call) -> Iterator[MosaicTpuConfig]:
    """Blocks that fit what kernels plan with."""
    for block_n in (128, 256, 512, 1024):
        for block_k in (256, 512, 1024, 2048, 4096):
            config = MosaicTpuConfig(block_n, block_k)
            if config.vmem_bytes(call) <= 3 * VMEM_BYTES // 4:
                yield config
