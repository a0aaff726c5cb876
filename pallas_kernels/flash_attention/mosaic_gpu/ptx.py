# SPDX-License-Identifier: Apache-2.0
"""The few instructions that Pallas has no word for, as inline PTX."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl  # noqa: F401  (registers the lowering rules)
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

ROWS = plgpu.Layout.WGMMA.reduce(1)


def named_barrier_arrive(index: jax.Array, threads: int) -> None:
    """Arrives at a hardware barrier without waiting. Cheaper than an mbarrier, on which all 128 threads arrive."""
    _named_barrier("arrive", index, threads)


def named_barrier_wait(index: jax.Array, threads: int) -> None:
    """Arrives at a hardware barrier and waits until `threads` threads have."""
    _named_barrier("sync", index, threads)


def _named_barrier(operation: str, index: jax.Array, num_threads: int) -> None:
    def bar_op(_, index):
        mgpu.utils.inline_ptx(f"bar.{operation} $0, {num_threads};", index.registers[()])

    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    inline(bar_op)(index)


def warp_any_positive(rows: jax.Array) -> jax.Array:
    """1 if some of a warp's rows is positive, else 0. The same within a warp, not within a warpgroup: branch on it
    only over arithmetic that threads do each for themselves."""

    def any_positive(_, rows):
        i32 = ir.IntegerType.get_signless(32)
        # A thread of a wgmma accumulator holds two rows.
        first, second = (_scalar(register, i32) for register in rows.registers.flat)
        code = (
            "{ .reg .pred p, q; .reg .f32 t; max.f32 t, $1, $2; setp.gt.f32 p, t, 0f00000000;"
            " vote.sync.any.pred q, p, 0xffffffff; selp.b32 $0, 1, 0, q; }"
        )
        vote = llvm.inline_asm(i32, [first, second], code, "=r,f,f", has_side_effects=True)
        return mgpu.FragmentedArray.splat(vote, (), is_signed=True)

    scalar = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT)
    inline: Any = plgpu.inline_mgpu(arg_types=(ROWS,), return_type=scalar)
    return inline(any_positive)(rows)


def _scalar(register, i32):
    if not isinstance(register.type, ir.VectorType):
        return register
    zero = llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, 0)).result
    return llvm.extractelement(register, zero)
