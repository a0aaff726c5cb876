# SPDX-License-Identifier: Apache-2.0
"""Tiles of the Hopper kernel."""

import dataclasses

TILE = 64  # outputs of a warpgroup


@dataclasses.dataclass(frozen=True)
class Sm90Config:
    """`mosaic_gpu` on Hopper (sm90.py).

    Attributes:
      rows: of x, in a tile.
      warpgroups: of a block, 64 outputs each.
      stages: slots of x in shared memory.
      ahead: steps whose weights are on their way to registers.
      blocks: of a multiprocessor.
    """

    rows: int = 256
    warpgroups: int = 2
    stages: int = 4
    ahead: int = 2
    blocks: int = 1

    @property
    def registers(self) -> int:
        return {1: 232, 2: 240, 3: 160}[self.warpgroups]
