# SPDX-License-Identifier: Apache-2.0
"""The reference values themselves: against mpmath's own functions, SciPy's, and an identity at every point."""

from pathlib import Path

import mpmath
import numpy as np
import pytest
import scipy.special

from tests.log_bessel.make_golden import FIELDS

GOLDEN = np.load(Path(__file__).parent / "golden.npz")
ROWS = [dict(zip(FIELDS, row, strict=True)) for row in np.stack([GOLDEN[name] for name in FIELDS], axis=1)]


def test_points_are_everywhere():
    v, x = GOLDEN["v"], GOLDEN["x"]
    assert len(v) >= 2000
    assert (v.min(), x.min(), x.max()) == (0, 1e-8, 1e6)
    assert v.max() > 9e5
    assert sum(np.abs(GOLDEN["i_log"]) < 2e-6) >= 250
    assert sum(np.abs(GOLDEN["k_log"]) < 2e-6) >= 250


def test_wronskian():
    """I_v K_{v+1} + I_{v+1} K_v = 1 / x, to the last digit of the ratios, wherever the logarithms are."""
    with mpmath.workdps(50):
        for row in ROWS:
            log_i, log_k = (mpmath.mpf(row[f"{name}_log"]) + mpmath.mpf(row[f"{name}_left"]) for name in "ik")
            ratios = mpmath.mpf(row["k_ratio"]) + mpmath.mpf(row["i_ratio"])
            assert abs(log_i + log_k + mpmath.log(ratios * mpmath.mpf(row["x"]))) < 3e-16, row


def test_mpmath_has_the_same_where_it_has_any():
    """Its own series and quadrature; for large orders and arguments they do not end or lose their sign."""
    chosen = [row for row in ROWS if row["v"] < 40 and row["x"] < 60][::12]
    assert len(chosen) > 40
    h = mpmath.mpf(10) ** -15
    with mpmath.workdps(60):
        for row in chosen:
            v, x = mpmath.mpf(row["v"]), mpmath.mpf(row["x"])
            for name, function in (("i", mpmath.besseli), ("k", mpmath.besselk)):
                log = mpmath.log(function(v, x))
                assert abs(row[f"{name}_log"] + mpmath.mpf(row[f"{name}_left"]) - log) < 1e-30 * (1 + abs(log))
                assert abs(function(v + 1, x) / function(v, x) / row[f"{name}_ratio"] - 1) < 2e-16
                by_v = (mpmath.log(function(v + h, x)) - mpmath.log(function(abs(v - h), x))) / (2 * h)
                if v > h:
                    assert abs(by_v - row[f"{name}_by_v"]) < 1e-15 * (1 + abs(by_v))


@pytest.mark.parametrize(("name", "function", "sign"), [("i", scipy.special.ive, 1), ("k", scipy.special.kve, -1)])
def test_scipy_has_the_same_where_it_is_finite(name, function, sign):
    with np.errstate(divide="ignore"):
        log = np.log(function(GOLDEN["v"], GOLDEN["x"])) + sign * GOLDEN["x"]
    expected, finite = GOLDEN[f"{name}_log"], np.isfinite(log)
    assert 0.5 < finite.mean() < 0.9  # it has no others
    error = np.abs(log - expected)[finite] / (1 + GOLDEN["x"] + np.abs(expected))[finite]
    assert error.max() < 2e-12
