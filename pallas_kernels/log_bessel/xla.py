# SPDX-License-Identifier: Apache-2.0
"""log_bessel through XLA: the specification, without what an order that is known beforehand cannot need."""

import jax

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.log_bessel import reference
from pallas_kernels.log_bessel.expressions import LARGE, Found, large


def supports(call: Call, device: Device) -> Refusal | None:
    return None  # everything


def evaluate(v: jax.Array, x: jax.Array, *, first: bool, order: float | None) -> Found:
    """As `reference.evaluate`; `order` is v where that is one number known when the program is made."""
    if order is not None and order >= LARGE:
        return large(v, x, first=first)
    return reference.evaluate(v, x, first=first)
