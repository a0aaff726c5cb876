# SPDX-License-Identifier: Apache-2.0
"""The few instructions that Pallas has no word for, as inline PTX."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl  # noqa: F401  (registers the lowering rules)
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm

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


def fence_shared_memory() -> None:
    """What this thread wrote to shared memory, products and copies that start behind the next barrier see. The half of
    `plgpu.commit_smem` that is not a barrier of the warpgroup, where another barrier follows anyway."""

    def fence_async_shared_cta(_):
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    plgpu.inline_mgpu()(fence_async_shared_cta)()


def wait_for_reads_of_copies() -> None:
    """The copies that this thread has sent out of shared memory have read it. As `plgpu.wait_smem_to_gmem(0, True)`,
    but for the warpgroup only behind its next barrier."""

    def copies_have_read(_):
        nvvm.cp_async_bulk_wait_group(0, read=True)

    plgpu.inline_mgpu()(copies_have_read)()


def round_to_int32(x: jax.Array) -> jax.Array:
    """Nearest integers of a tile, in one instruction, which takes what is out of range to the limits and NaN to 0.
    `astype` does the same by four more."""

    def nearest_int32(_, x):
        i32 = ir.IntegerType.get_signless(32)

        def of_register(register):
            lanes = ir.VectorType(register.type).shape[0]
            integers = llvm.mlir_undef(ir.VectorType.get((lanes,), i32))
            for lane in range(lanes):
                index = llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, lane)).result
                code = "cvt.rni.s32.f32 $0, $1;"
                integer = llvm.inline_asm(i32, [llvm.extractelement(register, index)], code, "=r,f")
                integers = llvm.insertelement(integers, integer, index)
            return integers

        registers = np.vectorize(of_register, otypes=[object])(x.registers)
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=True)

    layout = plgpu.Layout.WGMMA
    inline: Any = plgpu.inline_mgpu(
        arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.int32, layout=layout)
    )
    return inline(nearest_int32)(x)


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
