# SPDX-License-Identifier: Apache-2.0
"""THE SPECIFICATION of log_bessel: every expression, and of each element the one whose region it is in."""

import jax
import jax.numpy as jnp

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.log_bessel.expressions import LARGE, TINY, Found, integral, large, series, tiny


def supports(call: Call, device: Device) -> Refusal | None:
    return None  # everything; "auto" never asks


def evaluate(v: jax.Array, x: jax.Array, *, first: bool, large_order: bool = False) -> Found:
    """I, or with first=False K, of v >= 0 and x > 0 of one shape; `large_order` changes nothing here."""
    far = jnp.hypot(v, x) >= LARGE
    near_zero = x < TINY
    one = jnp.ones_like(x)

    def where(region: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Arguments of an expression; outside of its region harmless ones, so that no derivative there is NaN."""
        return jnp.where(region, v, one), jnp.where(region, x, one)

    at_far = jnp.where(far, v, 2 * LARGE), jnp.where(far, x, 2 * LARGE)
    found = large(*at_far, first=first)
    if first:
        return _select(far, found, series(*where(~far)))
    close = _select(near_zero, tiny(*where(near_zero & ~far)), integral(*where(~far & ~near_zero)))
    # Of large orders too, Debye's expansion holds whatever x is.
    return _select(far, found, close)


def _select(region: jax.Array, there: Found, elsewhere: Found) -> Found:
    return Found(*(jnp.where(region, a, b) for a, b in zip(there, elsewhere, strict=True)))
