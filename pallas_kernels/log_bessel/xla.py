# SPDX-License-Identifier: Apache-2.0
"""log_bessel through XLA: the specification, without expressions that no element needs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.log_bessel import reference
from pallas_kernels.log_bessel.edges import Keep
from pallas_kernels.log_bessel.reference import Ways, only_if

BLOCK = 1 << 15  # elements that a CPU's caches hold, intermediate ones and all, and enough for a thread to be worth it


def supports(call: Call, device: Device) -> Refusal | None:
    return None  # everything


def evaluate(v: jax.Array, x: jax.Array, *, first: bool, keep: Keep, large_order: bool) -> Any:
    """As `reference.evaluate`. On a CPU block by block."""

    def compute(v: jax.Array, x: jax.Array) -> Any:
        return reference.select(
            v, x, Ways(only_if, lax.optimization_barrier), first=first, keep=keep, large_order=large_order
        )

    def in_blocks(v: jax.Array, x: jax.Array) -> Any:
        whole = x.size // BLOCK * BLOCK
        blocks = tuple(a.ravel()[:whole].reshape(-1, BLOCK) for a in (v, x))
        found = jax.tree.map(jnp.ravel, lax.map(lambda block: compute(*block), blocks))
        if whole < x.size:
            rest = compute(v.ravel()[whole:], x.ravel()[whole:])
            found = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), found, rest)
        return jax.tree.map(lambda a: a.reshape(x.shape), found)

    if x.size <= BLOCK:
        return compute(v, x)
    return lax.platform_dependent(v, x, cpu=in_blocks, default=compute)
