# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from pallas_kernels.core import tolerance


def test_twice_the_naive_error_is_the_limit():
    expected = np.array([1.0, 2.0])
    naive = np.array([1.001, 2.0], np.float32)
    tolerance.assert_normal(np.array([1.0, 2.0019], np.float32), expected, naive)
    with pytest.raises(AssertionError, match=r"out: largest error 0.00301 \(naive 0.001\)"):
        tolerance.assert_normal(np.array([1.0, 2.00301], np.float32), expected, naive, "out")


def test_many_small_errors_are_caught_by_the_mean():
    expected, naive = np.zeros(1000) + 1, np.ones(1000, np.float32)
    naive[0] += 1e-2  # one bad entry sets the largest error, not the mean
    tolerance.assert_normal(naive, expected, naive)
    with pytest.raises(AssertionError):
        tolerance.assert_normal(np.ones(1000, np.float32) + 1e-2, expected, naive)


def test_rounding_of_the_result_is_granted():
    expected = np.full(4, 1000.0)
    one_ulp = np.nextafter(np.float32(1000), np.float32(2000))
    tolerance.assert_normal(np.full(4, one_ulp, np.float32), expected, expected.astype(np.float32))


def test_nan_and_misplaced_infinities_never_pass():
    expected = np.array([1.0, -np.inf])
    good = expected.astype(np.float32)
    tolerance.assert_normal(good, expected, good)
    for bad in ([np.nan, -np.inf], [1.0, np.inf], [1.0, 0.0], [-np.inf, -np.inf]):
        with pytest.raises(AssertionError):
            tolerance.assert_normal(np.array(bad, np.float32), expected, good)


def test_the_worst_draw_of_the_naive_error_counts():
    expected, lucky = np.ones(2), np.ones(2, np.float32)
    unlucky = np.array([1.0, 1.1], np.float32)
    actual = np.array([1.0, 1.15], np.float32)
    with pytest.raises(AssertionError):
        tolerance.assert_normal(actual, expected, lucky)
    tolerance.assert_normal(actual, expected, lucky, more_draws=[(expected, unlucky)])


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"one shape, got \(2,\), \(3,\), \(2,\)"):
        tolerance.measure(np.ones(2), np.ones(3), np.ones(2))
