# SPDX-License-Identifier: Apache-2.0
"""THE SPECIFICATION of log_bessel: every expression, and of each element the one whose region it is in."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.log_bessel.edges import Keep, everywhere
from pallas_kernels.log_bessel.expressions import (
    LARGE,
    ascending,
    effort,
    hypot,
    large,
    recurrence,
)

Compute = Callable[[], Any]
When = Callable[[jax.Array, Compute, Compute | None], Any]  # (which elements, what to compute for them, what otherwise)


def supports(call: Call, device: Device) -> Refusal | None:
    return None  # everything; "auto" never asks


def evaluate(v: jax.Array, x: jax.Array, *, first: bool, keep: Keep, large_order: bool = False) -> Any:
    """I, or with first=False K, of any v and x of one shape, as much of it as is kept; `large_order` if no v is below
    LARGE."""
    return select(v, x, lambda elements, there, otherwise: there(), first=first, keep=keep, large_order=large_order)


def select(v: jax.Array, x: jax.Array, when: When, *, first: bool, keep: Keep, large_order: bool) -> Any:
    """As `evaluate`. `when` decides what is computed: all, or what some element needs."""

    def inside(v: jax.Array, x: jax.Array) -> Any:
        return by_region(v, x, when, first=first, keep=keep, large_order=large_order)

    return everywhere(v, x, inside, first=first, keep=keep)


def by_region(v: jax.Array, x: jax.Array, when: When, *, first: bool, keep: Keep, large_order: bool) -> Any:
    """Each element by the expression of its region, of v >= 0 and x > 0, finite."""
    c = hypot(v, x)

    # Regions are asked for anew in each expression: kernels cannot take truth values into a branch, nor negate them.
    def far() -> jax.Array:
        return c >= LARGE

    def below() -> jax.Array:
        return c < LARGE

    def debye(levels: tuple[tuple[float, int], ...]) -> Any:
        """As many terms as the element with the least c needs."""
        (_, terms), *fewer = levels

        def these() -> Any:
            arguments = (v, x) if large_order else _instead(far(), v, x, 2 * LARGE)
            return keep(large(*arguments, first=first, terms=terms))

        return when(far() & (c < fewer[0][0]), these, lambda: debye(tuple(fewer))) if fewer else these()

    def near() -> Any:
        safe = _instead(below(), v, x, 1)
        return keep(ascending(*safe) if first else recurrence(*safe))

    levels = effort(x.dtype).debye
    if large_order:
        return debye(levels)
    large_ones, others = when(far(), lambda: debye(levels), None), when(below(), near, None)
    return jax.tree.map(functools.partial(jnp.where, far()), large_ones, others)


def _instead(region: jax.Array, v: jax.Array, x: jax.Array, harmless: float) -> tuple[jax.Array, jax.Array]:
    """Outside of the region other arguments, so that no derivative there is NaN."""
    return jnp.where(region, v, harmless), jnp.where(region, x, harmless)
