# SPDX-License-Identifier: Apache-2.0
"""The published method to the letter, for comparison: seven expressions and a table that selects among them.

    mu_K       large arguments          K = 3, 20          log sum_{k <= K} (-+)^k c_k
    U_K        large orders             K = 4, 6, 9, 13    log sum_{k <= K} (+-)^k u_k(t) / v^k
    otherwise  log I: 41 terms of the ascending series; log K: Rothwell's integral, Simpson's rule of 600 intervals

Where it does not reach the last digits (Rothwell's integral 6e-10, mu_20 7e-13) it is left as it is: expressions.py is
what is accurate. Ratios are exponentials of differences of logarithms, as in the authors' estimators.

Source: Plesner, Soerensen, Hauberg, "Accurate Computation of the Logarithm of Modified Bessel Functions on GPUs", 2024,
table 1 and algorithm 1; Rothwell, "Computation of the logarithm of Bessel functions of complex argument", 2008.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.log_bessel.debye import polynomials
from pallas_kernels.log_bessel.elementary import horner
from pallas_kernels.log_bessel.expressions import Found

ASCENDING, INTERVALS, POWER = 41, 600, 8


def evaluate(v: jax.Array, x: jax.Array, *, first: bool) -> Found:
    """I, or with first=False K, of v >= 0 and x > 0 of one shape."""
    log = logarithm(v, x, first=first)
    return Found(log, jnp.exp(logarithm(v + 1, x, first=first) - log))


def logarithm(v: jax.Array, x: jax.Array, *, first: bool) -> jax.Array:
    log_x, log_v = jnp.log(x), jnp.where(v > 0, jnp.log(jnp.where(v > 0, v, 1)), -1000)
    # In order of priority: the first that holds.
    large_arguments = {
        3: ((x > 1400) & (v < 3.05)) | ((0.6229 * log_x - 3.2318 > log_v) & (v > 3.1)),
        20: ((x > 30) & (v < 15.3919)) | ((0.5113 * log_x + 0.7939 > log_v) & (x > 59.6925)),
    }
    large_orders = {
        4: ((x > 274.2377) & (v > 0.3)) | (v > 163.6993),
        6: ((x > 84.4153) & (v > 0.46)) | (v > 56.9971),
        9: ((x > 35.9074) & (v > 0.6)) | (v > 20.1534),
        13: ((x > 19.6931) & (v > 0.7)) | (v > 12.6964),
    }
    conditions = [*large_arguments.values(), *large_orders.values()]
    none = ~jnp.any(jnp.stack(conditions), axis=0)

    def where(region: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Elsewhere arguments that are harmless in every expression."""
        return jnp.where(region, v, 1), jnp.where(region, x, 40)

    values = [mu(*where(region), terms, first=first) for terms, region in large_arguments.items()]
    values += [uniform(*where(region), terms, first=first) for terms, region in large_orders.items()]
    fallback = ascending if first else rothwell
    return jnp.select(conditions, values, fallback(jnp.where(none, v, 1), jnp.where(none, x, 1)))


def mu(v: jax.Array, x: jax.Array, terms: int, *, first: bool) -> jax.Array:
    """c_k = c_{k-1} (4 v^2 - (2 k - 1)^2) / (8 k x)."""
    term, total = jnp.ones_like(x), jnp.ones_like(x)
    for k in range(1, terms + 1):
        term = term * (4 * v * v - (2 * k - 1) ** 2) / (8 * k * x) * (-1 if first else 1)
        total = total + term
    leading = x - 0.5 * jnp.log(2 * math.pi * x) if first else 0.5 * jnp.log(math.pi / (2 * x)) - x
    return leading + jnp.log(jnp.abs(total))


def uniform(v: jax.Array, x: jax.Array, terms: int, *, first: bool) -> jax.Array:
    """Debye's expansion in powers of 1 / v."""
    sign, ratio = (1 if first else -1), x / v
    root = jnp.sqrt(1 + ratio * ratio)
    t, eta = 1 / root, root + jnp.log(ratio / (1 + root))
    total = jnp.ones_like(x)
    for k, p in enumerate(polynomials(terms)[0], 1):
        total = total + sign**k * t**k * horner(p, t * t) / v**k
    leading = -0.5 * jnp.log(2 * math.pi * v) if first else 0.5 * jnp.log(math.pi / (2 * v))
    return leading + sign * v * eta - 0.25 * jnp.log1p(ratio * ratio) + jnp.log(jnp.abs(total))


def ascending(v: jax.Array, x: jax.Array) -> jax.Array:
    """T_k = T_{k-1} - log(k (k q + v q)), q = 4 / x^2, over the largest, whose index is known."""
    q = 4 / (x * x)
    terms = [-lax.lgamma(v + 1)]
    for k in range(1, ASCENDING):
        terms.append(terms[-1] - jnp.log(k * (k * q + v * q)))
    every = jnp.stack(terms)
    index = jnp.clip(jnp.floor((jnp.hypot(v, x) - v) / 2), 0, ASCENDING - 1).astype(jnp.int32)
    largest = jnp.take_along_axis(every, index[None], axis=0)[0]
    return v * jnp.log(x / 2) + largest + jnp.log(jnp.sum(jnp.exp(every - largest), axis=0))


def rothwell(v: jax.Array, x: jax.Array) -> jax.Array:
    """K = sqrt(pi) e^-x / ((2 x)^v Gamma(v + 1/2)) integral_0^1 g(u) + h(u) du."""
    beta = 2 * POWER / (2 * v + 1)

    def add(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        most, total = carry
        u = jnp.asarray(i, x.dtype) / INTERVALS
        weight = jnp.log(jnp.where(i == INTERVALS, 1, jnp.where(i % 2 == 1, 4, 2)).astype(x.dtype))
        power = u**beta
        g = jnp.log(beta) - power + (v - 0.5) * jnp.log(2 * x + power) + (POWER - 1) * jnp.log(u)
        h = -1 / u - (2 * v + 1) * jnp.log(u) + (v - 0.5) * jnp.log(2 * x * u + 1)
        highest = jnp.maximum(most, jnp.maximum(g, h) + weight)
        added = jnp.exp(g + weight - highest) + jnp.exp(h + weight - highest)
        return highest, total * jnp.exp(most - highest) + added

    start = jnp.full_like(x, jnp.finfo(x.dtype).min), jnp.zeros_like(x)
    most, total = lax.fori_loop(1, INTERVALS + 1, add, start)
    constant = 0.5 * math.log(math.pi) - math.log(3 * INTERVALS)
    return constant - lax.lgamma(v + 0.5) - v * jnp.log(2 * x) - x + most + jnp.log(total)
