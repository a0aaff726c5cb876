# SPDX-License-Identifier: Apache-2.0
"""Times operations beside their baselines, after checking that both are right.

    python -m benchmarks.run flash_attention
    python -m benchmarks.run flash_attention --shapes=d128_causal_8k,gqa_32_8_8k --implementations=auto,xla,cudnn \\
        --dtype=bfloat16 --direction=forward,forward_backward

Prints a row as soon as it is measured, and appends all to benchmarks/results/<device>.csv (`--out` names another).
`python -m benchmarks.table` and `python -m benchmarks.plot` make the README's tables and the pictures of it.
"""

import argparse
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from benchmarks import rows, timing
from benchmarks.baselines import BASELINES, Arguments, Candidate, Unavailable
from benchmarks.operations import OPERATIONS, Operation, directed, is_array
from benchmarks.rows import Row, number
from pallas_kernels import UnsupportedError
from pallas_kernels.core import device as device_lib
from pallas_kernels.core import tolerance
from pallas_kernels.core.dispatch import IMPLEMENTATIONS

DIRECTIONS = ("forward", "forward_backward")


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    operation = OPERATIONS[options.op]
    out = options.out or rows.RESULTS / f"{rows.device_name()}.csv"
    print(f"{device_lib.current()}, jax {jax.__version__}, {options.timing} timing")
    failures = 0
    for shape in options.shapes:
        for dtype in options.dtype:
            for direction in options.direction:
                measured, wrong = measure_call(
                    options.op,
                    operation,
                    shape,
                    dtype,
                    direction,
                    options.implementations,
                    method=options.timing,
                    budget=options.budget,
                )
                failures += wrong
                rows.append(out, measured)
    print(f"Appended to {out}.")
    return 1 if failures else 0


def measure_call(
    op: str,
    operation: Operation,
    shape_name: str,
    dtype: str,
    direction: str,
    implementations: Sequence[str],
    *,
    method: str,
    budget: float = 1.0,
) -> tuple[list[Row], int]:
    """Rows of one call, one for each implementation and baseline that runs it, and how many were wrong.

    What refuses the call is reported and left out. What gives a wrong answer is reported and not timed.
    """
    shape = operation.shapes[shape_name]
    arguments = shape.make(jnp.dtype(dtype), jax.random.key(0))
    print(f"\n{op} {shape_name} {dtype} {direction}")
    truth = Truth(operation, arguments, direction, exact=not shape.large)
    timings: dict[str, timing.Timing] = {}
    wrong = 0
    for requested in implementations:
        name = requested
        try:
            candidates = _candidates(op, operation, requested, arguments, direction)
            if requested == "auto":
                name = _chosen(operation, arguments)
            if name in timings:
                continue
            timings[name] = _best(operation, candidates, direction, truth, method, budget)
        except (Unavailable, UnsupportedError) as refusal:
            print(f"  {name:16} not run: {' '.join(str(refusal).split())}")
            continue
        except AssertionError as error:
            print(f"  {name:16} WRONG: {error}")
            wrong += 1
            continue
        print(f"  {name:16} {timings[name].median * 1e6:12.1f} us  +- {timings[name].spread:.1%}")
    make = RowMaker(op, operation, shape_name, shape, dtype, direction, arguments)
    baselines = {name: t for name, t in timings.items() if name in BASELINES.get(op, {})}
    best = min(baselines, key=lambda name: baselines[name].median, default=None)
    measured = []
    for name, t in timings.items():
        reference = (best, baselines[best]) if best and name not in baselines else None
        measured.append(make(name, t, reference))
        if reference:
            print(f"  {name:16} is {measured[-1].ratio} times as fast as {best}")
    return measured, wrong


def _candidates(op: str, operation: Operation, name: str, arguments: Arguments, direction: str) -> list[Candidate]:
    if name in BASELINES.get(op, {}):
        return BASELINES[op][name](arguments, direction)
    return [(functools.partial(_by_name, operation, implementation=name), arguments)]


def _chosen(operation: Operation, arguments: Arguments) -> str:
    """The file that "auto" runs for the forward pass."""
    name = pallas_kernels.explain(operation.function, **arguments)[0].implementation
    if name is None:
        raise Unavailable("no implementation takes this call")
    return name


def _best(
    operation: Operation,
    candidates: list[Candidate],
    direction: str,
    truth: "Truth",
    method: str,
    budget: float,
) -> timing.Timing:
    """The fastest of the candidates that fit the device; the reason if none does."""
    timings, refusals = [], []
    for function, arguments in candidates:
        call, arrays = directed(function, arguments, direction, operation.differentiable)
        try:
            outputs = jax.block_until_ready(jax.jit(call)(*arrays))
        except UnsupportedError:
            raise
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            if not _is_resource_limit(error):
                raise
            refusals.append(str(error).splitlines()[0])
            continue
        truth.check(outputs)
        timings.append(timing.measure(call, arrays, method=method, budget=budget, rotate=operation.memory_bound))
    if not timings:
        raise Unavailable("; ".join(refusals))
    return min(timings, key=lambda t: t.median)


def _is_resource_limit(error: Exception) -> bool:
    """Out of memory, or a tile that does not fit shared memory: a fact about the candidate, not a bug."""
    text = str(error)
    return any(words in text for words in ("RESOURCE_EXHAUSTED", "shared memory", "out of memory", "Out of memory"))


def _by_name(operation: Operation, arguments: Arguments, implementation: str) -> jax.Array:
    return operation.function(**arguments, implementation=implementation)


def _cast(arguments: Arguments, dtype: Any) -> Arguments:
    """The floating-point arrays in another precision."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if is_array(x) and jnp.issubdtype(x.dtype, jnp.floating) else x, arguments
    )


class Truth:
    """What a call must return, with the error that the naive way makes, by core/tolerance.py.

    The specification takes quadratic memory. Where that does not fit (`exact=False`), `xla`, which the conformance
    suite holds to it, takes its place, and `xla` in the call's own precision that of the naive way.
    """

    def __init__(self, operation: Operation, arguments: Arguments, direction: str, *, exact: bool):
        dtype = arguments[operation.differentiable[0]].dtype
        xla = functools.partial(_by_name, operation, implementation="xla")
        expected, naive = (operation.specification, operation.naive) if exact else (xla, xla)
        double = exact or dtype == jnp.float32
        # On GPUs and TPUs "float32" products are rounded to less, unless told otherwise.
        with jax.enable_x64(double), jax.default_matmul_precision("highest"):
            wide = _cast(arguments, jnp.float64 if double else jnp.float32)
            self.expected = self._run(operation, expected, wide, direction)
        self.naive = self._run(operation, naive, arguments, direction)

    @staticmethod
    def _run(operation: Operation, function: Any, arguments: Arguments, direction: str) -> list[jax.Array]:
        call, arrays = directed(function, arguments, direction, operation.differentiable)
        return jax.tree.leaves(jax.jit(call)(*arrays))

    def check(self, outputs: Any) -> None:
        """AssertionError unless the error of every output is normal."""
        names = ["output", *(f"gradient {i}" for i in range(len(self.expected) - 1))]
        triples = zip(jax.tree.leaves(outputs), self.expected, self.naive, strict=True)
        for name, (actual, expected, naive) in zip(names, triples, strict=True):
            tolerance.assert_normal(actual, expected, naive, name)


class RowMaker:
    """Turns timings of one call into rows."""

    def __init__(
        self,
        op: str,
        operation: Operation,
        shape_name: str,
        shape: Any,
        dtype: str,
        direction: str,
        arguments: Arguments,
    ):
        self._fields = {
            "op": op,
            "shape": shape_name,
            "direction": direction,
            "mask": shape.mask_name,
            "dtype": dtype,
            **rows.environment(),
        }
        self._flops = shape.flops(direction)
        self._bytes = _bytes(operation, arguments, direction)
        device = device_lib.current()
        peak, bandwidth = device.peak_flops(dtype), device.memory_bandwidth
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
    parser.add_argument("--shapes", type=_names, help="comma-separated; default: the large, on a CPU the others")
    parser.add_argument("--implementations", type=_names, help='"auto", ours and baselines; default: all')
    parser.add_argument("--dtype", type=_names, help="default: bfloat16, on a CPU float32")
    parser.add_argument("--direction", type=_names, default=list(DIRECTIONS), help="default: both")
    parser.add_argument("--timing", choices=timing.METHODS, help="default: cupti on a GPU, else wall")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of repetitions a row (default 1)")
    parser.add_argument("--out", type=Path, help="CSV file; default: benchmarks/results/<device>.csv")
    options = parser.parse_args(argv)

    operation, on_cpu = OPERATIONS[options.op], device_lib.current().platform == "cpu"
    options.shapes = options.shapes or [n for n, s in operation.shapes.items() if s.large != on_cpu]
    options.dtype = options.dtype or ["float32" if on_cpu else "bfloat16"]
    options.timing = options.timing or timing.default_method()
    baselines = list(BASELINES.get(options.op, {}))
    options.implementations = options.implementations or ["auto", "xla", *baselines]
    known = {"shapes": operation.shapes, "implementations": ("auto", *IMPLEMENTATIONS, *baselines)}
    known["direction"] = DIRECTIONS
    for option, values in known.items():
        if unknown := [name for name in getattr(options, option) if name not in values]:
            parser.error(f"--{option}: unknown {', '.join(unknown)}; known: {', '.join(values)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
