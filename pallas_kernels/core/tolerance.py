# SPDX-License-Identifier: Apache-2.0
"""The one rule for "is this error normal?".

A result is right when its error is at most twice that of a naive implementation that works in the same precision,
both measured against a reference in higher precision, plus the rounding of the result itself:

    error(actual)  <=  2 * error(naive)  +  eps(dtype) * max|expected|

The rule is checked on the largest absolute error and on the root mean square. It asks for no magic number per dtype
or shape, and it tightens by itself where the naive way happens to be good. The naive error is a random variable; a
lucky draw of it is no yardstick, so callers may give several draws of the inputs, of which the worst counts. (The
idea of the rule is that of FlashAttention's test suite.)
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Error:
    """Errors of a result and of the naive way, and the rounding of the result; `ok` is the verdict."""

    largest: float
    rms: float
    naive_largest: float
    naive_rms: float
    rounding: float

    @property
    def ok(self) -> bool:
        within_largest = self.largest <= 2 * self.naive_largest + self.rounding
        within_rms = self.rms <= 2 * self.naive_rms + self.rounding
        return within_largest and within_rms  # NaN compares false, so it is never ok

    def __str__(self) -> str:
        return (
            f"largest error {self.largest:.3g} (naive {self.naive_largest:.3g}), "
            f"rms {self.rms:.3g} (naive {self.naive_rms:.3g}), rounding {self.rounding:.3g}"
        )


def measure(actual, expected, naive, more_draws: Sequence[tuple] = ()) -> Error:
    """Errors of `actual` and `naive` against `expected`, all of one shape.

    Infinities must agree exactly (the LSE of an empty row is -inf); they do not count as error.

    Args:
      actual: the result to judge; its dtype sets the rounding term.
      expected: the reference, in float32 or float64.
      naive: the naive computation in `actual`'s precision.
      more_draws: pairs (expected, naive) for other inputs of the same distribution.
    """
    if not np.shape(actual) == np.shape(expected) == np.shape(naive):
        shapes = f"{np.shape(actual)}, {np.shape(expected)}, {np.shape(naive)}"
        raise ValueError(f"actual, expected and naive must have one shape, got {shapes}.")
    naive_errors = [_errors(n, e) for e, n in [(expected, naive), *more_draws]]
    naive_largest, naive_rms = (max(values) for values in zip(*naive_errors, strict=True))
    wanted = np.asarray(expected, np.float64)
    scale = float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0))
    eps = float(jnp.finfo(jnp.asarray(actual).dtype).eps)
    return Error(*_errors(actual, expected), naive_largest, naive_rms, eps * scale)


def _errors(actual, expected) -> tuple[float, float]:
    """Largest and root-mean-square difference over the finite entries of `expected`; NaN if the others differ."""
    a, e = np.asarray(actual).astype(np.float64), np.asarray(expected).astype(np.float64)
    finite = np.isfinite(e)
    if not np.array_equal(a[~finite], e[~finite]):
        return np.nan, np.nan
    difference = np.abs(a[finite] - e[finite])
    return float(difference.max(initial=0)), float(np.sqrt(np.mean(difference**2))) if difference.size else 0.0


def assert_normal(actual, expected, naive, what: str = "result", more_draws: Sequence[tuple] = ()) -> Error:
    """AssertionError with every figure unless the error is normal; returns the measurement."""
    error = measure(actual, expected, naive, more_draws)
    if not error.ok:
        raise AssertionError(f"{what}: {error}")
    return error
