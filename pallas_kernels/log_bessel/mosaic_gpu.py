# SPDX-License-Identifier: Apache-2.0
"""log_bessel on NVIDIA GPUs, float64 and float32: the elements of a tile vote, and it evaluates what one of them needs.

    tile          128 threads, T / 128 elements each, in registers from load to store
    vote          "is there one with c < 24?" is a maximum over the tile, and a branch that all its warps take
    expressions   those of expressions.py: 50 to 250 registers, no memory, no loop

Nothing is bound by bytes (24 an element in float64), and tiles of a few hundred elements agree more often than all do.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core.device import MMA_ARCHS, Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.core.mma import cost_option
from pallas_kernels.core.varying import vary_like
from pallas_kernels.log_bessel.edges import Keep
from pallas_kernels.log_bessel.expressions import Found
from pallas_kernels.log_bessel.reference import Ways, only_if, select

# Elements of a tile, of I and of K: smaller ones agree more often, larger ones share a vote; measured on an H100.
TILE = {"float64": {True: 256, False: 128}, "float32": {True: 256, False: 256}}


def supports(call: Call, device: Device) -> Refusal | None:
    if device.platform != "gpu" or device.arch not in MMA_ARCHS:
        return Refusal(f"it is for NVIDIA GPUs of Ampere, Ada and Hopper, and this is {device}")
    if call.option("mode") == "paper":
        return Refusal('mode="paper" is the published method, which has no kernel')
    return None


def evaluate(v: jax.Array, x: jax.Array, *, first: bool, keep: Keep, large_order: bool) -> Any:
    """As `reference.evaluate`."""
    tile = TILE[x.dtype.name][first]
    n, layout = x.size, plgpu.Layout.WG_STRIDED((tile,), vec_size=1)
    v, x = vary_like((v, x), (v, x))
    padded = [jnp.pad(a.ravel(), (0, -n % tile), constant_values=1) for a in (v, x)]

    def kernel(v_ref: Any, x_ref: Any, *out: Any) -> None:
        here = pl.ds(lax.axis_index("tile") * tile, tile)
        v, x = (plgpu.load(ref.at[here], layout=layout, optimized=False) for ref in (v_ref, x_ref))
        found = select(v, x, Ways(only_if, lambda x: x), first=first, keep=keep, large_order=large_order)
        for ref, array in zip(out, jax.tree.leaves(found), strict=True):
            ref[here] = array

    kernel.__name__ = f"log_bessel_{'i' if first else 'k'}"
    shape = jax.ShapeDtypeStruct(padded[0].shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
    kept = keep(cast(Any, Found)(shape, shape))
    out = plgpu.kernel(
        kernel,
        out_type=tuple(jax.tree.leaves(kept)),
        grid=(padded[0].size // tile,),
        grid_names=("tile",),
        **cost_option(flops=400 * n, transcendentals=0, bytes_accessed=3 * n * x.dtype.itemsize),
    )(*padded)
    return jax.tree.unflatten(jax.tree.structure(kept), [a[:n].reshape(x.shape) for a in out])
