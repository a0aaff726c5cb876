# SPDX-License-Identifier: Apache-2.0
"""Draws the results of one device: python -m benchmarks.plot [--device=h100].

One PNG for each operation, benchmarks/results/<device>_<op>.png: a panel for each direction and dtype, a group of
bars for each shape, a bar for each implementation and baseline.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files

import matplotlib.pyplot as plt

from benchmarks import rows
from benchmarks.rows import Row


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description="Draws benchmark results.")
    parser.add_argument("--device", default=rows.device_name(), help="h100, cpu, ...; default: this one")
    options = parser.parse_args(argv)
    measured = rows.read(rows.RESULTS / f"{options.device}.csv", Row)
    for op in dict.fromkeys(row.op for row in measured):
        file = rows.RESULTS / f"{options.device}_{op}.png"
        draw([row for row in measured if row.op == op], file)
        print(file)
    return 0


def draw(measured: Sequence[Row], file: Path) -> None:
    """One figure of the rows of one operation on one device."""
    panels = list(dict.fromkeys((row.direction, row.dtype) for row in measured))
    widest = max(len({row.shape for row in measured if (row.direction, row.dtype) == panel}) for panel in panels)
    width = max(7.0, 0.9 * widest + 2)
    figure, axes = plt.subplots(len(panels), figsize=(width, 3.6 * len(panels)), squeeze=False)
    names = list(dict.fromkeys(row.implementation for row in measured))
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    for (direction, dtype), axis in zip(panels, axes[:, 0], strict=True):
        here = [row for row in measured if (row.direction, row.dtype) == (direction, dtype)]
        shapes = list(dict.fromkeys(row.shape for row in here))
        bar = 0.8 / len(names)
        for row in here:
            x = shapes.index(row.shape) + bar * (names.index(row.implementation) - (len(names) - 1) / 2)
            axis.bar(x, float(row.tflops), bar, color=colors[row.implementation], label=row.implementation)
        axis.set_xticks(range(len(shapes)), shapes, rotation=25, ha="right", fontsize=8)
        axis.set_ylabel("TFLOP/s")
        axis.set_title(f"{measured[0].op} {direction.replace('_', ' + ')}, {dtype}, {here[0].device}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        labels = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        axis.legend(labels.values(), labels.keys(), fontsize=8, frameon=False)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
