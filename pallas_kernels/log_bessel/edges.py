# SPDX-License-Identifier: Apache-2.0
"""Where the expressions are not: 0, infinities, negative orders, NaN. The table is in the docstrings of api.py."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.log_bessel.expressions import Found

Keep = Callable[[Found], Any]  # which of the two is wanted


def everywhere(
    v: jax.Array, x: jax.Array, inside: Callable[[jax.Array, jax.Array], Any], *, first: bool, keep: Keep
) -> Any:
    """I, or with first=False K, of any v and x; `inside` says what they are where v >= 0 and x > 0 are finite."""
    there = within(v, x)
    found = inside(jnp.where(there, jnp.where(v < 0, -v, v), 1), jnp.where(there, x, 1))
    outside, wrong = edges(v, x, first=first)

    def put(found: jax.Array, outside: jax.Array, wrong: jax.Array) -> jax.Array:
        return jnp.where(wrong, jnp.nan, jnp.where(there, found, outside))

    return jax.tree.map(put, found, keep(outside), keep(wrong))


def within(v: jax.Array, x: jax.Array) -> jax.Array:
    """Where the expressions are: by comparisons that NaN fails, and kernels have."""
    return (x > 0) & (x < jnp.inf) & (jnp.abs(v) < jnp.inf)


def edges(v: jax.Array, x: jax.Array, *, first: bool) -> tuple[Found, Found]:
    """(values at 0 and infinities, whether they are none)."""
    inf, endless = jnp.full_like(x, jnp.inf), jnp.abs(v) == jnp.inf
    nan = (v != v) | (x != x) | (x < 0) | (endless & (x == jnp.inf))
    if first:
        log = jnp.where(x == 0, jnp.where(v == 0, 0, -inf), jnp.where(endless, -inf, inf))
        ratio = jnp.where((x == 0) | endless, 0, jnp.ones_like(x))
        # I_{-n} = I_n of integers alone.
        broken = lax.round(v, lax.RoundingMethod.TO_NEAREST_EVEN) != v
        return Found(log, ratio), Found(nan | ((v < 0) & broken), nan | (v < 0))
    none = (x == 0) | endless
    return Found(jnp.where(none, inf, -inf), jnp.where(none, inf, 1)), Found(nan, nan | (v < 0))
