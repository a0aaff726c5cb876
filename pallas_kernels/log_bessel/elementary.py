# SPDX-License-Identifier: Apache-2.0
"""Elementary functions by additions, multiplications and bits: what kernels lack (log1p, 1 / Gamma), or XLA does slowly.

Every function is elementwise, of one type, float32 or float64, and differentiable.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

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
    count = 21 if z.dtype == jnp.float64 else 13
    square = z * z
    return square * horner(_RECIPROCAL_GAMMA[2:count:2], square), horner(_RECIPROCAL_GAMMA[1:count:2], square)


def cosh_less_1(y: jax.Array) -> jax.Array:
    """cosh(y) - 1 to the last digit, |y| <= 1."""
    square = y * y
    return square * horner(_FACTORIALS[2 : 18 if y.dtype == jnp.float64 else 10 : 2], square)


def sinh_over(y: jax.Array, grown: jax.Array) -> jax.Array:
    """sinh(y) / y, where grown is exp(y)."""
    near = jnp.abs(y) < 0.5
    close = jnp.where(near, y, 0)
    far = jnp.where(near, 1, y)
    series = horner(_FACTORIALS[1 : 18 if y.dtype == jnp.float64 else 10 : 2], close * close)
    return jnp.where(near, series, (grown - 1 / grown) / (2 * far))


def log1p(y: jax.Array) -> jax.Array:
    return log(1 + y, y)


def log(u: jax.Array, less_1: jax.Array | None = None) -> jax.Array:
    """log(u), 0 < u, not subnormal; less_1 is u - 1 where the caller knows more digits of it, which count for u near 1."""
    return _log(u, u - 1 if less_1 is None else less_1)


@jax.custom_jvp
def _log(u: jax.Array, less_1: jax.Array) -> jax.Array:
    # u = 2^e m, 1/sqrt(2) <= m < sqrt(2). A vector unit without conversions of 64-bit integers has e by writing it into
    # the last bits of 2^52 (2^23).
    double = u.dtype == jnp.float64
    whole, digits, bias = (jnp.int64, 52, 1023) if double else (jnp.int32, 23, 127)
    one, least = _bits(1.0, u.dtype), _bits(math.sqrt(0.5), u.dtype)
    bits = lax.bitcast_convert_type(u, whole)
    biased = lax.shift_right_logical(bits + (one - least), whole(digits))
    e = lax.bitcast_convert_type(biased | _bits(2.0**digits, u.dtype), u.dtype) - (2.0**digits + bias)
    m = lax.bitcast_convert_type(bits + one - lax.shift_left(biased, whole(digits)), u.dtype)
    # log m = 2 atanh(s), s = f / (2 + f), f = m - 1; f - (h - s (h + r)), h = f^2 / 2, rounds once what is large.
    f = jnp.where(e == 0, less_1, m - 1)
    s = f / (2 + f)
    square = s * s
    r = square * horner([2 / (2 * k + 1) for k in range(1, 11 if double else 5)], square)
    half = f * f / 2
    # log 2, its first digits with zeros at their end: e times them is exact.
    first = math.floor(math.log(2) * 2 ** (digits - 11)) / 2 ** (digits - 11)
    rest = float(_LOG2 - Fraction(first))
    return e * first - ((half - (s * (half + r) + e * rest)) - f)


@_log.defjvp
def _of_log(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    return _log(*primals), tangents[0] / primals[0]


def _bits(value: float, dtype: jax.typing.DTypeLike) -> int:
    kind = np.dtype(dtype)
    return int(np.asarray(value, kind).view(f"int{8 * kind.itemsize}"))


@jax.custom_jvp
def exp(y: jax.Array) -> jax.Array:
    """Of what neither overflows nor underflows, |y| < 700 (80)."""
    double = y.dtype == jnp.float64
    whole, digits, bias = (jnp.int64, 52, 1023) if double else (jnp.int32, 23, 127)
    n = jnp.floor(y * (1 / math.log(2)) + 0.5)
    first = math.floor(math.log(2) * 2 ** (digits - 11)) / 2 ** (digits - 11)
    r = (y - n * first) - n * float(_LOG2 - Fraction(first))
    # n + bias is in the last bits of that plus 2^52.
    power = lax.shift_left(lax.bitcast_convert_type(n + (2.0**digits + bias), whole), whole(digits))
    return horner(_FACTORIALS[: 14 if double else 7], r) * lax.bitcast_convert_type(power, y.dtype)


@exp.defjvp
def _of_exp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    grown = exp(*primals)
    return grown, grown * tangents[0]


@jax.custom_jvp
def upper_half(x: jax.Array) -> jax.Array:
    """x without the last half of its digits, so that a product with as short a number is exact."""
    whole, keep = (jnp.int64, -(1 << 27)) if x.dtype == jnp.float64 else (jnp.int32, -(1 << 12))
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, whole) & keep, x.dtype)


@upper_half.defjvp
def _of_upper_half(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return upper_half(*primals), jnp.zeros_like(primals[0])  # the lower half has it
