# SPDX-License-Identifier: Apache-2.0
"""The polynomials of Debye's expansions, from exact rationals.

    u_0 = 1    u_{k+1}(t) = t^2 (1 - t^2) / 2 u_k'(t) + 1/8 integral_0^t (1 - 5 s^2) u_k(s) ds     = t^k P_k(t^2)
    w_{k+1}(t) = u_k(t) / 2 + t u_k'(t)                                                           = t^k W_{k+1}(t^2)

The first are those of I_v and K_v, and v_k = u_k + t (t^2 - 1) w_k those of their derivatives.

Source: NIST Digital Library of Mathematical Functions, 10.41(ii).
"""

import functools
from fractions import Fraction

Coefficients = tuple[tuple[float, ...], ...]


@functools.cache
def polynomials(count: int) -> tuple[Coefficients, Coefficients]:
    """Of P_1 ... P_count and of W_1 ... W_count, ascending in t^2."""
    u: dict[int, Fraction] = {0: Fraction(1)}  # by power of t
    of_u, of_w = [], []
    for k in range(count):
        w = {power: a * (Fraction(1, 2) + power) for power, a in u.items()}
        of_w.append(tuple(float(w[k + 2 * i]) for i in range(k + 1)))
        following: dict[int, Fraction] = {}
        for power, a in u.items():
            low, high = a * (Fraction(power, 2) + Fraction(1, 8 * (power + 1))), Fraction(5, 8 * (power + 3))
            following[power + 1] = following.get(power + 1, Fraction(0)) + low
            following[power + 3] = following.get(power + 3, Fraction(0)) - a * (Fraction(power, 2) + high)
        u = following
        of_u.append(tuple(float(u[k + 1 + 2 * i]) for i in range(k + 2)))
    return tuple(of_u), tuple(of_w)
