# SPDX-License-Identifier: Apache-2.0
"""Elementary functions by additions, multiplications and bits: what kernels lack (log1p, 1 / Gamma) or XLA does slowly.

Every function is elementwise, of one type, float32 or float64, and differentiable.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# 1 / Gamma(1 + z) = sum_k a_k z^k, to 1e-18 for |z| <= 1/2. NIST Digital Library of Mathematical Functions, 5.7.1.
_RECIPROCAL_GAMMA = (
    *(1.0, 0.577215664901532861, -0.655878071520253881, -0.0420026350340952355, 0.16653861138229149),
    *(-0.0421977345555443367, -0.00962197152787697356, 0.00721894324666309954, -0.00116516759185906511),
    *(-0.000215241674114950973, 0.000128050282388116186, -0.0000201348547807882387, -1.25049348214267066e-6),
    *(1.13302723198169588e-6, -2.0563384169776071e-7, 6.11609510448141582e-9, 5.00200764446922293e-9),
    *(-1.18127457048702014e-9, 1.04342671169110051e-10, 7.78226343990507125e-12, -3.69680561864220571e-12),
)
_LOG2 = Fraction("0.69314718055994530941723212145818")
_FACTORIALS = tuple(1 / math.factorial(k) for k in range(24))


def horner(coefficients: Sequence[float], y: jax.Array) -> jax.Array:
    """Of ascending coefficients."""
    out = jnp.full_like(y, coefficients[-1])
    for a in coefficients[-2::-1]:
        out = out * y + np.asarray(a, y.dtype)
    return out


def reciprocal_gamma(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(even, odd) with 1 / Gamma(1 +- z) = 1 + even +- z odd, for |z| <= 1/2; odd is smooth where z is 0."""
    count = _kind(z).of(21, 13)
    square = z * z
    return square * horner(_RECIPROCAL_GAMMA[2:count:2], square), horner(_RECIPROCAL_GAMMA[1:count:2], square)


def cosh_less_1(y: jax.Array) -> jax.Array:
    """cosh(y) - 1 to the last digit, |y| <= 1."""
    square = y * y
    return square * horner(_FACTORIALS[2 : _kind(y).of(18, 10) : 2], square)


def sinh_over(y: jax.Array, grown: jax.Array, shrunk: jax.Array) -> jax.Array:
    """sinh(y) / y, of exp(y) and exp(-y) too."""
    near = jnp.abs(y) < 0.5
    close = jnp.where(near, y, 0)
    far = jnp.where(near, 1, y)
    series = horner(_FACTORIALS[1 : _kind(y).of(18, 10) : 2], close * close)
    return jnp.where(near, series, (grown - shrunk) / (2 * far))


def log1p(y: jax.Array) -> jax.Array:
    return log(1 + y, y)


def log(u: jax.Array, less_1: jax.Array | None = None) -> jax.Array:
    """log(u), 0 < u, not subnormal; less_1 is u - 1 if the caller knows more digits of it, which count for u near 1."""
    kind = _kind(u)
    # u = 2^e m, 1/sqrt(2) <= m < sqrt(2). A vector unit without conversions of 64-bit integers has e by writing it into
    # the last bits of 2^52 (2^23).
    one, least = kind.bits(1.0), kind.bits(math.sqrt(0.5))
    biased = lax.shift_right_logical(lax.bitcast_convert_type(u, kind.whole) + (one - least), kind.whole(kind.digits))
    e = lax.bitcast_convert_type(biased | kind.bits(2.0**kind.digits), u.dtype) - (2.0**kind.digits + kind.bias)
    m = u * lax.bitcast_convert_type(lax.shift_left(2 * kind.bias - biased, kind.whole(kind.digits)), u.dtype)
    # log m = 2 atanh(s), s = f / (2 + f), f = m - 1; f - (h - s (h + r)), h = f^2 / 2, rounds once what is large.
    f = jnp.where(e == 0, u - 1 if less_1 is None else less_1, m - 1)
    s = f / (2 + f)
    square = s * s
    r = square * horner([2 / (2 * k + 1) for k in range(1, kind.of(11, 5))], square)
    half = f * f / 2
    return e * kind.log2 - ((half - (s * (half + r) + e * kind.log2_rest)) - f)


def exp(y: jax.Array) -> jax.Array:
    """Of what neither overflows nor underflows, |y| < 700 (80)."""
    kind = _kind(y)
    n = lax.round(y * (1 / math.log(2)), lax.RoundingMethod.TO_NEAREST_EVEN)
    r = (y - n * kind.log2) - n * kind.log2_rest
    # n + bias is in the last bits of that plus 2^52.
    power = lax.shift_left(
        lax.bitcast_convert_type(n + (2.0**kind.digits + kind.bias), kind.whole), kind.whole(kind.digits)
    )
    return horner(_FACTORIALS[: kind.of(14, 7)], r) * lax.bitcast_convert_type(power, y.dtype)


def upper_half(x: jax.Array) -> jax.Array:
    """x without the last half of its digits: a product with as short a number is exact. Constant to derivatives:
    the lower half has them."""
    kind = _kind(x)
    keep = kind.whole(-(1 << kind.of(27, 12)))
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, kind.whole) & keep, x.dtype)


class _Kind(NamedTuple):
    """A floating point type: integers of its size, digits behind its first, bias of its exponent."""

    dtype: np.dtype
    whole: Any
    digits: int
    bias: int

    @property
    def log2(self) -> float:
        """Its first digits, with zeros at their end: an exponent times them is exact."""
        unit = 1 << (self.digits - 11)
        return math.floor(_LOG2 * unit) / unit

    @property
    def log2_rest(self) -> float:
        return float(_LOG2 - Fraction(self.log2))

    def bits(self, value: float) -> int:
        return int(np.asarray(value, self.dtype).view(self.whole))

    def of[T](self, double: T, single: T) -> T:
        return double if self.digits == 52 else single


def _kind(x: jax.Array) -> _Kind:
    dtype = np.dtype(x.dtype)
    return _Kind(dtype, np.int64, 52, 1023) if dtype == np.float64 else _Kind(dtype, np.int32, 23, 127)
