# SPDX-License-Identifier: Apache-2.0
"""log_bessel through XLA: the specification, without what orders that are known to be large cannot need."""

import jax

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.log_bessel import reference
from pallas_kernels.log_bessel.expressions import Found, large


def supports(call: Call, device: Device) -> Refusal | None:
    return None  # everything


def evaluate(v: jax.Array, x: jax.Array, *, first: bool, large_order: bool) -> Found:
    """As `reference.evaluate`; `large_order` if no v is below LARGE."""
    return large(v, x, first=first) if large_order else reference.evaluate(v, x, first=first)
