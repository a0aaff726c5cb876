# SPDX-License-Identifier: Apache-2.0
"""Reference values of log I_v(x), log K_v(x) and their derivatives, by sums of positive terms at 60 digits.

    python -m tests.log_bessel.make_golden                           golden.npz here, which the tests read
    python -m tests.log_bessel.make_golden --points=20000 --out=F    more points, for a table of accuracy

Nothing here loses digits, whatever v and x are:

    I_v(x) = sum_k (x/2)^(v+2k) / (k! Gamma(v+k+1))       from the largest term up and down, until terms are 1e-52 of it
    K_v(x) = integral_0^inf exp(-x cosh s) cosh(v s) ds   trapezoid, which converges exponentially

Averages over these terms are derivatives. Of I_v, <2k> / x is I_{v+1} / I_v and <log(x/2) - psi(v+k+1)> that of the
logarithm by v; of K_v, v/x + <cosh s> is K_{v+1} / K_v and <s tanh(v s)> that of the logarithm by v. Logarithms are
stored as a double and what it leaves out.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import mpmath
import numpy as np
from mpmath import mp, mpf

HERE = Path(__file__).parent
DIGITS, NEGLIGIBLE = 60, 120  # and what is e^-120 of a sum is left out
LARGEST_V, SMALLEST_X, LARGEST_X = 1e6, 1e-8, 1e6
# Where the published selection changes (Plesner et al. 2024, table 1), in v and in x.
ORDERS = (0.3, 0.46, 0.6, 0.7, 3.05, 3.1, 12.6964, 15.3919, 20.1534, 56.9971, 163.6993)
ARGUMENTS = (19.6931, 30.0, 35.9074, 59.6925, 84.4153, 274.2377, 1400.0)


class Values(NamedTuple):
    """Of one point."""

    log: mpf
    ratio: mpf  # of orders v + 1 and v
    by_v: mpf  # d log / dv


def of_i(v: float, x: float) -> Values:
    """Of I_v(x), v >= 0, x > 0."""
    v_, x_ = mpf(v), mpf(x)
    quarter = x_ * x_ / 4
    first = int((math.hypot(v, x) - v) / 2)  # the largest term
    psi = mpmath.psi(0, v_ + first + 1)
    total, twice_k, digamma = mpf(1), mpf(2 * first), psi
    least = mpmath.exp(-NEGLIGIBLE)
    term, k, of_k = mpf(1), first, psi
    while term > least:
        of_k += 1 / (v_ + k + 1)
        k += 1
        term *= quarter / (k * (v_ + k))
        total, twice_k, digamma = total + term, twice_k + 2 * k * term, digamma + of_k * term
    term, k, of_k = mpf(1), first, psi
    while k > 0 and term > least:
        term *= k * (v_ + k) / quarter
        of_k -= 1 / (v_ + k)
        k -= 1
        total, twice_k, digamma = total + term, twice_k + 2 * k * term, digamma + of_k * term
    half = mpmath.log(x_ / 2)
    log = (v_ + 2 * first) * half - mpmath.loggamma(first + 1) - mpmath.loggamma(v_ + first + 1)
    # Of log I_0(x), x -> 0, digits remain: the sum is not far from 1 there.
    return Values(log + mpmath.log(total), twice_k / total / x_, half - digamma / total)


def of_k(v: float, x: float) -> Values:
    """Of K_v(x), v >= 0, x > 0."""
    v_, x_ = mpf(v), mpf(x)
    size = mpmath.sqrt(v_ * v_ + x_ * x_)
    peak = mpmath.asinh(v_ / x_)
    # A normal distribution of this width near its peak, and at most exp(-x cosh s): both to 1e-50.
    step = min(mpf("0.075"), mpf("0.33") / mpmath.sqrt(size))
    most = -x_ * mpmath.cosh(peak) + v_ * peak
    start, last = int(peak / step), NEGLIGIBLE + abs(mpmath.log(mpf(x)))
    total, cosh_s, by_v = mpf(0), mpf(0), mpf(0)
    for direction in (1, -1):
        n = start if direction == 1 else start - 1
        while n >= 0:
            s = n * step
            cosh = mpmath.cosh(s)
            exponent = -x_ * cosh + v_ * s - most
            weight = mpmath.exp(exponent) * (1 + mpmath.exp(-2 * v_ * s)) / (4 if n == 0 else 2)
            total, cosh_s = total + weight, cosh_s + weight * cosh
            by_v += weight * s * mpmath.tanh(v_ * s)
            if exponent < -last:
                break
            n += direction
    return Values(most + mpmath.log(total * step), v_ / x_ + cosh_s / total, by_v / total)


def points(count: int, seed: int) -> Iterator[tuple[float, float]]:
    """(v, x): half everywhere, a quarter where expressions change, the rest near a logarithm that is 0."""
    random = np.random.default_rng(seed)

    def uniform(low: float, high: float) -> float:
        return float(np.exp(random.uniform(np.log(low), np.log(high))))

    for v in (0.0, 0.5, 1.0, 2.0, 7.0, 12.0):
        for x in (1e-8, 1e-3, 0.5, 2.0, 12.0, 25.0, 700.0, 1e4, 1e6):
            yield v, x
    for i in range(count // 2):
        few = i % 2  # where all expressions meet
        yield (uniform(1e-2, 316), uniform(0.1, 1e4)) if few else (uniform(1e-3, 1e6), uniform(1e-8, 1e6))
    for i in range(count // 4):
        side = 1 + (1e-6 if i % 2 else -1e-6)
        if i % 4 < 2:
            yield float(random.choice(ORDERS)) * side, uniform(0.1, 1e4)
        else:
            yield uniform(1e-2, 316), float(random.choice(ARGUMENTS)) * side
    for i in range(count // 4):
        function = of_i if i % 2 else of_k
        # log K is 0 near x = 0.66 v only where v is large; for small orders near x = 0.5.
        yield _near_zero(function, uniform(1e-2, 1e6), float(random.uniform(-1e-6, 1e-6)))


def _near_zero(function, v: float, wanted: float) -> tuple[float, float]:
    """A point whose logarithm is about `wanted`: by Newton's steps in log x."""
    x = max(0.66 * v, 0.5)
    for _ in range(60):
        found = function(v, x)
        by_x = v / x + found.ratio if function is of_i else v / x - found.ratio
        step = float((found.log - wanted) / (by_x * x))
        x *= math.exp(-max(-1.0, min(1.0, step)))
        if abs(step) < 1e-12:
            break
    return v, x


FIELDS = ("v", "x", *(f"{name}_{part}" for name in "ik" for part in ("log", "left", "ratio", "by_v")))


def row(point: tuple[float, float]) -> list[float]:
    """A point in the order of FIELDS; "left" is what the double of log leaves out."""
    v, x = point
    out = [v, x]
    for found in (of_i(v, x), of_k(v, x)):
        log = float(found.log)
        out += [log, float(found.log - log), float(found.ratio), float(found.by_v)]
    return out


def by_x(points: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """d log / dx at stored points, of "i" or "k"."""
    return points["v"] / points["x"] + (1 if name == "i" else -1) * points[f"{name}_ratio"]


def condition(points: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """kappa: how much larger relative errors of v and x are in max(1, |log|)."""
    moved = np.abs(points["v"] * points[f"{name}_by_v"]) + np.abs(points["x"] * by_x(points, name))
    return moved / np.maximum(1, np.abs(points[f"{name}_log"]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--points", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "golden.npz")
    options = parser.parse_args(argv)
    with ProcessPoolExecutor(initializer=_start) as pool:
        rows = np.array(list(pool.map(row, points(options.points, options.seed), chunksize=8)))
    np.savez_compressed(options.out, **dict(zip(FIELDS, rows.T, strict=True)))
    print(f"{len(rows)} points in {options.out}, {options.out.stat().st_size:,} bytes")
    return 0


def _start() -> None:
    mp.dps = DIGITS


_start()

if __name__ == "__main__":
    sys.exit(main())
