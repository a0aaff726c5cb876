# SPDX-License-Identifier: Apache-2.0
"""Sparse products of Hopper in inline PTX, and how their left operand comes into registers.

    wgmma.mma_async.sp.m64nRk32     z [64, R] += w [64, 32] x^T [32, R]      16-bit types: of 32 inputs 16 are kept
    wgmma.mma_async.sp.m64nRk64     z [64, R] += w [64, 64] x^T [64, R]      int8, summed in int32: of 64, 32

A step is two of them, 128 bytes of each row of x: a row of a swizzled tile. Thread t of a warpgroup holds

    VALUES [128, 8]     words 0 to 3 for the first product, 4 to 7 for the second, as weights.py stores them
    META [128, words]   which inputs are kept, one word for 64 of them: one a step of 16-bit types, two of int8
    SUMS [64, R]        64 outputs; rows of x along columns

Source: PTX ISA, "Asynchronous warpgroup level matrix multiply-accumulate for sparse matrices".
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fragments
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from pallas_kernels.core.inline import Ref, Value, array, constant, i32, inline, result, tiled, words_of

SUMS: Any = plgpu.Layout._WGMMA_ACC_32BIT
VALUES = tiled(((128, 8), (32, 8), (1, 8)), (-6,), (-4,))
PRODUCTS = 2  # of a step
_ROW = 128  # bytes of x in a step, those of a swizzled row
_STEP_BYTES = PRODUCTS * 128 * 16  # of a step's values
_KINDS = {"bfloat16": ("k32.f32.bf16.bf16", "f"), "float16": ("k32.f32.f16.f16", "f"), "int8": ("k64.s32.s8.s8", "r")}
_NUMBER, _REF = plgpu.Layout.WG_SPLAT, plgpu.RefType()


def meta_words(dtype: Any) -> int:
    """Of a step, in a thread."""
    return 2 if jnp.dtype(dtype) == jnp.int8 else 1


def _meta_layout(words: int) -> Any:
    return tiled(((128, words), (32, words), (1, words)), (-6,), (-4,))


def sum_type(dtype: Any) -> Any:
    return jnp.int32 if jnp.dtype(dtype) == jnp.int8 else jnp.float32


def slots(stages: int, rows: int, dtype: Any) -> Any:
    """Memory for rows of x of so many steps."""
    return plgpu.SMEM((stages, rows, _ROW // jnp.dtype(dtype).itemsize), dtype, transforms=_swizzled(dtype))


def _swizzled(dtype: Any) -> tuple:
    tiling, swizzling = plgpu.TilingTransform, plgpu.SwizzleTransform
    return tiling((8, _ROW // jnp.dtype(dtype).itemsize)), swizzling(_ROW)  # type: ignore[operator]


def zeros(rows: int, dtype: Any) -> jax.Array:
    """Sums before the first product of weights of a type."""
    kind = sum_type(dtype)

    def sparse_zeros(_):
        element = mgpu.utils.dtype_to_ir_type(jnp.dtype(kind))
        signed = True if kind == jnp.int32 else None
        return mgpu.FragmentedArray.splat(mgpu.c(0, element), (64, rows), SUMS.to_mgpu(), is_signed=signed)

    return inline(sparse_zeros, (), result(SUMS, (64, rows), kind))


def take(values: Ref, metadata: Ref, block: Any, step: Any) -> tuple[jax.Array, jax.Array]:
    """What is kept of a step of 64 outputs, from global memory: values [blocks, products, 128, 16 bytes] and metadata
    [blocks, words, 128]. Nothing waits for it but what uses it."""
    words = meta_words(values.dtype)

    def sparse_take(_, values, metadata, block, step):
        i64 = ir.IntegerType.get_signless(64)
        thread = arith.remui(mgpu.utils.thread_idx(), constant(128))
        steps = ir.MemRefType(metadata.type).shape[1] // words
        at = arith.addi(arith.muli(block.registers[()], constant(steps)), step.registers[()])

        def address(ref: Ref, of_step: int, of_thread: int) -> Value:
            of_threads = arith.extui(i64, arith.muli(thread, constant(of_thread)))
            of_steps = arith.muli(arith.extui(i64, at), mgpu.c(of_step, i64))
            base = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref))
            return arith.addi(base, arith.addi(of_steps, of_threads))

        at_values, at_metadata = address(values, _STEP_BYTES, 16), address(metadata, 512 * words, 4)
        kept = [word for i in range(PRODUCTS) for word in _look_up(at_values, 4, 2048 * i)]
        places = [word for i in range(words) for word in _look_up(at_metadata, 1, 512 * i)]
        return [
            array(VALUES, (128, 8), jnp.uint32, [kept]),
            array(_meta_layout(words), (128, words), jnp.uint32, [places]),
        ]

    kinds = [result(VALUES, (128, 8), jnp.uint32), result(_meta_layout(words), (128, words), jnp.uint32)]
    return tuple(inline(sparse_take, (_REF, _REF, _NUMBER, _NUMBER), kinds, values, metadata, block, step))


def multiply(sums: jax.Array, kept: tuple[jax.Array, jax.Array], x: Ref) -> jax.Array:
    """Starts the products of a step: sums [64, R] + w [64, ..] x^T, x [R, 128 bytes] in shared memory. What comes back
    is there behind `wait`."""
    rows, dtype, columns = sums.shape[1], x.dtype, _ROW // x.dtype.itemsize
    instruction, register = _KINDS[dtype.name]
    words = meta_words(dtype)

    def sparse_multiply(_, sums, values, meta, x):
        sums = fragments.optimization_barrier(sums)
        # 32 or 64 inputs of a row of x are 64 bytes, where a dense product would take 32.
        (descriptor, _), _, _ = mma_utils.create_descriptor(
            x, swizzle=_ROW, group_size=(rows, columns), logical_k_major=False, mma_bytewidth_k=64
        )
        nvvm.wgmma_fence_aligned()
        parts = [vector.extract(part, [], [0]) for part in sums.registers.flat]
        (values,), (meta,) = (map(words_of, one.registers.flat) for one in (values, meta))
        for i in range(PRODUCTS):
            # Two products of 16-bit types share a word of metadata: its lanes 0, 1 of a quad, then 2, 3.
            selector, places = (i, meta[0]) if words == 1 else (0, meta[i])
            at = arith.addi(descriptor, mgpu.c(i * 64 // 16, ir.IntegerType.get_signless(64)))
            operands = (values[4 * i : 4 * i + 4], at, places)
            parts = _start(f"m64n{rows}{instruction}", register, parts, operands, selector)
        nvvm.wgmma_commit_group_sync_aligned()
        return _as_sums(sums, parts)

    types = (SUMS, VALUES, _meta_layout(words), plgpu.RefType(_swizzled(dtype)))
    return inline(sparse_multiply, types, result(SUMS, sums.shape, sums.dtype), sums, *kept, x)


def wait(sums: jax.Array, kept: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The sums, when all products are done. What these read stays where it is until then: the compiler does not know
    that a product reads its metadata while it goes on, and would load the next into the same register."""

    def sparse_wait(_, sums, values, meta):
        nvvm.wgmma_wait_group_sync_aligned(0)
        read = [word for one in (values, meta) for part in one.registers.flat for word in words_of(part)]
        nothing = ir.Type.parse("!llvm.void")
        llvm.inline_asm(nothing, read, "// read until here", ",".join("r" * len(read)), has_side_effects=True)
        return fragments.optimization_barrier(sums)

    types = (SUMS, VALUES, _meta_layout(kept[1].shape[1]))
    return inline(sparse_wait, types, result(SUMS, sums.shape, sums.dtype), sums, *kept)


def as_float32(sums: jax.Array) -> jax.Array:
    """In the layout of dense products."""

    def sparse_as_float32(_, sums):
        sums = sums.to_layout(fragments.WGMMA_LAYOUT)
        return sums if sums.is_signed is None else sums.astype(ir.F32Type.get())

    return inline(sparse_as_float32, (SUMS,), result(plgpu.Layout.WGMMA, sums.shape, jnp.float32), sums)


def _look_up(address: Value, words: int, offset: int) -> list[Value]:
    """Adjacent words of global memory that no other thread of the multiprocessor reads."""
    names = ", ".join(f"${i}" for i in range(words))
    names, kind = (f"{{{names}}}", f"v{words}.u32") if words > 1 else (names, "u32")
    code = f"ld.global.nc.L1::no_allocate.{kind} {names}, [${words} + {offset}];"
    type_ = llvm.StructType.get_literal([i32()] * words) if words > 1 else i32()
    found = llvm.inline_asm(type_, [address], code, ",".join(["=r"] * words + ["l"]), has_side_effects=True)
    return [llvm.extractvalue(i32(), found, [i]) for i in range(words)] if words > 1 else [found]


def _start(
    shape: str, register: str, sums: Sequence[Value], operands: tuple[Sequence[Value], Value, Value], selector: int
) -> list[Value]:
    """One product: sums, in the same registers afterwards."""
    n, (values, x, places) = len(sums), operands
    of_sums, of_values = (", ".join(f"${i}" for i in span) for span in (range(n), range(2 * n, 2 * n + 4)))
    # Products of 16-bit types have signs of both operands, and may take x turned.
    signs = ", 1, 1, 0" if register == "f" else ""
    code = (
        f"{{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sp.sync.aligned.{shape} "
        f"{{{of_sums}}}, {{{of_values}}}, ${2 * n + 4}, ${2 * n + 5}, {selector}, p{signs}; }}"
    )
    constraints = ",".join([f"={register}"] * n + [str(i) for i in range(n)] + ["r"] * 4 + ["l", "r"])
    type_ = llvm.StructType.get_literal([sums[0].type] * n)
    made = llvm.inline_asm(type_, [*sums, *values, x, places], code, constraints, has_side_effects=True)
    return [llvm.extractvalue(sums[0].type, made, [i]) for i in range(n)]


def _as_sums(like: mgpu.FragmentedArray, parts: Sequence[Value]) -> mgpu.FragmentedArray:
    kind = ir.VectorType(like.registers.flat[0].type)
    made = np.empty(len(parts), object)
    made[:] = [vector.from_elements(kind, [part]) for part in parts]
    shape = like.registers.shape
    return mgpu.FragmentedArray(_registers=made.reshape(shape), _layout=like.layout, _is_signed=like.is_signed)
