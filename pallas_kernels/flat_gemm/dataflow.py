# SPDX-License-Identifier: Apache-2.0
r"""Measures where the three routes cross: python -m pallas_kernels.flat_gemm.dataflow --model=llama2_7b

Times routes A, B and C (routes.py) of each weight of a model, at 1 to 256 rows, on weights that are not in the cache;
prints where they cross, and writes that for `routes.choose` to find: in the user's cache, or where --device-table says.

    us    A --------___
          B ---------- \ ---------____          M1: B is faster than A, here and at the next number of rows
          C =====================     \____     M2: C is faster than the better of both, here and at the next
                       M1        M2

Source: Hong et al., "FlashDecoding++", 2023, section 5. Two rows in a row are ours, as is that C is compared with the
better of A and B from one row on, so that no M runs what was slower than the library twice.
"""

import argparse
import functools
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core import device as device_lib
from pallas_kernels.core import dispatch, timing, tolerance, tuning
from pallas_kernels.core.arrays import arrays_of, with_arrays
from pallas_kernels.flat_gemm import config as config_lib
from pallas_kernels.flat_gemm import reference, routes
from pallas_kernels.flat_gemm.api import describe, flat_gemm
from pallas_kernels.flat_gemm.routes import MOST_ROWS, MOST_VECTOR_ROWS, Crossings
from pallas_kernels.flat_gemm.shapes import MODELS, Shape

ROUTES = ("A", "B", "C")
ROWS = (1, 2, 3, 4, 8, 16, 32, 64, 128, MOST_ROWS)
CHECKED = 64  # output features at either end of a weight

# (route, M) -> seconds; infinity where the route does not take the call.
Timer = Callable[[str, int], float]
# Route -> M -> seconds, as a Timer tells.
Curves = Mapping[str, Mapping[int, float]]


def crossings(curves: Curves) -> Crossings:
    """M1 and M2 of measured curves: a challenger has to win at two numbers of rows in a row."""
    a, b, c = (curves[route] for route in ROUTES)
    rows = sorted(c)
    return Crossings(
        _first_of_two(rows, [b[M] < a[M] for M in rows], beyond=False),
        # More rows than MOST_ROWS are C's alone, so that a win at the last number of rows counts.
        _first_of_two(rows, [c[M] < min(a[M], b[M]) for M in rows], beyond=True),
    )


def _first_of_two(rows: Sequence[int], wins: Sequence[bool], beyond: bool) -> int:
    both = (M for M, here, there in zip(rows, wins, [*wins[1:], beyond], strict=True) if here and there)
    return next(both, MOST_ROWS + 1)


def loss(curves: Curves, found: Crossings) -> float:
    """What two numbers cost where curves cross more than once: the most by which a chosen route is slower than the
    fastest, as a fraction of that."""
    rows = curves["C"]
    return max(curves[found.route(M)][M] / min(curve[M] for curve in curves.values()) - 1 for M in rows)


def time_routes(shape: Shape, dtype: Any, *, method: str | None = None, budget: float = 0.1) -> Timer:
    """A timer of one weight on this device: medians of what the library would run, checked against the reference."""
    weight = shape.make(dtype, jax.random.key(0))["w"]

    def seconds(route: str, M: int) -> float:
        if route == "A" and M > MOST_VECTOR_ROWS:
            return math.inf
        one = Shape(M, shape.N, shape.K, shape.transpose_w)
        rows = jax.random.normal(jax.random.key(M), (M, shape.K)).astype(weight.dtype)
        arguments = {**one.abstract(dtype), "x": rows, "w": weight}
        name = routes.implementations(device_lib.current()).get(route)
        if name is None:
            return math.inf
        choice = dispatch.choose(describe(**arguments), name, record=False)
        if choice.implementation is None:
            return math.inf
        config = None if route == "C" else _config(choice, route)
        call = functools.partial(flat_gemm, implementation=choice.name, config=config)

        def run(*arrays: jax.Array) -> jax.Array:
            return call(**with_arrays(arguments, arrays))

        arrays = arrays_of(arguments)
        if route != "C":
            _check(jax.jit(run)(*arrays), rows, weight, shape.transpose_w, f"route {route}, M={M}, {config}")
        return timing.measure(run, arrays, method=method, budget=budget, rotate=True).median

    return seconds


def _config(choice: dispatch.Choice, route: str) -> config_lib.Config:
    """As the public function finds it, for a route that the call may not take yet."""
    guess = config_lib.for_route(choice.call, choice.device, route)
    return tuning.resolve(choice, type(guess), lambda *_: guess)


def _check(actual: jax.Array, x: jax.Array, w: jax.Array, transpose_w: bool, what: str) -> None:
    """AssertionError if the error is not normal: what is wrong must not win. Looks at both ends of the features."""
    ends = np.r_[:CHECKED, actual.shape[1] - CHECKED : actual.shape[1]]
    arguments = {"x": x, "w": w[ends] if transpose_w else w[:, ends], "transpose_w": transpose_w}
    with jax.default_matmul_precision("highest"):
        expected = reference.specified(arguments)
    tolerance.assert_normal(actual[:, ends], expected, reference.naively(arguments), what)


def profile(timer: Timer, rows: Iterable[int] = ROWS, progress: Callable = iter) -> Curves:
    """Times every route at every number of rows. `progress` gets the points, and gives them back one by one."""
    points = [(route, M) for route in ROUTES for M in rows]
    curves: dict[str, dict[int, float]] = {route: {} for route in ROUTES}
    for route, M in progress(points):
        curves[route][M] = timer(route, M)
    return curves


def entry(curves: Curves) -> dict[str, Any]:
    """What the table keeps of one weight: the crossings, and the curves in microseconds, so that a curve that crosses
    more than once can be seen."""
    found = crossings(curves)
    measured = {
        route: {str(M): float(f"{seconds * 1e6:.4g}") for M, seconds in curve.items() if seconds < math.inf}
        for route, curve in curves.items()
    }
    return {"M1": found.M1, "M2": found.M2, "us": measured, "jax": jax.__version__}


def curves_of(stored: Mapping[str, Any]) -> Curves:
    """The curves of a table's entry, in seconds."""
    measured = {route: {int(M): us / 1e6 for M, us in curve.items()} for route, curve in stored["us"].items()}
    rows = measured["C"]
    return {route: {M: curve.get(M, math.inf) for M in rows} for route, curve in measured.items()}


def store(file: Path, part: str, weights: Mapping[tuple[int, int], Mapping[str, Any]]) -> None:
    """Adds entries to a table, which is replaced at once."""
    table = dict(tuning.read_table(file))
    table[part] = {**table.get(part, {}), **{f"{N},{K}": dict(stored) for (N, K), stored in weights.items()}}
    tuning.write_table(file, table)


def report(name: str, N: int, K: int, curves: Curves) -> Iterator[str]:
    """Lines of one weight: crossings, and the curves below."""
    found = crossings(curves)
    shown = [str(M) if M <= MOST_ROWS else f"> {MOST_ROWS}" for M in (found.M1, found.M2)]
    yield f"{name} [N={N}, K={K}]  M1 = {shown[0]}  M2 = {shown[1]}  (alone they would lose {loss(curves, found):.1%})"
    yield "  M   " + "".join(f"{M:>10}" for M in curves["C"])
    for route, curve in curves.items():
        cells = (f"{seconds * 1e6:.4g}" if seconds < math.inf else "-" for seconds in curve.values())
        yield f"  {route} us" + "".join(f"{cell:>10}" for cell in cells)


def main(argv: Sequence[str] | None = None, timers: Callable[..., Timer] = time_routes) -> int:
    options = _parse(argv)
    device, dtype = device_lib.current(), options.dtype
    file = options.device_table or tuning.cache_folder() / routes.table_name(device)
    print(f"{device}, jax {jax.__version__}, {dtype}, {options.timing} timing", flush=True)
    for name, (N, K) in options.weights.items():
        shape = Shape(1, N, K, options.orientation == "NK")
        timer = timers(shape, dtype, method=options.timing, budget=options.budget)
        curves = profile(timer, ROWS, functools.partial(_progress, name))
        print("\n".join(report(name, N, K, curves)), flush=True)
        # Kept weight by weight: what was measured is not lost with a run that is cut short.
        store(file, routes.key(dtype, shape.transpose_w), {(N, K): entry(curves)})
    print(f"Written to {file}.")
    return 0


def _progress(name: str, points: Sequence[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """A bar where tqdm is installed, as it is for the scripts; else a line a point."""
    try:
        from tqdm import tqdm
    except ImportError:
        for number, (route, M) in enumerate(points, 1):
            print(f"  {name}: {number} of {len(points)}, route {route}, M={M}", file=sys.stderr, flush=True)
            yield route, M
    else:
        yield from tqdm(points, desc=name, leave=False)


def _weights(text: str) -> dict[str, tuple[int, int]]:
    """ "4096x11008,4096x4096" -> weights by name."""
    found = {part: re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part) for part in text.split(",")}
    if wrong := [part for part, match in found.items() if match is None]:
        raise argparse.ArgumentTypeError(f"a weight is NxK, as 4096x11008, not {', '.join(wrong)}")
    return {part: (int(match[1]), int(match[2])) for part, match in found.items() if match}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    on_cpu = device_lib.current().platform == "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.flat_gemm.dataflow", description="Measures where the routes of flat_gemm cross."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", choices=sorted(MODELS), help="whose weights to measure")
    what.add_argument("--weights", type=_weights, help="or which, as NxK,NxK")
    parser.add_argument("--orientation", choices=("NK", "KN"), default="NK", help="NK: transpose_w (default)")
    parser.add_argument(
        "--dtype", default="float32" if on_cpu else "bfloat16", help="default: bfloat16, on a CPU float32"
    )
    parser.add_argument("--timing", choices=timing.METHODS, default=timing.default_method())
    parser.add_argument("--budget", type=float, default=0.1, help="seconds of repetitions a point (default 0.1)")
    parser.add_argument("--device-table", type=Path, help="JSON file to add to; default: the user's cache")
    options = parser.parse_args(argv)
    options.dtype = jnp.dtype(options.dtype).name
    options.weights = options.weights or MODELS[options.model]
    return options


if __name__ == "__main__":
    sys.exit(main())
