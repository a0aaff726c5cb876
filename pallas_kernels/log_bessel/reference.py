# SPDX-License-Identifier: Apache-2.0
"""THE SPECIFICATION of log_bessel: every expression, and of each element the one whose region it is in."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.log_bessel.expressions import LARGE, TINY, Found, integral, large, series, tiny

Compute = Callable[[jax.Array, Callable[[], Found]], Found]


def supports(call: Call, device: Device) -> Refusal | None:
    return None  # everything; "auto" never asks


def evaluate(v: jax.Array, x: jax.Array, *, first: bool, large_order: bool = False) -> Found:
    """I, or with first=False K, of v >= 0 and x > 0 of one shape; `large_order` changes nothing here."""
    return by_region(v, x, lambda region, expression: expression(), first=first)


def by_region(v: jax.Array, x: jax.Array, compute: Compute, *, first: bool) -> Found:
    """Each element by the expression of its region; `compute(region, expression)` is what calls them, all or some."""
    far = jnp.hypot(v, x) >= LARGE
    near_zero = ~far & (x < TINY)

    def there(region: jax.Array, expression: Callable[[jax.Array, jax.Array], Found], harmless: float) -> Found:
        """Outside of the region of other arguments, so that no derivative there is NaN."""
        return compute(region, lambda: expression(*(jnp.where(region, a, harmless) for a in (v, x))))

    found = there(far, functools.partial(large, first=first), 2 * LARGE)
    if first:
        return _select(far, found, there(~far, series, 1))
    close = _select(near_zero, there(near_zero, tiny, 1), there(~far & ~near_zero, integral, 1))
    return _select(far, found, close)


def _select(region: jax.Array, there: Found, elsewhere: Found) -> Found:
    return Found(*(jnp.where(region, a, b) for a, b in zip(there, elsewhere, strict=True)))
