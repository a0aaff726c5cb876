# SPDX-License-Identifier: Apache-2.0
"""Tiles of the weight that a block works on at a time: what they may be, a good guess, and where to search."""

import dataclasses
from collections.abc import Iterator

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call
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


def _check(config: object, rules: dict[str, tuple[int, ...]]) -> None:
    for name, allowed in rules.items():
        if (value := getattr(config, name)) not in allowed:
            raise ValueError(f"{type(config).__name__}.{name} must be one of {allowed}, got {value!r}.")


Config = VectorConfig | MatrixConfig
_OF_ROUTE: dict[str, type[Config]] = {"A": VectorConfig, "B": MatrixConfig}


def kinds(call: Call, device: Device, implementation: str | None) -> tuple[type[Config], ...]:
    """The configurations that an implementation takes for a call; the first is the kind of its own choice: that of
    the better route."""
    if implementation != "mosaic_gpu":
        return ()  # the library chooses its own tiles
    kernel = routes.choose(call, device).kernel
    return (_OF_ROUTE[kernel], _OF_ROUTE["B" if kernel == "A" else "A"])


def heuristic(call: Call, device: Device, implementation: str) -> Config:
    """A good configuration without measuring anything."""
    return for_route(call, device, routes.choose(call, device).kernel)


def for_route(call: Call, device: Device, route: str) -> Config:
    """The heuristic's configuration for a route, whether or not it is the one that the call takes.

    Raises:
      ValueError: the route has no configuration.
    """
    if route == "A":
        return _vector(call, device)
    if route == "B":
        return _matrix(call, device)
    raise ValueError(f'flat_gemm has no route {route!r} with a configuration; "A" and "B" have.')


def _vector(call: Call, device: Device) -> VectorConfig:
    """Narrow strips make blocks enough for every weight; what a thread adds up stays in its registers."""
    sums = call.sizes["M"] * _parts(call)
    if device.arch != "sm90":
        return VectorConfig(32, 128 if sums <= 4 else 64, 6)
    if sums == 1:
        return VectorConfig(32, 256, 4)
    return VectorConfig(16, 256 if sums <= 4 else 128, 6)


def _matrix(call: Call, device: Device) -> MatrixConfig:
    """One block a multiprocessor, with as much in flight as there is room for, or two where there are more strips."""
    s, num_sms = call.sizes, device.num_cores or 132
    strips, rows, parts = -(-outputs(call) // 64), s["M"] + -s["M"] % 8, _parts(call)
    if device.arch != "sm90":
        return MatrixConfig(64, 128, 3)
    # Half the multiprocessors are too few to draw a long weight in.
    splits = 2 if 2 * strips <= num_sms and s["K"] > 8192 else 1
    alone = strips * splits <= num_sms
    block_k = 128 if rows <= 64 or (alone and rows <= 128) else 64
    room = (200 if alone else 104) * 2**10
    stages = room // (2 * block_k * (64 * parts + rows))
    return MatrixConfig(64, block_k, max(2, min(6, stages)), splits)


def outputs(call: Call) -> int:
    """O, output features."""
    return call.sizes["N"] // _parts(call)


def _parts(call: Call) -> int:
    """Gate and up are two."""
    return 2 if call.option("activation") == "swiglu" else 1


def search_space(call: Call, device: Device, implementation: str) -> Iterator[Config]:
    """Configurations worth measuring, of the kind that `kinds` names first."""
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
