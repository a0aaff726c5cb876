# SPDX-License-Identifier: Apache-2.0
"""What kernels for NVIDIA GPUs share: products by mma.sync, copies, and tiles in shared memory."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import device as device_lib

Ref = Any


def product(acc: jax.Array, left: Ref, right: Ref, *, transpose: bool = True) -> jax.Array:
    """acc + left @ right^T (or right), both in shared memory, left [m, k], which may be of 8 bits.

    By slices of 64 of the depth, the width of a swizzled tile: loaded at once, operands would fill the registers.
    """
    depth, dtype = left.shape[1], right.dtype
    for start in range(0, depth, 64):
        d = pl.ds(start, min(64, depth - start))
        operand = right.at[:, d].transpose((1, 0)) if transpose else right.at[d]
        a = widen(plgpu.load(left.at[:, d], layout=plgpu.Layout.MMA_LHS(dtype)), dtype)
        acc = plgpu.mma(acc, a, plgpu.load(operand, layout=plgpu.Layout.MMA_RHS(dtype)))
    return acc


def widen(x: jax.Array, dtype: Any) -> jax.Array:
    """int8, float8_e4m3fn or float8_e5m2 in bfloat16 or float16, exactly; a 16-bit `x` is itself.

    float8 takes one cvt for two numbers to float16, int8 on Hopper prmt, two masks and a subtraction for two numbers to
    bfloat16. An integer's own conversion is a quarter as fast as an addition: other int8 is added to the last bits of
    1.5 * 2^23.
    """
    if x.dtype == dtype:
        return x
    if x.dtype != jnp.int8:
        return x.astype(jnp.float16) if dtype == jnp.float16 else x.astype(jnp.float32).astype(dtype)
    if dtype == jnp.bfloat16 and device_lib.current().arch == "sm90":
        return x.astype(dtype)
    offset = 1.5 * 2**23
    bits = x.astype(jnp.int32) + np.float32(offset).view(np.int32)
    return (lax.bitcast_convert_type(bits, jnp.float32) - offset).astype(dtype)


class Tma:
    """Copies of Hopper: one thread asks, the copy engine arrives at a barrier, and fills what is out of bounds by 0."""

    fill = True

    def barrier(self, copies: int, slots: int = 1) -> Any:
        return plgpu.Barrier(num_arrivals=copies, num_barriers=slots)

    def start(self, source: Ref, target: Ref, barrier: Ref) -> None:
        plgpu.copy_gmem_to_smem(source, target, barrier)

    def wait(self, barrier: Ref, in_flight: int, full: Any) -> None:
        del in_flight, full
        plgpu.barrier_wait(barrier)

    def store(self, x: jax.Array, smem: Ref, gmem: Ref) -> None:
        smem[...] = x.astype(smem.dtype)
        self.send(smem, gmem)

    def send(self, smem: Ref, gmem: Ref) -> None:
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, gmem)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


class CpAsync:
    """Copies of Ampere: each thread asks for its 16 bytes, and waits until all but the last few groups are there."""

    fill = False  # cp.async could; Mosaic has no way to ask for it

    def barrier(self, copies: int, slots: int = 1) -> None:
        return None

    def start(self, source: Ref, target: Ref, barrier: None) -> None:
        plgpu.copy_gmem_to_smem(source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

    def wait(self, barrier: None, in_flight: int, full: Any) -> None:
        # Towards the end fewer copies follow than `in_flight`: there is no counting on them.
        pl.when(full)(lambda: plgpu.wait_gmem_to_smem(in_flight))
        pl.when(jnp.logical_not(full))(lambda: plgpu.wait_gmem_to_smem(0))

    def store(self, x: jax.Array, smem: Ref, gmem: Ref) -> None:
        smem[...] = x.astype(smem.dtype)
        self.send(smem, gmem)

    def send(self, smem: Ref, gmem: Ref) -> None:
        # An accumulator's layout does not write whole sectors; 16 adjacent bytes a thread do.
        layout = plgpu.Layout.SMEM_GMEM_COPY(smem.shape, smem.dtype, swizzle=swizzle_bytes(smem.shape[-1]))
        store(gmem, plgpu.load(smem, layout=layout))


def copies_of_device() -> Tma | CpAsync:
    return Tma() if device_lib.current().arch == "sm90" else CpAsync()


class Ring(NamedTuple):
    """Slots of shared memory that successive tiles take in turn."""

    copies: Tma | CpAsync
    stages: int
    parts: Sequence[tuple[Callable[[Any], Ref], Ref]]  # where a step's part comes from, and its slots
    barriers: Ref | None

    def start(self, step: Any, live: Any) -> None:
        """Asks for the tiles of a step, if there is one. The slot's readers are done: Mosaic puts a barrier here."""

        @pl.when(step < live)
        def _():
            for source, slots in self.parts:
                self.copies.start(source(step), slots.at[step % self.stages], self._barrier(step))

    def wait(self, step: Any, in_flight: int, full: Any) -> list[Ref]:
        """The tiles of a step, once they are there. `in_flight` copies were started since, where `full` holds."""
        self.copies.wait(self._barrier(step), in_flight, full)
        return [slots.at[step % self.stages] for _, slots in self.parts]

    def _barrier(self, step: Any) -> Ref | None:
        return None if self.barriers is None else self.barriers.at[step % self.stages]


def store(gmem: Ref, x: jax.Array) -> None:
    """From registers to global memory. JAX 0.12 refuses rows of less than 128 bytes, unless asked like this."""
    function: Any = getattr(plgpu, "store", None)
    if function is None:
        gmem[...] = x
    else:
        function(gmem, x, optimized=False)


def cost_option(flops: int, transcendentals: int, bytes_accessed: int) -> dict[str, Any]:
    """The option of `plgpu.kernel` that says what a kernel costs; jax 0.11 has none."""
    if "cost_estimate" not in inspect.signature(plgpu.kernel).parameters:
        return {}
    cost = pl.CostEstimate(flops=flops, transcendentals=transcendentals, bytes_accessed=bytes_accessed)
    return {"cost_estimate": cost}


def swizzle_bytes(width: int, itemsize: int = 2) -> int:
    """Bytes of a swizzled row, of the widest of 64, 32 and 16 elements that divides `width`. ldmatrix meets no bank
    twice, nor do threads that read 2 or 8 bytes of an 8-bit tile where they would read 4 or 16 of a 16-bit one."""
    return itemsize * next(columns for columns in (64, 32, 16) if width % columns == 0)


def tile_memory(*shape: int, dtype, depth: int | None = None) -> Any:
    """Shared memory for a tile (or several), swizzled for ldmatrix and wgmma (those of 16 bits). `depth` is the size
    of the axis that a wgmma sums over, if it is not the last: it has to be whole swizzled tiles, too."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = swizzle_bytes(shape[-1] if depth is None else math.gcd(shape[-1], depth), itemsize)
    tiling: Any = plgpu.TilingTransform
    swizzling: Any = plgpu.SwizzleTransform
    return plgpu.SMEM(shape, dtype, transforms=(tiling((8, swizzle // itemsize)), swizzling(swizzle)))
