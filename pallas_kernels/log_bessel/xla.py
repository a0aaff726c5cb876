# SPDX-License-Identifier: Apache-2.0
"""log_bessel through XLA: the specification, without expressions that no element needs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.core.varying import vary_like
from pallas_kernels.log_bessel import reference
from pallas_kernels.log_bessel.expressions import Found, large


def supports(call: Call, device: Device) -> Refusal | None:
    return None  # everything


def evaluate(v: jax.Array, x: jax.Array, *, first: bool, large_order: bool) -> Found:
    """As `reference.evaluate`; `large_order` if no v is below LARGE."""
    return large(v, x, first=first) if large_order else reference.by_region(v, x, _if_any, first=first)


def _if_any(region: jax.Array, expression: Callable[[], Found]) -> Found:
    """An expression that no element needs is not computed."""
    kind = jax.eval_shape(expression).log

    def harmless() -> Found:
        ones = vary_like(jnp.ones(kind.shape, kind.dtype), region)
        return Found(ones, ones)

    return lax.cond(jnp.any(region), expression, harmless)
