# SPDX-License-Identifier: Apache-2.0
"""What each part of compressing a vision transformer is worth: accuracy and bytes, for every control.

    python -m benchmarks.vit_compression                     all variants that have no row yet, several seeds each
    python -m benchmarks.vit_compression --only='int4*'      some of them, and what they start from
    python -m benchmarks.vit_compression --plot              a picture of the rows

Each variant is a command of train.py, printed when it is done; its folder stays in --runs, so that a run that was
stopped goes on with the next variant. Several run at a time (--jobs): one compiles while another trains.
Rows go to benchmarks/results/vit_compression.csv, and by `python -m benchmarks.table` to docs/performance.md.

MNIST's 5000 images, of which 1000 are for testing; of the others few have a label, so that there is something to lose.
"""

import argparse
import dataclasses
import fnmatch
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks import rows
from benchmarks.rows import CompressionRow, number

RESULTS = rows.RESULTS / "vit_compression.csv"
PICTURE = rows.RESULTS / "vit_compression.png"
_NO_DISTILLATION = ("--soft=0", "--feature=0")
_PRUNE, _QUANTIZE = ("--stage=prune", "--learning_rate=0.0005"), ("--stage=quantize", "--learning_rate=0.0001")


def _quantized(bits: int, pattern: str) -> dict[str, tuple[str | None, tuple[str, ...]]]:
    """The recipe of so many bits, and what it is compared with: variant -> (what it starts from, flags)."""
    pruned, common = f"distilled_{pattern}", (*_QUANTIZE, f"--bits={bits}")
    name = f"int{bits}"
    return {
        f"{name}_ptq": (pruned, (*common, "--steps=0")),
        f"{name}_without_distillation": (pruned, (*common, *_NO_DISTILLATION)),
        name: (pruned, common),
        f"{name}_without_hard": (pruned, (*common, "--hard=0")),
        f"{name}_without_soft": (pruned, (*common, "--soft=0")),
        f"{name}_without_feature": (pruned, (*common, "--feature=0")),
        f"{name}_uniform": (pruned, (*common, "--layers=uniform")),
        f"{name}_inverse": (pruned, (*common, "--layers=inverse")),
        f"{name}_dense_teacher": (pruned, (*common, "--teacher=dense")),
        f"{name}_unsupervised": (f"{pruned}_without_hard", (*common, "--hard=0")),
        f"{name}_not_pruned": ("dense", common),
    }


def _pruned(pattern: str) -> dict[str, tuple[str | None, tuple[str, ...]]]:
    flags = (*_PRUNE, f"--pattern={pattern}")
    return {
        f"one_shot_{pattern}": ("dense", (*flags, "--steps=0")),
        f"fine_tuned_{pattern}": ("dense", (*flags, *_NO_DISTILLATION)),
        f"distilled_{pattern}": ("dense", flags),
        f"distilled_{pattern}_without_hard": ("dense", (*flags, "--hard=0")),
        f"distilled_{pattern}_without_soft": ("dense", (*flags, "--soft=0")),
        f"distilled_{pattern}_without_feature": ("dense", (*flags, "--feature=0")),
    }


VARIANTS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "dense": (None, ("--stage=dense", "--learning_rate=0.001")),
    **_pruned("2:4"),
    **_quantized(8, "2:4"),
    **_pruned("4:8"),
    **_quantized(4, "4:8"),
}


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    if options.plot:
        plot(_rows(options.out), PICTURE)
        return 0
    # Processes that share a device take of its memory what they need.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    done = {row.variant for row in _rows(options.out)}
    chosen = {name for name in VARIANTS if fnmatch.fnmatch(name, options.only) and name not in done}
    for name in list(chosen):
        chosen.update(start for start in _starts(name) if not (options.runs / start / "run.json").is_file())
    # A variant waits in its thread for the one it starts from, which began before it.
    running: dict[str, Future[CompressionRow | None]] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for name in sorted(chosen, key=lambda name: (len(_starts(name)), list(VARIANTS).index(name))):
            running[name] = pool.submit(_run, name, running.get(VARIANTS[name][0] or ""), options)
        for future in as_completed(running.values()):
            if row := future.result():
                print(", ".join(f"{key} {value}" for key, value in dataclasses.asdict(row).items()), flush=True)
                rows.append(options.out, [row])
    return 0 if all(future.result() for future in running.values()) else 1


def _starts(name: str) -> list[str]:
    """What a variant starts from, and what that starts from."""
    start = VARIANTS[name][0]
    return [] if start is None else [start, *_starts(start)]


def _run(name: str, before: Future[CompressionRow | None] | None, options: argparse.Namespace) -> CompressionRow | None:
    """Trains a variant once what it starts from is there; None if train.py failed."""
    if before is not None and before.result() is None:
        return None
    start, flags = VARIANTS[name]
    command = ["train.py", "--task=vit", f"--preset={options.preset}", f"--labels_per_class={options.labels_per_class}"]
    command += [f"--seeds={options.seeds}", f"--out={options.runs / name}", "--overwrite"]
    # Of the same flag the last counts: some variants have no steps.
    command += [f"--steps={options.dense_steps if start is None else options.steps}", *flags]
    command += [] if start is None else [f"--start={options.runs / start}"]
    ran = subprocess.run([sys.executable, *command], cwd=rows.ROOT, capture_output=True, text=True)
    print("python", *command, flush=True)
    if ran.returncode:
        print(ran.stderr[-2000:], file=sys.stderr, flush=True)
        return None
    return _row(name, json.loads(ran.stdout.splitlines()[-1]))


def _row(name: str, summary: dict[str, Any]) -> CompressionRow:
    accuracy = np.asarray(summary["accuracy"])
    return CompressionRow(
        variant=name,
        accuracy=f"{accuracy.mean():.4f}",
        lowest=f"{accuracy.min():.4f}",
        highest=f"{accuracy.max():.4f}",
        bytes=str(summary.get("bytes", "")),
        ratio=number(summary.get("ratio"), 3),
        seconds=number(summary["seconds"], 3),
        **rows.environment(),
    )


def _rows(file: Path) -> list[CompressionRow]:
    return rows.read(file, CompressionRow) if file.is_file() else []


def in_order(found: Sequence[CompressionRow]) -> list[CompressionRow]:
    """Rows in the order of VARIANTS; they were written as their training ended."""
    order = list(VARIANTS)
    return sorted(found, key=lambda row: order.index(row.variant))


def plot(found: Sequence[CompressionRow], file: Path) -> None:
    """Accuracy of what has a size, a line each, the smallest first, in a colour for its bytes."""
    sized = sorted((row for row in in_order(found) if row.bytes), key=lambda row: int(row.bytes))
    sizes = list(dict.fromkeys(row.bytes for row in sized))
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    for line, row in enumerate(sized):
        low, middle, high = (100 * float(share) for share in (row.lowest, row.accuracy, row.highest))
        spread = [[middle - low], [high - middle]]
        axes.errorbar(middle, line, xerr=spread, fmt="o", capsize=3, color=f"C{sizes.index(row.bytes)}")
    axes.set_yticks(range(len(sized)), [f"{row.variant}, {int(row.bytes) / 1e6:.2f} MB" for row in sized], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="accuracy, %: mean, lowest and highest seed", title="ViT on MNIST 5k, few labels")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="*", help="variants, with wildcards")
    runs = rows.ROOT / "runs" / "vit_compression"
    parser.add_argument("--runs", type=Path, default=runs, help="folder of their runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV file of the rows")
    parser.add_argument("--jobs", type=int, default=10, help="variants at a time")
    parser.add_argument("--preset", default="vit_tiny_28", help="model")
    parser.add_argument("--seeds", type=int, default=3, help="models of each variant, trained together")
    parser.add_argument("--steps", type=int, default=300, help="of each stage")
    parser.add_argument("--dense_steps", type=int, default=1000, help="of the dense models")
    parser.add_argument("--labels_per_class", type=int, default=40, help="images whose label is known; 0 for all")
    parser.add_argument("--plot", action="store_true", help=f"draw {PICTURE.name} and stop")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
