# SPDX-License-Identifier: Apache-2.0
"""How right log I_v(x) and log K_v(x) are: ours, the published method, TensorFlow Probability (if installed) and SciPy.

    python -m tests.log_bessel.make_golden --points=20000 --out=runs/points.npz       reference values, some minutes
    python -m benchmarks.log_bessel_accuracy --points=runs/points.npz                 a table of them, markdown

Errors in float64, over max(1, |log|), by region; "over the bound" are those above 2e-14 + 4 eps kappa, kappa the
conditioning, and "not finite" values that are infinite or NaN, where none is.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import scipy.special

from pallas_kernels import log_iv, log_kv
from tests.log_bessel.make_golden import condition

Function = Callable[[np.ndarray, np.ndarray], np.ndarray]
GOLDEN = Path(__file__).parent.parent / "tests" / "log_bessel" / "golden.npz"


def methods(name: str) -> Iterator[tuple[str, Function]]:
    """By what they are called; of I ("i") or K ("k")."""
    log = log_iv if name == "i" else log_kv
    yield "ours", lambda v, x: np.asarray(log(v, x))
    yield "published", lambda v, x: np.asarray(log(v, x, mode="paper"))
    try:
        import tensorflow_probability.substrates.jax as tfp  # pyright: ignore[reportMissingImports]

        of_tfp = tfp.math.log_bessel_ive if name == "i" else tfp.math.log_bessel_kve
        yield "TFP", lambda v, x: np.asarray(of_tfp(v, x)) + (x if name == "i" else -x)
    except ImportError:
        print("TFP is not installed: pip install tfp-nightly", file=sys.stderr)
    scaled = scipy.special.ive if name == "i" else scipy.special.kve
    yield "SciPy", lambda v, x: np.log(scaled(v, x)) + (x if name == "i" else -x)


def regions(v: np.ndarray, x: np.ndarray, log: np.ndarray) -> dict[str, np.ndarray]:
    """Which points are in each; those near a logarithm of 0 in a region of their own."""
    size, near = np.hypot(v, x), np.abs(log) < 2e-6
    return {
        "sqrt(v^2 + x^2) < 24": (size < 24) & ~near,
        "to 1000": (size >= 24) & (size < 1000) & ~near,
        "above": (size >= 1000) & ~near,
        "log near 0": near,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--points", type=Path, default=GOLDEN, help="of tests/log_bessel/make_golden.py")
    options = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    points = np.load(options.points)
    v, x = points["v"], points["x"]
    columns = ("function", "region, points", "method", "largest error", "over the bound", "not finite")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in "ik":
        log, left = points[f"{name}_log"], points[f"{name}_left"]
        size = np.maximum(1, np.abs(log))
        bound = 2e-14 + 4 * np.finfo(float).eps * condition(points, name)
        for method, function in methods(name):
            with np.errstate(all="ignore"):
                error = np.abs(function(v, x) - log - left) / size
            finite = np.isfinite(error)
            for region, there in regions(v, x, log).items():
                largest = error[there & finite].max(initial=0)
                above, lost = int(np.sum((error > bound)[there & finite])), int(np.sum(there & ~finite))
                label = f"log {name.upper()} | {region}, {int(there.sum())}"
                print(f"| {label} | {method} | {largest:.1e} | {above} | {lost} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
