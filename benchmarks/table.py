# SPDX-License-Identifier: Apache-2.0
"""Writes tables of the results into Markdown files, between markers that name what they show:

    <!-- benchmarks: flash_attention h100 -->
    (rewritten by python -m benchmarks.table)
    <!-- end benchmarks -->

`models` in the place of an operation shows whole models, `decoding` their decode steps alone, `vit` vision
transformers, `log_bessel` elements a second, `fastattention_operator`, and so on, a part of what
benchmarks/fastattention.py measures. The second word begins the name of the file of results; `compression vit` shows
what compressing vision transformers is worth.

Without arguments it takes every Markdown file of the repository; `--check` changes nothing and exits with 1 if a table
is not what the results say.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import rows
from benchmarks.baselines import BASELINES
from benchmarks.rows import BesselRow, CompressionRow, ModelRow, PaperRow, Row, VitRow, number
from benchmarks.vit_compression import in_order

_MARKED = re.compile(
    r"(?P<begin><!-- benchmarks: (?P<what>\w+) (?P<device>\w+) -->\n).*?(?P<end><!-- end benchmarks -->)", re.S
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description="Writes result tables.")
    parser.add_argument("files", nargs="*", type=Path, help="Markdown files; default: all of the repository")
    parser.add_argument("--check", action="store_true", help="only say whether a table is out of date")
    options = parser.parse_args(argv)
    stale = []
    for file in options.files or markdown_files():
        old = file.read_text()
        new = fill(old, rows.RESULTS)
        if new != old:
            stale.append(file)
            if not options.check:
                file.write_text(new)
    for file in stale:
        print(f"{file}: {'out of date, run python -m benchmarks.table' if options.check else 'rewritten'}")
    return 1 if options.check and stale else 0


def markdown_files() -> list[Path]:
    """Every Markdown file that git tracks."""
    command = ["git", "ls-files", "*.md"]
    done = subprocess.run(command, cwd=rows.ROOT, capture_output=True, text=True, check=True)
    return [rows.ROOT / name for name in done.stdout.splitlines()]


def fill(text: str, results: Path) -> str:
    """`text` with the content between all markers replaced by the tables of the CSV files under `results`."""

    def table(match: re.Match[str]) -> str:
        what, device = match["what"], match["device"]
        if what in ("models", "decoding"):
            measured = rows.read(results / f"{device}_models.csv", ModelRow)
            wanted = [row for row in measured if (row.phase == "decode_step") == (what == "decoding")]
            lines = decoding_table(wanted) if what == "decoding" else model_table(wanted)
        elif what == "vit":
            lines = vit_table(rows.read(results / f"{device}_vit.csv", VitRow))
        elif what == "log_bessel":
            lines = bessel_table(rows.read(results / f"{device}_log_bessel.csv", BesselRow))
        elif what == "compression":
            lines = compression_table(rows.read(results / f"{device}_compression.csv", CompressionRow))
        elif what.startswith("fastattention_"):
            measured = rows.read(results / f"{device}_fastattention.csv", PaperRow)
            lines = paper_table(measured, what.removeprefix("fastattention_"))
        else:
            lines = operation_table([r for r in rows.read(results / f"{device}.csv", Row) if r.op == what])
        return match["begin"] + "\n".join(lines) + "\n" + match["end"]

    return _MARKED.sub(table, text)


def operation_table(measured: Sequence[Row]) -> list[str]:
    """Our implementations, each beside the baselines that were measured at the same commit."""
    if not measured:
        return ["Not measured yet."]
    names = BASELINES.get(measured[0].op, {})
    header = ["shape", "direction", "dtype", "implementation", "µs", "TFLOP/s", "% of roofline"]
    header += [*(f"vs {name}" for name in names), "best baseline", "times as fast", "commit"]
    baselines = {(*_call(row), row.implementation): row for row in measured if row.implementation in names}

    def ratio(row: Row, name: str) -> str:
        baseline = baselines.get((*_call(row), name))
        return number(float(baseline.median_us) / float(row.median_us), 3) if baseline else ""

    cells = [
        [
            f"`{row.shape}`",
            row.direction.replace("_", " + "),
            row.dtype,
            row.implementation,
            row.median_us,
            row.tflops,
            row.percent_peak,
            *(ratio(row, name) for name in names),
            row.baseline,
            row.ratio,
            row.commit,
        ]
        for row in measured
        if row.implementation not in names
    ]
    return markdown(header, cells)


def _call(row: Row) -> tuple[str, ...]:
    """What ours and a baseline must have in common to be compared."""
    return (row.shape, row.direction, row.dtype, row.commit, row.jax, row.device)


def model_table(measured: Sequence[ModelRow]) -> list[str]:
    """Training steps, prefill and decoding."""
    header = ["model", "phase", "batch x length", "dtype", "remat", "ms", "tokens/s", "% of peak FLOP/s"]
    header += ["GB/s", "attention, % of the step", "commit"]
    cells = [
        [
            f"`{row.model}`",
            row.phase,
            f"{row.batch} x {row.length}",
            row.dtype,
            row.remat,
            row.median_ms,
            row.tokens_per_second,
            row.mfu_percent,
            row.gbs,
            row.attention_percent,
            row.commit,
        ]
        for row in measured
    ]
    return markdown(header, cells)


def decoding_table(measured: Sequence[ModelRow]) -> list[str]:
    """A decode step alone, each beside that of transformers."""
    theirs = {(r.model, r.batch, r.length): r for r in measured if r.implementation == "huggingface"}
    header = ["model", "batch x prompt", "variant", "ms a step", "tokens/s", "GB/s", "times transformers", "commit"]
    cells = []
    for row in measured:
        if row.implementation == "huggingface":
            continue
        other = theirs.get((row.model, row.batch, row.length))
        ratio = number(float(other.median_ms) / float(row.median_ms), 3) if other else ""
        shape = f"{row.batch} x {row.length}"
        cells.append(
            [f"`{row.model}`", shape, row.implementation, row.median_ms, row.tokens_per_second, row.gbs, ratio]
        )
        cells[-1].append(row.commit)
    return markdown(header, cells)


def vit_table(measured: Sequence[VitRow]) -> list[str]:
    """Vision transformers, each beside itself in float32."""
    float32 = {(row.model, row.batch): float(row.busy_us) for row in measured if row.variant == "float32"}
    header = ["model", "images", "variant", "busy, µs", "wall, µs", "images/s", "times float32", "error", "commit"]
    cells = []
    for row in measured:
        before = float32.get((row.model, row.batch))
        ratio = number(before / float(row.busy_us), 3) if before else ""
        times = [row.busy_us, row.wall_us, row.images_per_s, ratio]
        cells.append([f"`{row.model}`", row.batch, row.variant, *times, row.error, row.commit])
    return markdown(header, cells)


def bessel_table(measured: Sequence[BesselRow]) -> list[str]:
    """The fastest of ours beside each other implementation, millions of elements a second, "shuffled / sorted"."""
    found = {(row.function, row.region, row.dtype, row.implementation, row.order): row for row in measured}
    calls = dict.fromkeys((row.function, row.region, row.dtype) for row in measured if row.function.startswith("log "))
    names = list(dict.fromkeys(row.implementation for row in measured if row.function.startswith("log ")))
    ours, *others = names
    ratios = [name for name in ("tfp", "scipy") if name in names]
    header = ["", "region", "type", f"`{ours}`, M/s", *(f"{name}, M/s" for name in others)]
    cells = []

    def both(call: tuple[str, str, str], name: str, attribute: str) -> str:
        orders = (found.get((*call, name, order)) for order in ("shuffled", "sorted"))
        return " / ".join(getattr(row, attribute) for row in orders if row)

    for call in calls:
        speeds = [both(call, name, "melements") for name in names]
        times = [both(call, ours, f"over_{name}") for name in ratios]
        commit = next(row.commit for key, row in found.items() if key[:4] == (*call, ours))
        cells.append([*call, *speeds, *times, commit])
    return markdown([*header, *(f"times {name}" for name in ratios), "commit"], cells)


def compression_table(measured: Sequence[CompressionRow]) -> list[str]:
    """Accuracy of the mean seed, its spread, what it lost or won in points, and bytes."""
    dense = next((float(row.accuracy) for row in measured if row.variant == "dense"), None)
    header = ["variant", "accuracy", "of the seeds", "points", "bytes", "times fewer", "commit"]
    cells = []
    for row in in_order(measured):
        accuracy = float(row.accuracy)
        spread = f"{float(row.lowest):.1%} to {float(row.highest):.1%}"
        points = f"{100 * (accuracy - dense):+.1f}" if dense is not None else ""
        nbytes = f"{int(row.bytes):,}" if row.bytes else ""
        cells.append([row.variant, f"{accuracy:.1%}", spread, points, nbytes, row.ratio, row.commit])
    return markdown(header, cells)


# Of each part of the FastAttention paper's claims: the variants that are compared (the first with the second; a time,
# where less is better, is turned around), what the quotient is called, and what the paper says of it.
_CLAIMS = {
    "exchanges": ("128", "512", "one level : two (512)", ""),
    "memory": ("S x S, float16", "M-mask, blocks to 1024", "float16 : M-mask", ""),
    "operator": ("unfused, stored", "ours", "times as fast as stored", "up to 10.7"),
    "prefill": ("ours", "unfused, stored", "times as fast as stored", "up to 5.16"),
}


def paper_table(measured: Sequence[PaperRow], part: str) -> list[str]:
    """One part: a row for each case and length, a column for each variant, and the quotient beside the paper's."""
    if part not in _CLAIMS:
        raise ValueError(f"no part {part!r} of the FastAttention benchmark; known: {', '.join(_CLAIMS)}")
    above, below, name, claim = _CLAIMS[part]
    measured = [row for row in measured if row.part == part]
    variants = list(dict.fromkeys(row.variant for row in measured))
    unit = measured[0].unit if measured else ""
    values = {(row.case, row.length, row.variant): row.value for row in measured}
    cells = []
    for case, length in dict.fromkeys((row.case, row.length) for row in measured):
        found = [values.get((case, length, variant), "") for variant in variants]
        over, under = (values.get((case, length, variant)) for variant in (above, below))
        quotient = number(float(over) / float(under)) if over and under else ""
        cells.append([case, length, *found, quotient, claim])
    return markdown(["case", "length", *(f"{v} [{unit}]" for v in variants), name, "in the paper"], cells)


def markdown(header: list[str], cells: list[list[str]]) -> list[str]:
    """A Markdown table; columns in which nothing is known are left out."""
    keep = [i for i in range(len(header)) if any(row[i] for row in cells)]
    lines = [header, ["---"] * len(header), *cells]
    return ["| " + " | ".join(line[i] for i in keep) + " |" for line in lines]


if __name__ == "__main__":
    sys.exit(main())
