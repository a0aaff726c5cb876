# SPDX-License-Identifier: Apache-2.0
"""log I_v(x), log K_v(x), and the ratios of orders v + 1 and v, each by an expression that is exact where it is taken.

    large     c = sqrt(v^2 + x^2) >= 24     Debye's expansion, in powers of 1 / c
    series    c < 24, I                     the ascending series
    integral  c < 24, K                     integral_0^inf exp(-x cosh s) cosh(v s) ds, trapezoid
    tiny      x < 1e-8, K                   the series' first terms: nodes of the integral would be far apart

With t = v / c Debye's sum over u_k(t) / v^k is one over P_k(t^2) / c^k: nothing in it minds v = 0, where it is Hankel's
expansion for large x. So one expression serves where the published selection has six, to 5e-16 of the ratios.

No value is formed that overflows; x > 0 and v >= 0 are finite, and what is outside of an expression's region gives
something finite, so that derivatives of a selection are.

Sources: NIST Digital Library of Mathematical Functions, 10.25.2, 10.32.9, 10.41(ii); Plesner et al., "Accurate
Computation of the Logarithm of Modified Bessel Functions on GPUs", 2024.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.log_bessel.debye import polynomials

LARGE, TINY = 24.0, 1e-8
TERMS = 16  # of Debye's expansion: what follows is 1e-16 at c = 24
ASCENDING = 48  # terms of the series, for x < 24
NODES, TOGETHER = 128, 8  # of the integral
LEFT_OUT = 36.0  # and e^-36 of its largest value
# gamma, zeta(3) / 3, zeta(5) / 5, zeta(7) / 7: of (lgamma(1 - v) - lgamma(1 + v)) / (2 v).
_ODD = (0.5772156649015329, 0.40068563438653143, 0.20738555102867398, 0.1440498967691467)


class Found(NamedTuple):
    """Arrays: the logarithm, and the function of order v + 1 over that of order v."""

    log: jax.Array
    ratio: jax.Array


def large(v: jax.Array, x: jax.Array, *, first: bool) -> Found:
    """I, or with first=False K, where c is large.

    log I ~ c - v asinh(v / x) - log(2 pi c) / 2 + log(1 + sum P_k(t^2) / c^k)
    log K ~ v asinh(v / x) - c + log(pi / (2 c)) / 2 + log(1 + sum P_k(t^2) / (-c)^k)
    """
    sign = 1.0 if first else -1.0
    of_u, of_w = polynomials(TERMS)
    c = jnp.hypot(v, x)
    t2, step = jnp.square(v / c), sign / c
    total, rest = jnp.zeros_like(c), jnp.zeros_like(c)
    for p, w in zip(of_u[::-1], of_w[::-1], strict=True):
        total, rest = (total + horner(p, t2)) * step, (rest + horner(w, t2)) * step
    constant = -0.5 * math.log(2 * math.pi) if first else 0.5 * math.log(math.pi / 2)
    log = sign * (c - v * jnp.arcsinh(v / x)) + constant - 0.5 * jnp.log(c) + jnp.log1p(total)
    # From the expansion of the derivative, whose difference from v / x is taken by hand.
    ratio = (x / (c + v) if first else (c + v) / x) - x / c * rest / (1 + total)
    return Found(log, ratio)


def series(v: jax.Array, x: jax.Array) -> Found:
    """I: sum_k (x / 2)^(v + 2 k) / (k! Gamma(v + k + 1)), over its first term; <2 k> / x is the ratio."""
    q = jnp.square(x) / 4

    def add(k: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        term, total, weighted = carry
        k = jnp.asarray(k, x.dtype)
        term = term * q / (k * (k + v))
        return term, total + term, weighted + k * term

    zero = jnp.zeros_like(x)
    _, total, weighted = lax.fori_loop(1, ASCENDING + 1, add, (jnp.ones_like(x), zero, zero), unroll=TOGETHER)
    # The sum starts with q / (1 + v): so small an x that q is 0 keeps its ratio.
    ratio = jnp.where(q < 1e-16, x / 2 / (1 + v), 2 * weighted / (1 + total) / x)
    return Found(v * jnp.log(x / 2) - log_gamma_1p(v) + jnp.log1p(total), ratio)


def integral(v: jax.Array, x: jax.Array) -> Found:
    """K. Averages over exp(-x cosh s) cosh(v s): v / x + <cosh s> is the ratio."""
    c, peak = jnp.hypot(v, x), jnp.arcsinh(v / x)
    last = peak + jnp.arccosh(1 + LEFT_OUT / c)
    first = jnp.maximum(0, peak - (LEFT_OUT + c) / jnp.maximum(v, 1e-30))
    # Nodes are not part of the derivative by v: the sum is right for any.
    first, step, top = lax.stop_gradient((first, (last - first) / NODES, v * peak - c))

    def add(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, weighted = carry
        s = first + jnp.asarray(i, x.dtype) * step
        grown = jnp.exp(s)
        cosh = (grown + 1 / grown) / 2
        weight = jnp.exp(v * s - x * cosh - top) * (1 + jnp.exp(-2 * v * s))
        weight = jnp.where(i == 0, weight / 2, weight)
        return total + weight, weighted + weight * cosh

    zero = jnp.zeros_like(x)
    total, weighted = lax.fori_loop(0, NODES + 1, add, (zero, zero), unroll=TOGETHER)
    return Found(top + jnp.log(total * step / 2), v / x + weighted / total)


def tiny(v: jax.Array, x: jax.Array) -> Found:
    """K where x^2 is nothing beside 1: Gamma(v) (2 / x)^v / 2, and for v < 1 the same of -v subtracted."""
    half = math.log(2) - jnp.log(x)
    low = jnp.minimum(v, 0.9)
    # Gamma(1 +- v) = exp(even -+ v odd): K = exp(even) sinh(v y) / v, y = log(2 / x) - odd.
    small = jnp.minimum(low, 0.01)
    square = jnp.square(small)
    odd = horner(_ODD, square)
    up, down = lax.lgamma(1 + low), lax.lgamma(1 - low)
    odd = jnp.where(low < 0.01, odd, (down - up) / (2 * jnp.where(low < 0.01, 1, low)))
    y = half - odd
    vy = low * y
    # log(sinh(v y) / v), of v y near 0 by its series.
    near, far = jnp.minimum(vy, 0.1), jnp.maximum(vy, 0.1)
    square = jnp.square(near)
    of_near = jnp.log(y) + jnp.log1p(square / 6 * (1 + square / 20 * (1 + square / 42 * (1 + square / 72))))
    of_far = far + jnp.log1p(-jnp.exp(-2 * far)) - jnp.log(2 * jnp.where(low > 0, low, 1))
    below = (up + down) / 2 + jnp.where(vy < 0.1, of_near, of_far)
    above = lax.lgamma(jnp.maximum(v, 0.5)) + v * half - math.log(2)
    log = jnp.where(v < 0.9, below, above)
    following = lax.lgamma(v + 1) + (v + 1) * half - math.log(2)  # of order v + 1
    return Found(log, jnp.where(v < 0.9, jnp.exp(following - log), 2 * v / x))


def log_gamma_1p(v: jax.Array) -> jax.Array:
    """log Gamma(1 + v), v >= 0; near 0 to the last digit of itself, which lgamma is not."""
    small = jnp.minimum(v, 0.05)
    # -gamma v + sum_k zeta(k) (-v)^k / k
    zeta = [1.6449340668482264, 1.2020569031595942, 1.0823232337111382, 1.0369277551433699, 1.0173430619844491]
    zeta += [1.0083492773819228, 1.0040773561979443, 1.0020083928260822, 1.0009945751278181, 1.0004941886041195]
    coefficients = [0.0, -_ODD[0], *((-1) ** k * z / k for k, z in enumerate(zeta, 2))]
    return jnp.where(v < 0.05, horner(coefficients, small), lax.lgamma(1 + v))


def horner(coefficients: Sequence[float], y: jax.Array) -> jax.Array:
    """Of ascending coefficients."""
    out = jnp.full_like(y, coefficients[-1])
    for a in coefficients[-2::-1]:
        out = out * y + np.asarray(a, y.dtype)
    return out
