# SPDX-License-Identifier: Apache-2.0
"""log_bessel on TPUs, in float32: registers of elements vote, and evaluate what one of them needs.

    block    [ROWS, 128] elements in VMEM, copied while the one before it is computed
    vote     of GROUP rows at a time: what an expression keeps stays in registers

There is no float64: XLA has it on TPUs, in software.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.core.tpu import LANES, round_up
from pallas_kernels.core.varying import vary_like
from pallas_kernels.log_bessel.edges import Keep
from pallas_kernels.log_bessel.expressions import Found
from pallas_kernels.log_bessel.reference import Ways, only_if, select

ROWS, GROUP = 512, 16


def supports(call: Call, device: Device) -> Refusal | None:
    if device.platform != "tpu":
        return Refusal(f"its kernel is for TPUs, and this is {device.platform}")
    if not device.arch:
        return Refusal(f"its kernel is compiled for TPU v4 and later, and this is {device.kind}")
    if call.option("mode") == "paper":
        return Refusal('mode="paper" is the published method, which has no kernel')
    if (dtype := call.arguments[0].dtype) != "float32":
        return Refusal(f"kernels on TPUs compute in float32, not in {dtype}")
    return None


def evaluate(v: jax.Array, x: jax.Array, *, first: bool, keep: Keep, large_order: bool) -> Any:
    """As `reference.evaluate`."""
    n = x.size
    rows = round_up(pl.cdiv(n, LANES), GROUP)
    block = min(ROWS, rows)
    rows = round_up(rows, block)
    v, x = vary_like((v, x), (v, x))
    arguments = [jnp.pad(a.ravel(), (0, rows * LANES - n), constant_values=1).reshape(rows, LANES) for a in (v, x)]

    def kernel(v_ref: Any, x_ref: Any, *out: Any) -> None:
        @pl.loop(0, block // GROUP)
        def _(i: Any) -> None:
            here = pl.ds(pl.multiple_of(i * GROUP, GROUP), GROUP)
            v, x = v_ref[here, :], x_ref[here, :]
            found = select(v, x, Ways(only_if, lambda x: x), first=first, keep=keep, large_order=large_order)
            for ref, array in zip(out, jax.tree.leaves(found), strict=True):
                ref[here, :] = array

    shape = jax.ShapeDtypeStruct((rows, LANES), x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
    kept = keep(cast(Any, Found)(shape, shape))
    spec = pl.BlockSpec((block, LANES), lambda i: (i, 0))
    out = pl.pallas_call(
        kernel,
        out_shape=jax.tree.leaves(kept),
        grid=(rows // block,),
        in_specs=[spec, spec],
        out_specs=[spec] * len(jax.tree.leaves(kept)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(flops=400 * n, transcendentals=0, bytes_accessed=12 * n),
        name=f"log_bessel_{'i' if first else 'k'}",
    )(*arguments)
    return jax.tree.unflatten(jax.tree.structure(kept), [a.ravel()[:n].reshape(x.shape) for a in out])
