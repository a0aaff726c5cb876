# SPDX-License-Identifier: Apache-2.0
"""Times operations beside their baselines, after checking that both are right.

    python -m benchmarks.run flash_attention
    python -m benchmarks.run flash_attention --shapes='d128_causal_*,packed_16k' --implementations=auto,xla,cudnn \\
        --dtype=bfloat16 --direction=forward,forward_backward

An implementation's name may end in "@sm80" or another architecture, or in "@A" or "@B", a route of flat_gemm: its
kernels for that one run, if they can here.
Prints a row as soon as it is measured, and appends all to benchmarks/results/<device>.csv (`--out` names another).
`python -m benchmarks.table` and `python -m benchmarks.plot` make the README's tables and the pictures of it.
"""

import argparse
import dataclasses
import fnmatch
import functools
import math
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from benchmarks import rows, timing
from benchmarks.baselines import BASELINES, Candidate, External, Unavailable
from benchmarks.operations import (
    EVERYTHING,
    OPERATIONS,
    Arguments,
    Operation,
    Sample,
    cotangent_like,
    directed,
    output_of,
)
from benchmarks.rows import Row, number
from pallas_kernels import UnsupportedError
from pallas_kernels.core import device as device_lib
from pallas_kernels.core import tolerance
from pallas_kernels.core.arrays import is_array
from pallas_kernels.core.dispatch import IMPLEMENTATIONS
from pallas_kernels.flash_attention import tiles
from pallas_kernels.quantized_matmul.weights import IntWeight, MixedBitWeight

DIRECTIONS = ("forward", "forward_backward")
QUANTIZED = (MixedBitWeight, IntWeight)
TILE = 128  # edge of the tiles that are counted
# Not measured on a GPU unless named: too slow for long rows, or of interest for older GPUs only.
ON_REQUEST = ("jax_xla", "torch_flash")


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    operation = OPERATIONS[options.op]
    out = options.out or rows.RESULTS / f"{rows.device_name()}.csv"
    print(f"{device_lib.current()}, jax {jax.__version__}, {options.timing} timing")
    failures = 0
    for shape in options.shapes:
        for dtype in options.dtype:
            call = Measured(options.op, operation, shape, dtype, tuple(options.direction))
            for direction in options.direction:
                measured, wrong = measure_call(
                    call, direction, options.implementations, method=options.timing, budget=options.budget
                )
                failures += wrong
                rows.append(out, measured)
    print(f"Appended to {out}.")
    return 1 if failures else 0


@dataclasses.dataclass
class Measured:
    """One call to measure: its arguments and what it must return, made once for all directions.

    Attributes:
      op, shape_name, dtype: what the rows call it.
      operation: what to run.
      directions: those that will be measured.
    """

    op: str
    operation: Operation
    shape_name: str
    dtype: str
    directions: tuple[str, ...] = DIRECTIONS

    @functools.cached_property
    def shape(self) -> Any:
        return self.operation.shapes[self.shape_name]

    @functools.cached_property
    def arguments(self) -> Arguments:
        return self.shape.make(jnp.dtype(self.dtype), jax.random.key(0))

    @functools.cached_property
    def truth(self) -> "Truth":
        """What the call must return; what is known of both passes serves for the forward pass, too."""
        direction = "forward_backward" if "forward_backward" in self.directions else "forward"
        return Truth(self.operation, self.arguments, direction, exact=not self.shape.large)

    @property
    def tile_counts(self) -> str:
        """How many tiles the mask leaves empty, mixed and full, for the head line of the call; "" without a mask."""
        mask = self.arguments.get("mask")
        if mask is None:
            return ""
        B, T, S, N = (getattr(self.shape, letter) for letter in "BTSN")
        counts = tiles.count(mask, T, S, TILE, TILE, B=B, N=N)
        live = 1 - counts["empty"] / sum(counts.values())
        listed = ", ".join(f"{n} {name}" for name, n in counts.items())
        return f", tiles of {TILE} x {TILE}: {listed}, {live:.1%} live"


def measure_call(
    call: Measured, direction: str, implementations: Sequence[str], *, method: str, budget: float = 1.0
) -> tuple[list[Row], int]:
    """Rows of one call, one for each implementation and baseline that runs it, and how many of ours were wrong.

    What refuses the call is reported and left out. What gives a wrong answer, or fails, is reported and not timed.
    """
    op, operation = call.op, call.operation
    print(f"\n{op} {call.shape_name} {call.dtype} {direction}{call.tile_counts}")
    timings: dict[str, timing.Timing] = {}
    wrong = 0
    for requested in implementations:
        name, ours = requested, requested not in BASELINES.get(op, {})
        try:
            candidates = _candidates(call, requested, direction)
            if requested == "auto":
                name = _chosen(call, direction)
            if name in timings:
                continue
            timings[name] = time_fastest(operation, candidates, direction, call.truth, method, budget)
        except (Unavailable, UnsupportedError) as refusal:
            print(f"  {name:16} not run: {' '.join(str(refusal).split())}")
        except AssertionError as error:
            print(f"  {name:16} WRONG: {error}")
            wrong += ours
        except Exception as error:
            # One that breaks must not take the others' measurements with it.
            print(f"  {name:16} FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
            if ours:
                traceback.print_exc()
            wrong += ours
        else:
            print(f"  {name:16} {timings[name].median * 1e6:12.1f} us  +- {timings[name].spread:.1%}", flush=True)
    make = RowMaker(call, direction)
    baselines = {name: t for name, t in timings.items() if name in BASELINES.get(op, {})}
    best = min(baselines, key=lambda name: baselines[name].median, default=None)
    measured = []
    for name, t in timings.items():
        reference = (best, baselines[best]) if best and name not in baselines else None
        measured.append(make(name, t, reference))
        ratios = [f"{b.median / t.median:.3f} x {other}" for other, b in baselines.items() if name not in baselines]
        print(f"  {name:16} {measured[-1].tflops:>8} TFLOP/s  {', '.join(ratios)}", flush=True)
    return measured, wrong


def _candidates(call: Measured, name: str, direction: str) -> list[Candidate]:
    if name in BASELINES.get(call.op, {}):
        return BASELINES[call.op][name](call.arguments, direction)
    implementation, _, variant = name.partition("@")
    options = {}
    if variant:
        if call.operation.config is None:
            raise Unavailable(f"{call.op} has no kernels for {variant} alone")
        options = {"config": call.operation.config(call.arguments, implementation, variant)}
    return [(functools.partial(_by_name, call.operation, implementation=implementation, **options), call.arguments)]


def _chosen(call: Measured, direction: str) -> str:
    """The file that "auto" runs; both, if the passes are run by two."""
    choices = pallas_kernels.explain(call.operation.function, **call.arguments)
    names = dict.fromkeys(choice.implementation for choice in choices if choice.call.direction in direction)
    if not names or None in names:
        raise Unavailable("no implementation takes this call")
    return "+".join(str(name) for name in names)


def time_fastest(
    operation: Operation, candidates: list[Candidate], direction: str, truth: "Truth", method: str, budget: float
) -> timing.Timing:
    """The fastest of the candidates that fit the device; the reason if none does.

    Raises:
      AssertionError: one of them is wrong.
      Unavailable: none fits.
    """
    timings, refusals = [], []
    for candidate in candidates:
        try:
            timings.append(_time(operation, candidate, direction, truth, method, budget))
        except UnsupportedError:
            raise
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            if not _is_resource_limit(error):
                raise
            refusals.append(str(error).splitlines()[0])
    if not timings:
        raise Unavailable("; ".join(refusals))
    return min(timings, key=lambda t: t.median)


def _time(
    operation: Operation, candidate: Candidate, direction: str, truth: "Truth", method: str, budget: float
) -> timing.Timing:
    if isinstance(candidate, External):
        truth.check(candidate.outputs())
        return candidate.measure(budget)
    function, arguments = candidate
    call, arrays = directed(function, arguments, direction, operation.differentiable)
    compiled = jax.jit(call).lower(*arrays).compile()
    truth.check(jax.block_until_ready(compiled(*arrays)))
    if operation.memory_bound:
        return timing.measure(call, arrays, method=method, budget=budget, rotate=True)
    return timing.measure(compiled, arrays, method=method, budget=budget)


def _is_resource_limit(error: Exception) -> bool:
    """Out of memory, or a tile that does not fit shared memory: a fact about the candidate, not a bug."""
    text = str(error)
    return any(words in text for words in ("RESOURCE_EXHAUSTED", "shared memory", "out of memory", "Out of memory"))


def _by_name(operation: Operation, arguments: Arguments, implementation: str, **options: Any) -> jax.Array:
    return operation.function(**arguments, implementation=implementation, **options)


def _cast(arguments: Arguments, dtype: Any) -> Arguments:
    """The floating-point arrays in another precision, but for those inside a quantized weight."""

    def cast(x: Any) -> Any:
        return x.astype(dtype) if is_array(x) and jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, arguments, is_leaf=lambda x: isinstance(x, QUANTIZED))


# Both run once: what XLA would spend on looking for the fastest matrix product is longer than the slowest takes.
_RUN_ONCE = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


class Truth:
    """What a call must return, with the error that the naive way makes, by core/tolerance.py.

    The specification takes quadratic memory. Where that does not fit (`exact=False`), it is asked for the samples of
    the call that the operation names: parts of the outputs that depend on a part of the inputs.
    """

    def __init__(self, operation: Operation, arguments: Arguments, direction: str, *, exact: bool):
        everything = Sample("", arguments, EVERYTHING, (EVERYTHING,) * len(operation.differentiable))
        self.samples = [everything] if exact else operation.samples(arguments)
        self.expected: list[list[jax.Array]] = []
        self.naive: list[list[jax.Array]] = []
        output = output_of(functools.partial(_by_name, operation, implementation="xla"), arguments)
        double = exact or output.dtype == jnp.float32
        whole = cotangent_like(output.shape)
        for sample in self.samples:
            cotangent = whole[sample.output]
            # On GPUs and TPUs "float32" products are rounded to less, unless told otherwise.
            with jax.enable_x64(double), jax.default_matmul_precision("highest"):
                wide = _cast(sample.arguments, jnp.float64 if double else jnp.float32)
                self.expected.append(self._run(operation, operation.specification, wide, direction, cotangent))
            self.naive.append(self._run(operation, operation.naive, sample.arguments, direction, cotangent))

    @staticmethod
    def _run(
        operation: Operation, function: Any, arguments: Arguments, direction: str, cotangent: jax.Array
    ) -> list[jax.Array]:
        call, arrays = directed(function, arguments, direction, operation.differentiable, cotangent)
        return jax.tree.leaves(jax.jit(call).lower(*arrays).compile(_RUN_ONCE)(*arrays))

    def check(self, outputs: Any) -> None:
        """AssertionError unless the error of every output is normal; gradients may be absent."""
        leaves = jax.tree.leaves(outputs)
        names = ["output", *(f"gradient {i}" for i in range(len(leaves) - 1))]
        for sample, expected, naive in zip(self.samples, self.expected, self.naive, strict=True):
            parts = (sample.output, *sample.gradients)
            for name, actual, part, wanted, usual in zip(names, leaves, parts, expected, naive, strict=False):
                if part is not None:
                    where = f" ({sample.name})" if sample.name else ""
                    tolerance.assert_normal(actual[part], wanted, usual, f"{name}{where}")


class RowMaker:
    """Turns timings of one call into rows."""

    def __init__(self, call: Measured, direction: str):
        self._fields = {
            "op": call.op,
            "shape": call.shape_name,
            "direction": direction,
            "mask": call.shape.mask_name,
            "dtype": call.dtype,
            **rows.environment(),
        }
        self._flops = call.shape.flops(direction, call.arguments.get("mask"))
        self._bytes = _bytes(call.operation, call.arguments, direction)
        device = device_lib.current()
        peak, bandwidth = device.peak_flops(call.dtype), device.memory_bandwidth
        self._roofline = None
        if peak and bandwidth:
            self._roofline = max(self._flops / peak, self._bytes / bandwidth)

    def __call__(self, implementation: str, t: timing.Timing, baseline: tuple[str, timing.Timing] | None) -> Row:
        percent = 100 * self._roofline / t.median if self._roofline else None
        return Row(
            **self._fields,
            implementation=implementation,
            median_us=number(t.median * 1e6),
            spread=number(t.spread, 2),
            tflops=number(self._flops / t.median / 1e12),
            gbs=number(self._bytes / t.median / 1e9),
            percent_peak=number(percent, 3),
            baseline=baseline[0] if baseline else "",
            ratio=number(baseline[1].median / t.median, 3) if baseline else "",
            timing=t.method,
        )


def _bytes(operation: Operation, arguments: Arguments, direction: str) -> int:
    """Inputs and outputs once each; with the backward pass also the cotangent and the gradients."""
    call, arrays = directed(
        functools.partial(_by_name, operation, implementation="xla"), arguments, direction, operation.differentiable
    )
    outputs = jax.tree.leaves(jax.eval_shape(call, *arrays))
    return sum(x.nbytes for x in arrays) + sum(math.prod(x.shape) * x.dtype.itemsize for x in outputs)


def _names(text: str) -> list[str]:
    return text.split(",")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description="Times operations beside their baselines."
    )
    parser.add_argument("op", choices=sorted(OPERATIONS))
    parser.add_argument(
        "--shapes", type=_names, help="comma-separated, * and ? match; default: the large, on a CPU the others"
    )
    parser.add_argument(
        "--implementations", type=_names, help='"auto", ours and baselines; default: "auto" and baselines'
    )
    parser.add_argument("--dtype", type=_names, help="default: bfloat16, on a CPU float32")
    parser.add_argument("--direction", type=_names, help="default: both, if it has a gradient")
    parser.add_argument("--timing", choices=timing.METHODS, help="default: cupti on a GPU, else wall")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of repetitions a row (default 1)")
    parser.add_argument("--out", type=Path, help="CSV file; default: benchmarks/results/<device>.csv")
    options = parser.parse_args(argv)

    operation, on_cpu = OPERATIONS[options.op], device_lib.current().platform == "cpu"
    options.shapes = _match(options.shapes, operation.shapes) if options.shapes else _default_shapes(operation, on_cpu)
    options.direction = options.direction or list(DIRECTIONS if operation.differentiable else DIRECTIONS[:1])
    options.dtype = options.dtype or ["float32" if on_cpu else "bfloat16"]
    options.timing = options.timing or timing.default_method()
    baselines = list(BASELINES.get(options.op, {}))
    if not options.implementations:
        options.implementations = ["auto", *(name for name in baselines if on_cpu or name not in ON_REQUEST)]
    named = [name.partition("@")[0] for name in options.implementations]
    known = {
        "shapes": (options.shapes, operation.shapes),
        "implementations": (named, ("auto", *IMPLEMENTATIONS, *baselines)),
        "direction": (options.direction, DIRECTIONS),
    }
    for option, (given, values) in known.items():
        if unknown := [name for name in given if name not in values]:
            parser.error(f"--{option}: unknown {', '.join(unknown)}; known: {', '.join(values)}")
    return options


def _match(patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that each pattern matches, in its order; a pattern that matches none stays, to be complained of."""
    matches = [fnmatch.filter(names, pattern) or [pattern] for pattern in patterns]
    return list(dict.fromkeys(name for found in matches for name in found))


def _default_shapes(operation: Operation, on_cpu: bool) -> list[str]:
    return [name for name, shape in operation.shapes.items() if shape.large != on_cpu]


if __name__ == "__main__":
    sys.exit(main())
