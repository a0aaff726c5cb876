# SPDX-License-Identifier: Apache-2.0
"""What quantized_matmul gains by loads that do not wait for arithmetic: python -m benchmarks.quantized_ablation

Weights of 2 and 4 bits, the kernel and configuration that "auto" takes, but for

    stages        steps that shared memory holds: with 1 a block loads, waits and decodes in turn
    scales ahead  scales are there a step before their words, for their arithmetic to be done while these are loaded

Each is checked before it is timed. Beside it stands what it takes with parts of its arithmetic left out, kernels whose
results mean nothing: without the arithmetic of scales, codes are taken for them; without decoding, words are multiplied
as they are. Copies, reads of words and x from shared memory, and products stay, so that what a call gets shorter is the
part's share of its time, as far as nothing else hides it. A loop of what is left may be unrolled. Appends to
benchmarks/results/<device>_quantized_ablation.csv.

Source: Li et al., "Enabling Fast 2-bit LLM on GPUs", 2023, asynchronous dequantization.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from benchmarks import rows, timing
from benchmarks.arguments import integers
from benchmarks.operations import OPERATIONS, Arguments, directed
from benchmarks.rows import AblationRow, number
from benchmarks.run import Truth, time_fastest
from benchmarks.table import markdown
from pallas_kernels.core import device as device_lib
from pallas_kernels.quantized_matmul import api, lanes
from pallas_kernels.quantized_matmul import config as config_lib
from pallas_kernels.quantized_matmul.lanes import Instructions, Word

OPERATION = OPERATIONS["quantized_matmul"]
SHAPES = [f"{layer}_mixed_2_4_m{M}" for M in (1, 8) for layer in ("llama2_7b_qkv", "llama2_70b_gate_up")]


def codes_as_scales(do: Instructions, stats: Sequence[Word], steps: Sequence[Word]) -> list[list[list[Word]]]:
    """In place of `lanes.scales`."""
    return [[[of_output, of_output, of_output, step] for of_output in stats] for step in steps]


def words_as_weights(do: Instructions, words: Sequence[Sequence[Word]], scales: Any, j: int) -> list[list[Word]]:
    """In place of `lanes.strip`. The four words of an output lie side by side as a load leaves them, and as a product
    takes the two outputs' of two pairs of inputs."""
    return [[words[p // 2 % 2][2 * (p % 2) + output] for p in range(8)] for output in range(2)]


# Part -> which function of lanes.py, and what takes its place. Without decoding nothing uses what `lanes.scales`
# returns, and the compiler drops that too.
LEFT_OUT: Mapping[str, tuple[str, Callable]] = {
    "scales": ("scales", codes_as_scales),
    "decoding": ("strip", words_as_weights),
}


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    out = options.out or rows.RESULTS / f"{rows.device_name()}_quantized_ablation.csv"
    print(f"{device_lib.current()}, jax {jax.__version__}, {options.timing} timing", flush=True)
    for shape in options.shapes:
        measured = list(ablate(shape, options.stages, options.timing, options.budget))
        print("\n".join(["", *table(measured)]), flush=True)
        rows.append(out, measured)
    print(f"Appended to {out}.")
    return 0


def ablate(name: str, stages: Sequence[int], method: str, budget: float) -> Iterator[AblationRow]:
    """Rows of one call. AssertionError where a result is wrong."""
    shape = OPERATION.shapes[name]
    arguments = shape.make("bfloat16", jax.random.key(0))
    truth = Truth(OPERATION, arguments, "forward", exact=not shape.large)
    usual = config_lib.heuristic(api.describe(**arguments), device_lib.current(), "mosaic_gpu")
    if not isinstance(usual, config_lib.MosaicGpuConfig):
        raise ValueError(f"{shape} takes {usual}, which has no such stages; choose one of at most 8 rows")
    for count in stages:
        without = {}
        for part in LEFT_OUT:
            # Traced within: a program of its own, with other instructions.
            call, arrays = directed(_running(dataclasses.replace(usual, stages=count)), arguments, "forward", ())
            with mock.patch.object(lanes, *LEFT_OUT[part]):
                t = timing.measure(call, arrays, method=method, budget=budget, rotate=OPERATION.memory_bound)
            without[part] = t.median
        for ahead in (False, True):
            call = _running(dataclasses.replace(usual, stages=count, scales_ahead=ahead))
            t = time_fastest(OPERATION, [(call, arguments)], "forward", truth, method, budget).median
            yield AblationRow(
                shape=name,
                stages=str(count),
                scales_ahead="yes" if ahead else "no",
                median_us=number(t * 1e6),
                gbs=number(arguments["weight"].nbytes / t / 1e9),
                **{f"{part}_us": number(seconds * 1e6) for part, seconds in without.items()},
                **{f"{part}_percent": number(100 * (1 - seconds / t), 3) for part, seconds in without.items()},
                **rows.environment(),
            )


def _running(config: config_lib.MosaicGpuConfig) -> Callable[[Arguments], jax.Array]:
    return lambda arguments: OPERATION.function(**arguments, implementation="mosaic_gpu", config=config)


def table(measured: Sequence[AblationRow]) -> list[str]:
    """Of one call, in Markdown."""
    header = ["stages", "scales ahead", "us", "GB/s", "times the first", "without scales", "without decoding"]
    cells = [
        [
            row.stages,
            row.scales_ahead,
            row.median_us,
            row.gbs,
            number(float(measured[0].median_us) / float(row.median_us), 3),
            f"{row.scales_us} ({row.scales_percent} % less)",
            f"{row.decoding_us} ({row.decoding_percent} % less)",
        ]
        for row in measured
    ]
    return [f"{measured[0].shape}:", *markdown(header, cells)]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantized_ablation", description="Loads and scales of quantized_matmul."
    )
    parser.add_argument(
        "--shapes", type=lambda text: text.split(","), default=SHAPES, help="default: " + ", ".join(SHAPES)
    )
    parser.add_argument("--stages", type=integers, default=[1, 2, 3, 4], help="default: 1,2,3,4")
    parser.add_argument("--timing", choices=timing.METHODS, default=timing.default_method())
    parser.add_argument("--budget", type=float, default=0.2, help="seconds of repetitions a time (default 0.2)")
    parser.add_argument("--out", type=Path, help="CSV; default: benchmarks/results/<device>_quantized_ablation.csv")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.shapes if name not in OPERATION.shapes]:
        parser.error(f"--shapes: unknown {', '.join(unknown)}; see pallas_kernels/quantized_matmul/shapes.py")
    return options


if __name__ == "__main__":
    sys.exit(main())
