# SPDX-License-Identifier: Apache-2.0
"""Wide tiles read less, narrow ones keep more multiprocessors busy: python -m benchmarks.flat_gemm_sweep

FlashDecoding++'s Figure 7: 8 rows times weights of 2^10 to 2^18 output features and K of 4096 and 12288, with blocks of
32 to 512 output features and no split of K; here beside XLA's product. Tiles that the kernel has not are told and left
out. Appends to benchmarks/results/<device>_flat_gemm_sweep.csv and draws it, GB/s over N, into the PNG of that name.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")  # draws into files

import jax
import matplotlib.pyplot as plt

from benchmarks import rows, timing
from benchmarks.arguments import integers
from benchmarks.baselines import Unavailable
from benchmarks.operations import OPERATIONS
from benchmarks.rows import SweepRow, number
from benchmarks.run import Truth, time_fastest
from pallas_kernels import UnsupportedError
from pallas_kernels.core import device as device_lib
from pallas_kernels.flat_gemm.config import MatrixConfig
from pallas_kernels.flat_gemm.shapes import Shape

OPERATION = OPERATIONS["flat_gemm"]


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    out = options.out or rows.RESULTS / f"{rows.device_name()}_flat_gemm_sweep.csv"
    print(f"{device_lib.current()}, jax {jax.__version__}, {options.timing} timing", flush=True)
    configs = list(_configs(options.block_n, options.stages))
    for K in options.k:
        for N in options.n:
            shape = Shape(options.m, N, K)
            measured = []
            for row in sweep(shape, options.dtype, configs, options.timing, options.budget):
                what = f"B_N={row.block_n} stages={row.stages}" if row.block_n else row.implementation
                print(f"  N={N} K={K} {what}: {row.median_us} us, {row.gbs} GB/s", flush=True)
                measured.append(row)
            rows.append(out, measured)
    picture = out.with_suffix(".png")
    draw(rows.read(out, SweepRow), picture)
    print(f"Appended to {out}; drawn in {picture}.")
    return 0


def _configs(widths: Sequence[int], stages: Sequence[int]) -> Iterator[MatrixConfig]:
    """Without split K, as in the paper. What the kernel has no tiles for is told, and left out."""
    for block_n in widths:
        for count in stages:
            try:
                yield MatrixConfig(block_n, stages=count)
            except ValueError as refusal:
                print(f"  left out: {refusal}", flush=True)


def sweep(shape: Shape, dtype: str, configs: Sequence[MatrixConfig], method: str, budget: float) -> Iterator[SweepRow]:
    """Rows of one weight: XLA, and each tile that runs. AssertionError where a result is wrong."""
    arguments = shape.make(dtype, jax.random.key(0))
    truth = Truth(OPERATION, arguments, "forward", exact=not shape.large)
    nbytes = jnp.dtype(dtype).itemsize * (shape.M * shape.K + shape.N * shape.K + shape.M * shape.N)
    for config in (None, *configs):
        name = "xla" if config is None else "mosaic_gpu"

        def call(arguments, name=name, config=config) -> jax.Array:
            return OPERATION.function(**arguments, implementation=name, config=config)

        try:
            t = time_fastest(OPERATION, [(call, arguments)], "forward", truth, method, budget)
        except (Unavailable, UnsupportedError) as refusal:
            print(f"  {name} {config or ''} not run: {' '.join(str(refusal).split())}", flush=True)
            continue
        yield SweepRow(
            m=str(shape.M),
            n=str(shape.N),
            k=str(shape.K),
            dtype=dtype,
            implementation=name,
            block_n="" if config is None else str(config.block_n),
            stages="" if config is None else str(config.stages),
            median_us=number(t.median * 1e6),
            gbs=number(nbytes / t.median / 1e9),
            **rows.environment(),
        )


def draw(measured: Sequence[SweepRow], file: Path) -> None:
    """GB/s over N: a panel for each K, a line for each tile."""
    depths = list(dict.fromkeys(row.k for row in measured))
    figure, axes = plt.subplots(1, len(depths), figsize=(5.5 * len(depths), 3.8), squeeze=False, sharey=True)
    for K, axis in zip(depths, axes[0], strict=True):
        here = [row for row in measured if row.k == K]
        for tile in dict.fromkeys(_tile(row) for row in here):
            line = sorted((int(row.n), float(row.gbs)) for row in here if _tile(row) == tile)
            style = {"color": "black", "linestyle": "--"} if tile == "xla" else {}
            axis.plot(*zip(*line, strict=True), marker="o", markersize=3, label=tile, **style)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("N")
        axis.set_title(f"flat_gemm, M={here[0].m}, K={K}, {here[0].dtype}, {here[0].device}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("GB/s")
    axes[0][-1].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _tile(row: SweepRow) -> str:
    return f"B_N = {row.block_n}, {row.stages} stages" if row.block_n else row.implementation


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flat_gemm_sweep", description="Tiles of flat_gemm.")
    on_cpu = device_lib.current().platform == "cpu"
    parser.add_argument("--m", type=int, default=8, help="rows (default 8)")
    parser.add_argument("--n", type=integers, default=[2**i for i in range(10, 19)], help="default: 2^10 to 2^18")
    parser.add_argument("--k", type=integers, default=[4096, 12288], help="default: 4096,12288")
    parser.add_argument("--block_n", type=integers, default=[32, 64, 128, 256, 512], help="default: 32 to 512")
    parser.add_argument("--stages", type=integers, default=[2], help="default: 2, the paper's double buffering")
    parser.add_argument(
        "--dtype", default="float32" if on_cpu else "bfloat16", help="default: bfloat16, on a CPU float32"
    )
    parser.add_argument("--timing", choices=timing.METHODS, default=timing.default_method())
    parser.add_argument("--budget", type=float, default=0.1, help="seconds of repetitions a row (default 0.1)")
    parser.add_argument("--out", type=Path, help="CSV file; default: benchmarks/results/<device>_flat_gemm_sweep.csv")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
