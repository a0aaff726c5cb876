# SPDX-License-Identifier: Apache-2.0
"""Blocks of a cluster on Hopper read each other's shared memory. `plgpu.cluster_ref` takes no slices (in jax 0.11 and
0.12), so this is inline PTX.

    part[...] = mine                     each block leaves what it has summed up
    cluster.sync()
    for peer in others:                  in order, so that sums repeat bit for bit
        total += cluster.load(part, peer, layout)
    cluster.sync()                       no block is gone while others read from it

Mosaic has blocks of a cluster wait for each other when they begin; when they end, it does not.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

Ref = Any


def sync() -> None:
    """All threads of all blocks of the cluster wait here; what they have written to shared memory is seen behind."""

    def cluster_sync(_):
        mgpu.utils.inline_ptx("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;")

    plgpu.inline_mgpu()(cluster_sync)()


def load(ref: Ref, block: jax.Array | int, layout: Any) -> jax.Array:
    """What lies at `ref`, float32 in shared memory without transforms, in another block of the cluster: the one of
    that rank. The last axis of a cluster counts first."""

    def load_from_block(_, ref, block):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        tiled = layout.to_mgpu()
        memref = ir.MemRefType(ref.type)
        strides, _ = memref.get_strides_and_offset()
        pointer = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(ref))
        base = llvm.inline_asm(
            i32, [pointer, block.registers[()]], "mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", has_side_effects=True
        )
        width = tiled.vector_length
        shape = tuple(memref.shape)
        registers = np.empty(tiled.registers_shape(shape), object)
        for at, index in zip(np.ndindex(registers.shape), tiled.thread_idxs(shape), strict=True):
            terms = zip(index, strides, strict=True)
            element = sum_of(arith.muli(arith.index_castui(i32, i), mgpu.c(stride, i32)) for i, stride in terms)
            address = arith.addi(base, arith.muli(element, mgpu.c(4, i32)))
            registers[at] = load_vector(address, width, f32)
        return mgpu.FragmentedArray(_registers=registers, _layout=tiled, _is_signed=None)

    def sum_of(terms):
        total, *others = terms
        for term in others:
            total = arith.addi(total, term)
        return total

    def load_vector(address, width, f32):
        names = ", ".join(f"${i}" for i in range(width))
        code = f"ld.shared::cluster.{f'v{width}.' if width > 1 else ''}f32 {{{names}}}, [${width}];"
        constraints = ",".join(["=f"] * width + ["r"])
        result = f32 if width == 1 else llvm.StructType.get_literal([f32] * width)
        loaded = llvm.inline_asm(result, [address], code, constraints, has_side_effects=True)
        vector = llvm.mlir_undef(ir.VectorType.get((width,), f32))
        for lane in range(width):
            value = loaded if width == 1 else llvm.extractvalue(f32, loaded, [lane])
            vector = llvm.insertelement(vector, value, mgpu.c(lane, ir.IntegerType.get_signless(32)))
        return vector

    result = plgpu.ShapeDtypeStruct(ref.shape, jnp.float32, layout=layout)
    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=result)
    return inline(load_from_block)(ref, jnp.asarray(block, jnp.int32))
