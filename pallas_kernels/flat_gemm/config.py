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
        rules = {"block_n": (16, 32, 64, 128), "block_k": (64, 128, 256, 512, 1024), "stages": (2, 3, 4, 5, 6, 8)}
        _check(self, rules)


@dataclasses.dataclass(frozen=True)
class MatrixConfig:
    """Route B of the `mosaic_gpu` implementation: the weight is the wide operand of the tensor cores, and rows are
    padded to a multiple of 8.

    Attributes:
      block_n: output features of a block.
      block_k: input features of one step.
      stages: how many tiles of the weight shared memory holds; 2 is the paper's double buffering.
      num_splits: in how many pieces K is cut, each the work of another block; the paper has 1.
    """

    block_n: int = 64
    block_k: int = 128
    stages: int = 4
    num_splits: int = 1

    def __post_init__(self):
        _check(self, {"block_n": (64, 128, 256), "block_k": (64, 128, 256), "stages": (1, 2, 3, 4, 5, 6, 8)})
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
    N, K, num_sms = call.sizes["N"], call.sizes["K"], device.num_cores or 132
    if route == "A":
        return VectorConfig(block_n=64 if 64 * num_sms <= N else 32)
    if route == "B":
        block_n = 128 if 128 * num_sms <= N else 64
        # Blocks for every multiprocessor, each with at least as many steps as are in flight.
        splits = min(num_sms // -(-N // block_n), K // (4 * 128))
        return MatrixConfig(block_n, num_splits=max(1, splits))
    raise ValueError(f'flat_gemm has no route {route!r} with a configuration; "A" and "B" have.')


def search_space(call: Call, device: Device, implementation: str) -> Iterator[Config]:
    """Configurations worth measuring, of the kind that `kinds` names first."""
    match kinds(call, device, implementation):
        case (kind, _) if kind is VectorConfig:
            for block_n in (32, 64, 128):
                for block_k in (128, 256, 512):
                    yield VectorConfig(block_n, block_k, max(2, min(8, 2**15 // (block_n * block_k))))
        case (kind, _) if kind is MatrixConfig:
            best = for_route(call, device, "B")
            assert isinstance(best, MatrixConfig)
            for block_n in (64, 128, 256):
                for block_k in (64, 128):
                    for num_splits in sorted({1, best.num_splits, 2 * best.num_splits}):
                        yield MatrixConfig(block_n, block_k, 4, num_splits)
