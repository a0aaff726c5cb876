# SPDX-License-Identifier: Apache-2.0
"""Second derivatives, forward and reverse, against differences of the reference sums at 60 digits. Each compiles for
most of a minute: that of log I is part of `make test`, the others of `pytest -m slow`."""

import jax
import mpmath
import numpy as np
import pytest

from tests.log_bessel import make_golden
from tests.log_bessel.accuracy import FUNCTIONS

EXACT = {"i": make_golden.of_i, "k": make_golden.of_k}
REVERSE, FORWARD = (jax.jacrev, jax.jacfwd), (jax.jacfwd, jax.jacfwd)


@pytest.mark.parametrize(
    ("name", "which", "modes"),
    [
        ("i", "log", REVERSE),
        pytest.param("k", "log", REVERSE, marks=pytest.mark.slow),
        pytest.param("i", "ratio", FORWARD, marks=pytest.mark.slow),
        pytest.param("k", "ratio", FORWARD, marks=pytest.mark.slow),
    ],
    ids=["log_i", "log_k", "ratio_i", "ratio_k"],
)
def test_second_derivatives(name, which, modes, float64):
    outer, inner = modes
    function = FUNCTIONS[name][which == "ratio"]
    hessian = jax.jit(outer(inner(function, (0, 1)), (0, 1)))
    for point in ((0.7, 0.3), (3.0, 5.0), (2.5, 60.0), (90.0, 40.0)):
        expected = second_differences(lambda v, x: getattr(EXACT[name](v, x), which), *point)
        np.testing.assert_allclose(np.array(hessian(*point)), expected, rtol=1e-8, atol=1e-10)


def second_differences(function, v, x):
    """[2, 2], of a function of mpmath's numbers."""
    with mpmath.workdps(60):
        h, v, x = mpmath.mpf(10) ** -12, mpmath.mpf(v), mpmath.mpf(x)
        by_vv = function(v + h, x) - 2 * function(v, x) + function(v - h, x)
        by_xx = function(v, x + h) - 2 * function(v, x) + function(v, x - h)
        both = function(v + h, x + h) - function(v + h, x - h) - function(v - h, x + h) + function(v - h, x - h)
        return np.array([[by_vv / h**2, both / (2 * h) ** 2], [both / (2 * h) ** 2, by_xx / h**2]], float)
