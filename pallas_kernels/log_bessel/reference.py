# SPDX-License-Identifier: Apache-2.0
"""THE SPECIFICATION of log_bessel: every expression, and of each element the one whose region it is in."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.core.varying import vary_like
from pallas_kernels.log_bessel.edges import Keep, everywhere
from pallas_kernels.log_bessel.expressions import (
    LARGE,
    Once,
    ascending,
    effort,
    hypot,
    large,
    recurrence,
)

Compute = Callable[[], Any]


class Ways(NamedTuple):
    """How an implementation goes through the expressions.

    Attributes:
      when: (some, there, otherwise) -> what `there` computes, which some element needs or not; if not, anything of that
        shape, or what `otherwise` computes.
      once: see expressions.py.
    """

    when: Callable[[jax.Array, Compute, Compute | None], Any]
    once: Once


def only_if(some: jax.Array, there: Compute, otherwise: Compute | None) -> Any:
    """A `when` by which what no element needs is not computed."""

    def nothing() -> Any:
        return jax.tree.map(lambda a: vary_like(jnp.ones(a.shape, a.dtype), some), jax.eval_shape(there))

    return lax.cond(some, there, otherwise or nothing)


def supports(call: Call, device: Device) -> Refusal | None:
    return None  # everything; "auto" never asks


def evaluate(v: jax.Array, x: jax.Array, *, first: bool, keep: Keep, large_order: bool = False) -> Any:
    """I, or with first=False K, of any v and x of one shape, as much of it as is kept; `large_order` if no v is below
    LARGE."""
    every = Ways(lambda some, there, otherwise: there(), lambda x: x)
    return select(v, x, every, first=first, keep=keep, large_order=large_order)


def select(v: jax.Array, x: jax.Array, ways: Ways, *, first: bool, keep: Keep, large_order: bool) -> Any:
    """As `evaluate`. `ways` decides what is computed: all, or what some element needs."""

    def inside(v: jax.Array, x: jax.Array) -> Any:
        return by_region(v, x, ways, first=first, keep=keep, large_order=large_order)

    return everywhere(v, x, inside, first=first, keep=keep)


def by_region(v: jax.Array, x: jax.Array, ways: Ways, *, first: bool, keep: Keep, large_order: bool) -> Any:
    """Each element by the expression of its region, of v >= 0 and x > 0, finite."""
    c, levels = ways.once(hypot(v, x)), effort(x.dtype).debye
    # What some element needs, by one minimum or maximum each, in float32, which kernels have: rounding only adds to it.
    rounded = c.astype(jnp.float32)
    least, most = jnp.min(rounded), jnp.max(rounded)
    least_large = least if large_order else jnp.min(jnp.where(c >= LARGE, rounded, jnp.inf))

    def far() -> Any:
        # Asked for anew: kernels cannot take truth values of elements into a branch.
        arguments = (v, x) if large_order else _instead(c >= LARGE, v, x, 2 * LARGE)

        def debye(at: int) -> Any:
            """As many terms as the element with the least c needs."""

            def these() -> Any:
                return keep(large(*arguments, first=first, terms=levels[at][1]))

            if at + 1 == len(levels):
                return these()
            return ways.when(least_large <= levels[at + 1][0], these, lambda: debye(at + 1))

        return debye(0)

    def near() -> Any:
        arguments = _instead(c < LARGE, v, x, 1)
        return keep((ascending if first else recurrence)(*arguments, ways.once))

    if large_order:
        return far()
    large_ones, others = ways.when(most >= LARGE, far, None), ways.when(least <= LARGE, near, None)
    return jax.tree.map(functools.partial(jnp.where, c >= LARGE), large_ones, others)


def _instead(region: jax.Array, v: jax.Array, x: jax.Array, harmless: float) -> tuple[jax.Array, jax.Array]:
    """Outside of the region other arguments, so that no derivative there is NaN."""
    return jnp.where(region, v, harmless), jnp.where(region, x, harmless)
