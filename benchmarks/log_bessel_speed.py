# SPDX-License-Identifier: Apache-2.0
"""How many log I_v(x) and log K_v(x) a second, beside TensorFlow Probability (if installed) and SciPy.

    python -m benchmarks.log_bessel_speed                                           on a GPU
    taskset -c 0 python -m benchmarks.log_bessel_speed --implementations=xla,scipy  on one core of a CPU

Logarithmically uniform orders and arguments, by region:

    small   v, x from 0.01 to 30      large   v, x from 100 to 5000
    mid     v, x from 1 to 300        vmf     v from 63 to 2047, x from 1 to 1e5      all   a quarter of each

"sorted" by sqrt(v^2 + x^2), so that neighbors need the same expressions, or "shuffled". Each implementation is checked
first, against the specification in float64. Rows go to benchmarks/results/<device>_log_bessel.csv.
"""

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from benchmarks import rows, timing
from benchmarks.arguments import some_of
from benchmarks.rows import BesselRow, number
from pallas_kernels import UnsupportedError, log_iv, log_kv

Points = tuple[np.ndarray, np.ndarray]
REGIONS = {
    "small": ((0.01, 30), (0.01, 30)),
    "mid": ((1, 300), (1, 300)),
    "large": ((100, 5000), (100, 5000)),
    "vmf": ((63, 2047), (1, 1e5)),
}
FUNCTIONS = {"log I": log_iv, "log K": log_kv}
IMPLEMENTATIONS = ("mosaic_gpu", "mosaic_tpu", "xla", "tfp", "scipy")
BASELINES = ("tfp", "scipy")


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    out = options.out or rows.RESULTS / f"{rows.device_name()}_log_bessel.csv"
    with jax.enable_x64(True):
        for dtype in options.dtypes:
            rows.append(out, limits(dtype, options.elements))
            for region in options.regions:
                for order in options.orders:
                    points = draw(region, order, options.elements, dtype)
                    for function in FUNCTIONS:
                        rows.append(out, measure(function, region, order, points, options.implementations))
    return 0


def draw(region: str, order: str, elements: int, dtype: str) -> Points:
    random = np.random.default_rng(0)
    parts = list(REGIONS) if region == "all" else [region]
    drawn = [
        [np.exp(random.uniform(np.log(low), np.log(high), elements // len(parts))) for low, high in REGIONS[part]]
        for part in parts
    ]
    v, x = (np.concatenate(arrays) for arrays in zip(*drawn, strict=True))
    places = np.argsort(np.hypot(v, x)) if order == "sorted" else random.permutation(len(v))
    return v[places].astype(dtype), x[places].astype(dtype)


def limits(dtype: str, elements: int) -> list[BesselRow]:
    """How many exponentials and logarithms this device has a second: what is made of a few of them has no more."""
    x = jnp.asarray(draw("small", "shuffled", elements, dtype)[1])
    made = []
    for name, function in (("exp", jnp.exp), ("log", jnp.log)):
        made.append(_row(name, "small", "shuffled", dtype, "xla", elements, timing.measure(function, [x])))
        print(f"{name}, {dtype}: {made[-1].melements} M/s", flush=True)
    return made


def measure(function: str, region: str, order: str, points: Points, implementations: Sequence[str]) -> list[BesselRow]:
    """Rows of what runs this; what does not is said, and left out."""
    v, _ = points
    print(f"\n{function}, {region}, {order}, {v.dtype}, {len(v)} elements", flush=True)
    times: dict[str, timing.Timing] = {}
    for name in implementations:
        try:
            if name == "scipy":
                times[name] = time_scipy(function, points)
            else:
                program = compiled(function, name, str(v.dtype), len(v))
                arrays = [jnp.asarray(a) for a in points]
                check(program(*arrays), function, points, single=1e-4 if name in BASELINES else 1e-6)
                times[name] = timing.measure(program, arrays)
        except (UnsupportedError, ImportError, RuntimeError) as refusal:
            print(f"  {name:12} not run: {' '.join(str(refusal).split())}", flush=True)
            continue
        print(f"  {name:12} {1e-6 * len(v) / times[name].median:10.1f} M/s  +- {times[name].spread:.1%}", flush=True)
    made = []
    for name, found in times.items():
        others = BASELINES if name not in BASELINES else ()
        ratios = {other: times[other].median / found.median for other in others if other in times}
        made.append(_row(function, region, order, str(v.dtype), name, len(v), found, **ratios))
    return made


def _row(
    function: str,
    region: str,
    order: str,
    dtype: str,
    implementation: str,
    elements: int,
    found: timing.Timing,
    *,
    tfp: float | None = None,
    scipy: float | None = None,
) -> BesselRow:
    return BesselRow(
        function=function,
        region=region,
        order=order,
        dtype=dtype,
        implementation=implementation,
        elements=str(elements),
        median_us=number(1e6 * found.median),
        spread=number(found.spread, 2),
        melements=number(1e-6 * elements / found.median),
        over_tfp=number(tfp, 3),
        over_scipy=number(scipy, 3),
        timing=found.method,
        **rows.environment(),
    )


@functools.cache
def compiled(function: str, name: str, dtype: str, elements: int) -> jax.stages.Compiled:
    """One program for all regions and orders."""
    if name == "tfp":
        import tensorflow_probability.substrates.jax as tfp  # pyright: ignore[reportMissingImports]

        scaled, sign = (tfp.math.log_bessel_ive, 1) if function == "log I" else (tfp.math.log_bessel_kve, -1)
        called = lambda v, x: scaled(v, x) + sign * x  # noqa: E731
    else:
        called = functools.partial(FUNCTIONS[function], implementation=name)
    array = jax.ShapeDtypeStruct((elements,), dtype)
    return jax.jit(called).lower(array, array).compile()


def check(found: jax.Array, function: str, points: Points, *, single: float) -> None:
    """Some elements against the specification in float64; what is wrong is not timed. `single` is what float32 may err
    by: others have fewer digits there, and are timed as they are."""
    some = slice(None, None, max(1, found.size // 4096))
    v, x = (a[some].astype(np.float64) for a in points)
    exact = np.asarray(FUNCTIONS[function](v, x, implementation="reference"))
    error = np.abs(np.asarray(found[some], np.float64) - exact) / np.maximum(1, np.abs(exact))
    # The conditioning of a logarithm near 0 is up to the size of the arguments, which others than ours have.
    kappa = np.maximum(1, np.hypot(v, x) / np.maximum(1, np.abs(exact)))
    bound = (1e-13 if found.dtype == np.float64 else single) * kappa
    if not (error <= bound).all():
        worst = np.argmax(error / bound)
        raise AssertionError(f"{function} of {v[worst]}, {x[worst]} is wrong by {error[worst]:.1e}")


def time_scipy(function: str, points: Points) -> timing.Timing:
    """On one core, a part of the points: it takes some hundred nanoseconds an element."""
    scaled, sign = (scipy.special.ive, 1) if function == "log I" else (scipy.special.kve, -1)
    share = max(1, len(points[0]) // 2**17)
    v, x = (a[::share] for a in points)
    seconds = []
    with np.errstate(all="ignore"):
        for _ in range(5):
            start = time.perf_counter()
            _ = np.log(scaled(v, x)) + sign * x
            seconds.append((time.perf_counter() - start) * len(points[0]) / len(v))
    return timing.summarize(seconds, "wall")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    everywhere = [*REGIONS, "all"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--implementations", type=some_of(IMPLEMENTATIONS), default=list(IMPLEMENTATIONS))
    parser.add_argument("--dtypes", type=some_of(("float64", "float32")), default=["float64", "float32"])
    parser.add_argument("--regions", type=some_of(everywhere), default=everywhere)
    parser.add_argument("--orders", type=some_of(("shuffled", "sorted")), default=["shuffled", "sorted"])
    parser.add_argument("--elements", type=int, default=2**22)
    parser.add_argument("--out", type=Path, help="CSV file; default: benchmarks/results/<device>_log_bessel.csv")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
