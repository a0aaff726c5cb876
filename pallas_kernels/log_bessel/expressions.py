# SPDX-License-Identifier: Apache-2.0
"""log I_v(x), log K_v(x), and the ratios of orders v + 1 and v, each by an expression that is exact where it is taken.

    large       c = sqrt(v^2 + x^2) >= 24     Debye's expansion, in powers of 1 / c; fewer terms where c is larger
    ascending   c < 24, I                     the ascending series
    recurrence  c < 24, K                     orders up from |m| <= 1/2, m = v - n:
                                                x < 1.5  Temme's series        else  trapezoid of the integral over cosh

With t = v / c Debye's sum over u_k(t) / v^k is one over P_k(t^2) / c^k: nothing in it minds v = 0, where it is Hankel's
expansion for large x. So one expression serves where the published selection has six, to 5e-16 of the ratios.

No value is formed that overflows; x > 0 and v >= 0 are finite, and what is outside of an expression's region gives
something finite, so that derivatives of a selection are. There is no loop and no branch: an expression is the same code
in a kernel and outside.

Sources: NIST Digital Library of Mathematical Functions, 10.25.2, 10.29.1, 10.32.9, 10.41(ii); N. M. Temme, "On the
numerical evaluation of the modified Bessel function of the third kind", 1975; Plesner et al., "Accurate Computation of
the Logarithm of Modified Bessel Functions on GPUs", 2024.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.log_bessel.debye import polynomials
from pallas_kernels.log_bessel.elementary import (
    cosh_less_1,
    exp,
    horner,
    log,
    log1p,
    reciprocal_gamma,
    sinh_over,
    upper_half,
)

LARGE = 24.0
ORDERS = 24  # steps of a recurrence, for orders below LARGE
TEMME_BELOW = 1.5
ZERO = Fraction(
    "1.50887956153831992890988448816"
)  # of sqrt(1 + s^2) - s asinh(s): log I and log K are near 0 at v = ZERO x


class Found(NamedTuple):
    """Arrays: the logarithm, and the function of order v + 1 over that of order v."""

    log: jax.Array
    ratio: jax.Array


# Around what more than one thing is made of, and a compiler that forgets it would compute for each of them.
Once = Callable[[Any], Any]


class Effort(NamedTuple):
    """What a type's digits need: numbers of terms, where the next is below them."""

    debye: tuple[tuple[float, int], ...]  # (least c, terms of Debye's expansion)
    ascending: int
    temme: int
    nodes: int
    near_zero: int  # terms about ZERO


def effort(dtype: jax.typing.DTypeLike) -> Effort:
    if jnp.dtype(dtype) == jnp.float64:
        return Effort(((LARGE, 16), (52.0, 10), (100.0, 8), (1200.0, 4)), 48, 10, 16, 18)
    return Effort(((LARGE, 4),), 34, 6, 8, 8)


def large(v: jax.Array, x: jax.Array, *, first: bool, terms: int) -> Found:
    """I, or with first=False K, where c is large.

    log I ~ c - v asinh(v / x) - log(2 pi c) / 2 + log(1 + sum P_k(t^2) / c^k)
    log K ~ v asinh(v / x) - c + log(pi / (2 c)) / 2 + log(1 + sum P_k(t^2) / (-c)^k)
    """
    sign = 1.0 if first else -1.0
    of_u, of_w = polynomials(terms)
    c = hypot(v, x)
    t2, step = jnp.square(v / c), sign / c
    total, rest = jnp.zeros_like(c), jnp.zeros_like(c)
    for p, w in zip(of_u[::-1], of_w[::-1], strict=True):
        total, rest = (total + horner(p, t2)) * step, (rest + horner(w, t2)) * step
    constant = -0.5 * math.log(2 * math.pi) if first else 0.5 * math.log(math.pi / 2)
    found = sign * _exponent(v, x, c) + constant - 0.5 * log(c / jnp.square(1 + total))
    # From the expansion of the derivative, whose difference from v / x is taken by hand.
    ratio = (x / (c + v) if first else (c + v) / x) - x / c * rest / (1 + total)
    return Found(found, ratio)


def _exponent(v: jax.Array, x: jax.Array, c: jax.Array) -> jax.Array:
    """c - v asinh(v / x), to the last digit also where the two are nearly the same."""
    far = c - v * log1p(v * (1 + v / (c + x)) / x)
    # x g(s), s = v / x, by powers of d = s - ZERO. In v - x ZERO a product of upper halves is exact, then a difference.
    unit = 1 << (26 if x.dtype == jnp.float64 else 12)
    zero = math.floor(ZERO * unit) / unit
    high = upper_half(x)
    d = (((v - high * zero) - (x - high) * zero) - x * float(ZERO - Fraction(zero))) / x
    near = jnp.abs(d) < 0.17
    d = jnp.where(near, d, 0)
    return jnp.where(near, x * (d * horner(_about_zero(effort(x.dtype).near_zero), d)), far)


def _about_zero(terms: int) -> list[float]:
    """Of g / d: g' = -asinh, g'' = -(1 + s^2)^(-1/2) = -y, and y has coefficients by (1 + s^2) y' + s y = 0."""
    zero = float(ZERO)
    y = [1 / math.hypot(1, zero)]
    for k in range(terms):
        y.append(-((2 * k + 1) * zero * y[k] + (k * y[k - 1] if k else 0)) / ((1 + zero**2) * (k + 1)))
    return [-math.asinh(zero), *(-a / ((k + 1) * (k + 2)) for k, a in enumerate(y[:terms]))]


def ascending(v: jax.Array, x: jax.Array, once: Once) -> Found:
    """I: (x / 2)^v / Gamma(v + 1) sum_k q^k / (k! (v + 1) ... (v + k)), q = x^2 / 4; <2 k> / x is the ratio."""
    q = jnp.square(x) / 4
    scale = 1 / 256  # of q and of the divisors: their product stays within float32's range
    scaled = q * scale
    # Innermost first, numerators over the divisors' product d: sum = n / d, q d(sum)/dq = w / d.
    d, n, w = jnp.ones_like(x), jnp.ones_like(x), jnp.zeros_like(x)
    for k in range(effort(x.dtype).ascending, 0, -1):
        d = d * (v * (k * scale) + k * k * scale)
        n, w, rest = d + scaled * n, scaled * (n + w), n
    s = scaled * rest / d  # the sum less 1
    ratio = 2 * w / (n * x)
    # The sum starts with q / (1 + v): so small an x that q is 0 keeps its ratio.
    ratio = jnp.where(q < 1e-16, x / 2 / (1 + v), ratio)
    m, steps = _nearest(v)
    even, odd = reciprocal_gamma(m)
    g = even + m * odd
    # Gamma(v + 1) = Gamma(1 + m) (m + 1) ... (m + steps)
    product = jnp.ones_like(x)
    for k in range(1, ORDERS + 1):
        product = jnp.where(k <= steps, product * (m + k), product)
    # (1 + s) (1 + g) of orders near 0, where both are small, keeps the digits that 1 + y loses.
    y = s + g + s * g
    u = once(jnp.where(steps == 0, 1 + y, (1 + s) * (1 + g) / product))
    return Found(v * log(x / 2) + log(u, jnp.where(steps == 0, y, u - 1)), ratio)


class Start(NamedTuple):
    """Of an order |m| <= 1/2, where the recurrence of K starts."""

    k0: jax.Array  # K_m(x) e^scaled
    k1: jax.Array  # K_{m+1}(x) e^scaled x / 2
    scaled: jax.Array


def temme(m: jax.Array, x: jax.Array) -> Start:
    """x < 1.5: K_m = sum c_k f_k, K_{m+1} = 2 / x sum c_k (p_k - k f_k), c_k = (x^2 / 4)^k / k!."""
    even, odd = reciprocal_gamma(m)
    up, down = 1 + even + m * odd, 1 + even - m * odd  # 1 / Gamma(1 + m), 1 / Gamma(1 - m)
    l = -log(x / 2)
    grown, both = exp(m * l), 1 / (up * down)
    shrunk = 1 / grown
    p, q = grown * down * both / 2, shrunk * up * both / 2
    f = ((1 + even) * l * sinh_over(m * l, grown, shrunk) - odd * (grown + shrunk) / 2) * both
    # f_k = (k f_{k-1} + p_{k-1} + q_{k-1}) / (k^2 - m^2), p_k = p_{k-1} / (k - m), q_k = q_{k-1} / (k + m): numerators
    # over one product d of (k^2 - m^2), those of the sums, too.
    c, quarter, square, d = jnp.ones_like(x), jnp.square(x) / 4, m * m, jnp.ones_like(x)
    k0, k1 = f, p
    for k in range(1, effort(x.dtype).temme + 1):
        step = k * k - square
        f, p, q = k * f + p + q, p * (k + m), q * (k - m)
        c, d = c * quarter * (1 / k), d * step
        k0, k1 = k0 * step + c * f, k1 * step + c * (p - k * f)
    inverse = 1 / d
    return Start(k0 * inverse, k1 * inverse, jnp.zeros_like(x))


def trapezoid(m: jax.Array, x: jax.Array) -> Start:
    """1.5 <= x < 24: K_m = integral_0^inf exp(-x cosh s) cosh(m s) ds, by a rule that is exact for such functions."""
    nodes = effort(x.dtype).nodes
    # To where exp(-x (cosh s - 1)) is below the last digit, acosh(1 + 36 / x), within a percent.
    h = (9.75 if x.dtype == jnp.float64 else 8.0) / nodes / (jnp.sqrt(x) + 1.24)
    # cosh(a (s + h)) = cosh(a s) + step, and the next step is larger by 2 (cosh(a h) - 1) cosh(a s): of positive terms.
    growth = [2 * cosh_less_1(a * h) for a in (jnp.ones_like(m), m, m + 1)]
    cosh, even, odd = growth[0] / 2, 1 + growth[1] / 2, 1 + growth[2] / 2  # cosh(s) - 1, cosh(m s), cosh((m + 1) s)
    steps = [cosh, growth[1] / 2, growth[2] / 2]
    k0, k1 = jnp.full_like(x, 0.5), jnp.full_like(x, 0.5)
    for _ in range(nodes):
        weight = exp(-x * cosh)
        k0, k1 = k0 + weight * even, k1 + weight * odd
        steps = [s + g * c for s, g, c in zip(steps, growth, (1 + cosh, even, odd), strict=True)]
        cosh, even, odd = cosh + steps[0], even + steps[1], odd + steps[2]
    return Start(k0 * h, k1 * h * x / 2, x)


def recurrence(v: jax.Array, x: jax.Array, once: Once) -> Found:
    """K. With P_k = K_{m+k} (x / 2)^k, P_{k+1} = (m + k) P_k + x^2 / 4 P_{k-1}: nothing that overflows, no division."""
    m, n = _nearest(v)
    small = x < TEMME_BELOW
    starts = temme(m, jnp.where(small, x, 1)), trapezoid(m, jnp.where(small, 2, x))
    start = Start(*(jnp.where(small, a, b) for a, b in zip(*starts, strict=True)))
    quarter = jnp.square(x) / 4
    this, following = start.k0, start.k1
    for k in range(1, ORDERS + 1):
        up = k <= n
        this, following = jnp.where(up, following, this), jnp.where(up, (m + k) * following + quarter * this, following)
    this, following = once((this, following))
    return Found(log(this) - n * log(x / 2) - start.scaled, following / this * 2 / x)


def _nearest(v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(m, n) with v = m + n, n whole, |m| <= 1/2."""
    n = lax.round(v, lax.RoundingMethod.TO_NEAREST_EVEN)
    return v - n, n


def hypot(v: jax.Array, x: jax.Array) -> jax.Array:
    larger, smaller = jnp.maximum(v, x), jnp.minimum(v, x)
    return larger * jnp.sqrt(1 + jnp.square(smaller / larger))
