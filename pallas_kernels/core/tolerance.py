# SPDX-License-Identifier: Apache-2.0
"""The one rule for "is this error normal?".

A result is right when its error is at most twice that of a naive implementation that works in the same
precision, both measured against a reference in higher precision, plus the rounding of the result itself:

    error(actual)  <=  2 * error(naive)  +  eps(dtype) * max|expected|

The rule is checked on the largest absolute error and on the root mean square. It asks for no magic number per
dtype or shape, and it tightens by itself where the naive way happens to be good. (The idea is that of the
FlashAttention test-suite: Dao, "FlashAttention-2", 2023.)
"""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Error:
    """Errors of a result and of the naive way, and the bound that follows; `ok` is the verdict."""

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


def measure(actual, expected, naive) -> Error:
    """Errors of `actual` and `naive` against `expected`, all of one shape.

    Infinities must agree exactly (LSE of an empty row is -inf); they do not count as error.

    Args:
      actual: the result to judge; its dtype sets the rounding term.
      expected: the reference, in float32 or float64.
      naive: the naive computation in `actual`'s precision.
    """
    if not np.shape(actual) == np.shape(expected) == np.shape(naive):
        shapes = f"{np.shape(actual)}, {np.shape(expected)}, {np.shape(naive)}"
        raise ValueError(f"actual, expected and naive must have one shape, got {shapes}.")
    eps = float(jnp.finfo(jnp.asarray(actual).dtype).eps)
    a, e, n = (np.asarray(x).astype(np.float64) for x in (actual, expected, naive))
    finite = np.isfinite(e)

    def errors(x):
        same = np.array_equal(x[~finite], e[~finite], equal_nan=False)
        difference = np.abs(x - e)[finite] if same else np.array([np.nan])
        return (float(difference.max(initial=0)), float(np.sqrt(np.mean(difference**2)))) if difference.size else (0, 0)

    scale = float(np.abs(e[finite]).max(initial=0))
    return Error(*errors(a), *errors(n), eps * scale)


def assert_normal(actual, expected, naive, what: str = "result") -> Error:
    """AssertionError with every figure unless the error is normal; returns the measurement."""
    error = measure(actual, expected, naive)
    if not error.ok:
        raise AssertionError(f"{what}: {error}")
    return error
