# SPDX-License-Identifier: Apache-2.0
"""Tiles of the kernel for Hopper: what they may be, a first guess, and where to search. The others have none."""

import dataclasses
from collections.abc import Iterator

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call

TILE = 64  # outputs of a warpgroup
# Of a thread that multiplies, by their warpgroups: the one that copies leaves them all but 24 of its own.
REGISTERS = {1: 240, 2: 240, 3: 160}
OTHERS = 22  # registers that are neither sums nor weights


@dataclasses.dataclass(frozen=True)
class Sm90Config:
    """`mosaic_gpu` on Hopper (sm90.py).

    Attributes:
      rows: of x in a tile, a multiple of 8; no more are taken than there are.
      warpgroups: of a block, 64 outputs each; they share rows of x.
      stages: steps of 128 bytes of each row of x that shared memory holds.
      ahead: steps whose weights are on their way to registers.
    """

    rows: int = 256
    warpgroups: int = 2
    stages: int = 4
    ahead: int = 4

    def __post_init__(self):
        rules = {"rows": range(8, 257, 8), "warpgroups": (1, 2, 3), "stages": range(2, 17), "ahead": range(1, 13)}
        for name, allowed in rules.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"Sm90Config.{name} must be one of {tuple(allowed)}, got {value!r}.")
        if self.rows // 2 + 9 * self.ahead + OTHERS > self.registers:
            raise ValueError(f"Sm90Config: sums and weights ahead do not fit {self.registers} registers: {self}.")

    @property
    def registers(self) -> int:
        return REGISTERS[self.warpgroups]


def kinds(device: Device, implementation: str) -> tuple[type[Sm90Config], ...]:
    """The configurations that an implementation takes; the first is the kind of its own choice."""
    return (Sm90Config,) if implementation == "mosaic_gpu" and device.arch == "sm90" else ()


def heuristic(call: Call, device: Device, implementation: str) -> Sm90Config:
    """A configuration by what is known of the hardware; nothing was measured yet.

    Many rows: as many as an instruction takes, for each reads its weights once. Few: blocks of so many warpgroups that
    multiprocessors have about the same number of outputs, and as many bytes of weights on their way as registers hold.
    """
    M, tiles = call.sizes["M"], -(-call.sizes["N"] // TILE)
    if M > 128:
        return Sm90Config()
    rows, num_sms = M + -M % 8, device.num_cores or 132
    warpgroups = max(1, min(3, -(-tiles // num_sms)))
    left = REGISTERS[warpgroups] - OTHERS - rows // 2
    return Sm90Config(rows, warpgroups, stages=8 if rows <= 64 else 6, ahead=min(10, left // 9))


def search_space(call: Call, device: Device, implementation: str) -> Iterator[Sm90Config]:
    """Configurations worth measuring."""
    M = call.sizes["M"]
    for rows in (64, 128, 192, 256):
        for warpgroups in (1, 2, 3):
            for ahead in (2, 4, 6, 8):
                if rows - 64 < M:
                    try:
                        yield Sm90Config(min(rows, M + -M % 8), warpgroups, 4 if rows > 128 else 8, ahead)
                    except ValueError:
                        continue
