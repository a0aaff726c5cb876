# SPDX-License-Identifier: Apache-2.0
"""Is time spent on live tiles only? python -m benchmarks.live_tiles [--device=h200]

Takes the measured rows of one device and divides each masked call's time by the tiles that its mask leaves live, as
the call without a mask is divided by all of its tiles. A kernel that pays for live tiles, and for them alone, has the
same quotient in every row: 1 in the last column but one.
"""

import argparse
import sys
from collections.abc import Sequence

import jax

from benchmarks import rows
from benchmarks.rows import Row, number
from benchmarks.table import markdown
from pallas_kernels.flash_attention import tiles
from pallas_kernels.flash_attention.shapes import SHAPES

TILE = 128
# One size of call, with nothing masked first.
COMPARED = ("d128_full_16k", "d128_causal_16k", "window_4k_16k", "window_1k_16k", "packed_16k")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live_tiles", description="Time per live tile.")
    parser.add_argument("--device", default=rows.device_name(), help="h100, h200, ...; default: this one")
    options = parser.parse_args(argv)
    file = rows.RESULTS / f"{options.device}.csv"
    if not file.exists():
        parser.error(f"{file} does not exist: measure first, by python -m benchmarks.run flash_attention")
    measured = [row for row in rows.read(file, Row) if row.op == "flash_attention" and row.shape in COMPARED]
    print("\n".join(table(measured)))
    return 0


def count(shape: str) -> dict[str, int]:
    """Tiles of a named shape by class, over batch and heads, for the mask that the driver draws."""
    s = SHAPES[shape]
    # Documents are drawn after query, key and value; other masks are the same in every draw.
    arguments = s.make("bfloat16", jax.random.key(0)) if s.mask_name == "packed" else s.abstract("bfloat16")
    mask = arguments.get("mask")
    return tiles.count(mask, s.T, s.S, TILE, TILE, B=s.B, N=s.N)


def table(measured: Sequence[Row]) -> list[str]:
    """Markdown; a row for each implementation, direction and shape whose unmasked call was measured, too."""
    classes = ["empty", "mixed", "full"]
    header = ["implementation", "direction", "shape", *classes, "µs", "ns a live tile", "to unmasked", "commit"]
    by_key = {(row.implementation, row.direction, row.dtype, row.shape): row for row in measured}
    counts = {shape: count(shape) for shape in dict.fromkeys(row.shape for row in measured)}
    cells = []
    for group in dict.fromkeys(key[:-1] for key in by_key):
        found = [row for shape in COMPARED if (row := by_key.get((*group, shape))) is not None]
        if found[0].shape != COMPARED[0] or len(found) == 1:
            continue
        nanoseconds = [1e3 * float(row.median_us) / _live(counts[row.shape]) for row in found]
        for row, each in zip(found, nanoseconds, strict=True):
            cells.append(
                [row.implementation, row.direction.replace("_", " + "), f"`{row.shape}`"]
                + [str(counts[row.shape][name]) for name in classes]
                + [row.median_us, number(each, 3), number(each / nanoseconds[0], 3), row.commit]
            )
    return markdown(header, cells)


def _live(counts: dict[str, int]) -> int:
    return counts["mixed"] + counts["full"]


if __name__ == "__main__":
    sys.exit(main())
