# SPDX-License-Identifier: Apache-2.0
"""Two-level tiling on TPUs, counted and compiled without one: python -m benchmarks.tpu_tiling

Needs libtpu, not a TPU: the environment that `make test-aot` makes has it (.venv-aot-*/bin/python).

    tiling   width of a first-level block {128, 256, 512, 1024}, of which 128 is tiling on one level: softmax updates
             (steps in which matrix and vector unit meet) of a row of tiles, on-chip memory, code, and estimated time
    memory   a call's temporary memory at T = S = 16k to 256k, with no mask, and with both ways to hide causal tiles

On-chip memory is what libtpu needs at least: the limit it is given rises until it compiles. Time is libtpu's own
estimate, which rests on the cost that the kernel states; nothing here has run on a TPU. Every line is remade, and
benchmarks/results/tpu_tiling.csv replaced.
"""

import argparse
import csv
import dataclasses
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

# Read when jax is imported: libtpu must look neither for a TPU nor for its metadata server.
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from benchmarks import rows
from benchmarks.rows import number
from benchmarks.table import markdown
from pallas_kernels import flash_attention, masks
from pallas_kernels.flash_attention import tiles
from pallas_kernels.flash_attention.config import MosaicTpuConfig, mosaic_tpu_block
from tests.aot.targets import TARGETS, TPUS, Compiling

WIDTHS = (128, 256, 512, 1024)
BLOCK_Q, HEAD_DIM = 256, 128
# 64 MiB an array: libtpu moves whole operands of small calls into on-chip memory, where there is nothing to tile.
TILING_LENGTH, TILING_HEADS = 16384, 16
MEMORY_LENGTHS = (2**14, 2**16, 2**18)


@dataclasses.dataclass(frozen=True)
class TilingRow:
    """One compiled call: bfloat16, H = 128, T = S = length. Figures are text; "" was not asked for.

    Attributes:
      part, target, direction: "tiling" or "memory"; the TPU; "forward" or "backward" (all that `grad` runs).
      length, heads: T = S and N = K; one row of a batch.
      mask: "none", or how causal tiles hide logits: "iota" or "window".
      block_q, width, block_k: rows and columns of a first-level block, columns of a product.
      updates: first-level steps of a row of tiles, the mean over the rows.
      vmem_kib: on-chip memory that the largest kernel needs.
      temp_kib, code_kib: temporaries of the whole call in device memory, and its machine code.
      estimate_us: microseconds, as libtpu expects them.
      commit, jax: of this repository, with "+" if it had changes; version.
    """

    part: str
    target: str
    direction: str
    length: int
    heads: int
    mask: str
    block_q: int
    width: int
    block_k: int
    updates: str
    vmem_kib: str
    temp_kib: str
    code_kib: str
    estimate_us: str
    commit: str
    jax: str


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    measured = []
    for part in (tiling, memory):
        chosen = []
        for row in part(options.targets):
            print("  " + " ".join(f"{k}={v}" for k, v in dataclasses.asdict(row).items()), file=sys.stderr, flush=True)
            chosen.append(row)
        print("\n".join(table(chosen)) + "\n", flush=True)
        if part is tiling:
            print("\n".join(summary(chosen)) + "\n", flush=True)
        measured += chosen
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(TilingRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, measured))
    print(f"Wrote {options.out}.")
    return 0


def tiling(targets: Sequence[str]) -> Iterator[TilingRow]:
    """The sweep of the first-level width."""
    for target in targets:
        with TARGETS[target].compiling() as compiling:
            for width in WIDTHS:
                for direction, mask in (("forward", "iota"), ("forward", "window"), ("backward", "iota")):
                    yield _compile(compiling, "tiling", direction, TILING_LENGTH, TILING_HEADS, mask, width)


def memory(targets: Sequence[str]) -> Iterator[TilingRow]:
    """Temporary memory as T grows; the first target speaks for all."""
    with TARGETS[targets[0]].compiling() as compiling:
        for length in MEMORY_LENGTHS:
            for mask in ("none", "iota", "window"):
                yield _compile(compiling, "memory", "forward", length, 1, mask, 1024)


def _compile(
    compiling: Compiling, part: str, direction: str, length: int, heads: int, mask: str, width: int
) -> TilingRow:
    config = mosaic_tpu_block(BLOCK_Q, width, mask="window" if mask == "window" else "iota")
    causal = None if mask == "none" else masks.Causal()
    x = compiling.array((1, length, heads, HEAD_DIM), jnp.bfloat16)
    compiled = _lower(x, direction, causal, config).compile()
    costs: Any = compiled.cost_analysis()
    account: Any = compiled.memory_analysis()
    updates = tiles.schedule(causal, length, length, BLOCK_Q, width).live.mean()
    return TilingRow(
        part=part,
        target=compiling.target.name,
        direction=direction,
        length=length,
        heads=heads,
        mask=mask,
        block_q=BLOCK_Q,
        width=width,
        block_k=config.block_k,
        updates=number(float(updates)),
        vmem_kib=number(on_chip_bytes(x, direction, causal, config) / 1024) if part == "tiling" else "",
        temp_kib=number(account.temp_size_in_bytes / 1024, 8),
        code_kib=number(account.generated_code_size_in_bytes / 1024),
        estimate_us=number(costs["optimal_seconds"] * 1e6),
        commit=rows.commit(),
        jax=jax.__version__,
    )


def _lower(x: jax.ShapeDtypeStruct, direction: str, mask: masks.Mask | None, config: MosaicTpuConfig):
    def forward(q, k, v):
        return flash_attention(q, k, v, mask=mask, implementation="mosaic_tpu", config=config)

    def backward(q, k, v):
        return jax.grad(lambda *x: jnp.sum(forward(*x).astype(jnp.float32)), (0, 1, 2))(q, k, v)

    return jax.jit(forward if direction == "forward" else backward).lower(x, x, x)


def on_chip_bytes(x: jax.ShapeDtypeStruct, direction: str, mask: masks.Mask | None, config: MosaicTpuConfig) -> int:
    """The least limit of on-chip memory under which libtpu compiles: each refusal says how much it missed."""
    parameters, limit = pltpu.CompilerParams, 2**16
    while True:

        def limited(limit: int = limit, **fields: Any):
            return parameters(**{**fields, "vmem_limit_bytes": limit})

        with mock.patch.object(pltpu, "CompilerParams", limited):
            lowered = _lower(x, direction, mask, config)
        try:
            lowered.compile()
            return limit
        except jax.errors.JaxRuntimeError as error:
            found = re.search(r"exceeded scoped vmem limit by ([\d.]+)([KM])", str(error))
            if found is None:
                raise
            # The message is rounded to two digits; in steps of at least 16 KiB the search still ends.
            limit += max(2**14, int(float(found[1]) * {"K": 2**10, "M": 2**20}[found[2]]))


def summary(measured: Sequence[TilingRow]) -> list[str]:
    """The sweep in Markdown, a line for each width: what is compared, forward and backward."""
    found = {(row.target, row.width, row.direction): row for row in measured if row.mask == "iota"}
    targets = list(dict.fromkeys(target for target, *_ in found))
    cells = []
    for width in WIDTHS:
        pairs = [[found[target, width, direction] for direction in ("forward", "backward")] for target in targets]
        on_chip = [" / ".join(row.vmem_kib for row in pair) for pair in pairs]
        milliseconds = [" / ".join(number(float(row.estimate_us) / 1000, 3) for row in pair) for pair in pairs]
        levels = f"{width}, one level" if width == WIDTHS[0] else str(width)
        cells.append(
            [levels, pairs[0][0].updates, *(f"{a} KiB, {b} ms" for a, b in zip(on_chip, milliseconds, strict=True))]
        )
    return markdown(["first-level width", "updates of a row of tiles", *targets], cells)


def table(measured: Sequence[TilingRow]) -> list[str]:
    """Markdown."""
    header = {
        "target": "TPU",
        "direction": "direction",
        "length": "T = S",
        "heads": "heads",
        "mask": "mask",
        "width": "width",
        "updates": "updates a row of tiles",
        "vmem_kib": "on-chip KiB",
        "temp_kib": "temporary KiB",
        "code_kib": "code KiB",
        "estimate_us": "estimated µs",
    }
    return markdown(list(header.values()), [[str(getattr(row, name)) for name in header] for row in measured])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_tiling", description="Two-level tiling on TPUs.")
    parser.add_argument("--targets", default=TPUS, type=lambda text: text.split(","), help=f"of {', '.join(TPUS)}")
    parser.add_argument("--out", type=Path, default=rows.RESULTS / "tpu_tiling.csv", help="CSV file to write")
    options = parser.parse_args(argv)
    if unknown := set(options.targets) - set(TPUS):
        parser.error(f"--targets: no TPU is called {', '.join(sorted(unknown))}; known are {', '.join(TPUS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
