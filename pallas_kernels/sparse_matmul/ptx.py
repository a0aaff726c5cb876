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
from pallas_kernels.sparse_matmul.config import TILE

SUMS: Any = plgpu.Layout._WGMMA_ACC_32BIT
VALUES = tiled(((128, 8), (32, 8), (1, 8)), (-6,), (-4,))
PRODUCTS = 2  # of a step
_ROW = 128  # bytes of x in a step, those of a swizzled row
_SHAPES = {"bfloat16": "k32.f32.bf16.bf16", "float16": "k32.f32.f16.f16", "int8": "k64.s32.s8.s8"}
_NUMBER, _REF = plgpu.Layout.WG_SPLAT, plgpu.RefType()


def meta_words(dtype: Any) -> int:
    """Of a step, in a thread."""
    return 2 if jnp.dtype(dtype) == jnp.int8 else 1


def _meta_layout(words: int) -> Any:
    return tiled(((128, words), (32, words), (1, words)), (-6,), (-4,))


def sum_type(dtype: Any) -> Any:
    return jnp.int32 if jnp.dtype(dtype) == jnp.int8 else jnp.float32


def elements(dtype: Any) -> int:
    """Of a row of x in a step."""
    return _ROW // jnp.dtype(dtype).itemsize


def slots(stages: int, rows: int, dtype: Any) -> Any:
    """Memory for rows of x, or of a dense weight, of so many steps."""
    return plgpu.SMEM((stages, rows, elements(dtype)), dtype, transforms=swizzled(dtype))


def swizzled(dtype: Any) -> tuple:
    """How rows of 128 bytes lie in shared memory."""
    tiling, swizzling = plgpu.TilingTransform, plgpu.SwizzleTransform
    return tiling((8, elements(dtype))), swizzling(_ROW)  # type: ignore[operator]


def zeros(rows: int, dtype: Any) -> jax.Array:
    """Sums before the first product of weights of a type."""
    kind = sum_type(dtype)

    def sparse_zeros(_):
        element = mgpu.utils.dtype_to_ir_type(jnp.dtype(kind))
        signed = True if kind == jnp.int32 else None
        return mgpu.FragmentedArray.splat(mgpu.c(0, element), (64, rows), SUMS.to_mgpu(), is_signed=signed)

    return inline(sparse_zeros, (), result(SUMS, (64, rows), kind))


def take(values: Ref, metadata: Ref, zero: Any) -> tuple[jax.Array, jax.Array]:
    """What is kept of a step of 64 outputs, from shared memory: values [32, 128 bytes] and metadata [words, 128]; each
    thread reads adjacent 16 bytes for each product. `zero` is of `wait`."""
    words = meta_words(values.dtype)

    def sparse_take(_, values, metadata, zero):
        thread = arith.remui(mgpu.utils.thread_idx(), constant(128))

        def address(ref: Ref, of_thread: int) -> Value:
            base = llvm.ptrtoint(i32(), mgpu.utils.memref_ptr(ref))
            return arith.addi(arith.addi(base, zero.registers[()]), arith.muli(thread, constant(of_thread)))

        at_values, at_metadata = address(values, 16), address(metadata, 4)
        kept = [word for i in range(PRODUCTS) for word in _look_up(at_values, 4, 2048 * i)]
        places = [word for i in range(words) for word in _look_up(at_metadata, 1, 512 * i)]
        return [
            array(VALUES, (128, 8), jnp.uint32, [kept]),
            array(_meta_layout(words), (128, words), jnp.uint32, [places]),
        ]

    kinds = [result(VALUES, (128, 8), jnp.uint32), result(_meta_layout(words), (128, words), jnp.uint32)]
    return tuple(inline(sparse_take, (_REF, _REF, _NUMBER), kinds, values, metadata, zero))


def nothing(dtype: Any) -> tuple[jax.Array, jax.Array]:
    """In place of what is kept before the first step."""
    words = meta_words(dtype)

    def sparse_nothing(_):
        kept = array(VALUES, (128, 8), jnp.uint32, [[constant(0)] * 8])
        return [kept, array(_meta_layout(words), (128, words), jnp.uint32, [[constant(0)] * words])]

    kinds = [result(VALUES, (128, 8), jnp.uint32), result(_meta_layout(words), (128, words), jnp.uint32)]
    return tuple(inline(sparse_nothing, (), kinds))


def multiply(sums: jax.Array, kept: tuple[jax.Array, jax.Array], x: Ref) -> jax.Array:
    """Starts the products of a step: sums [64, R] + w [64, ..] x^T, x [R, 128 bytes] in shared memory. What comes back
    is there behind `wait`."""
    rows, dtype, columns = sums.shape[1], x.dtype, elements(x.dtype)
    shape = _SHAPES[dtype.name]
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
            operands = [*values[4 * i : 4 * i + 4], at, places]
            parts = _start("wgmma.mma_async.sp", f"m64n{rows}{shape}", parts, operands, "rrrrlr", f"{selector}, ")
        nvvm.wgmma_commit_group_sync_aligned()
        return _as_sums(sums, parts)

    types = (SUMS, VALUES, _meta_layout(words), plgpu.RefType(swizzled(dtype)))
    return inline(sparse_multiply, types, result(SUMS, sums.shape, sums.dtype), sums, *kept, x)


def multiply_dense(sums: jax.Array, w: Ref, x: Ref) -> jax.Array:
    """As `multiply`, of integers: sums [64, R] + w x^T, w [64, 128] and x [R, 128] in shared memory."""
    rows = sums.shape[1]

    def dense_multiply(_, sums, w, x):
        sums = fragments.optimization_barrier(sums)
        (of_w, of_x) = (
            mma_utils.create_descriptor(ref, swizzle=_ROW, group_size=(size, _ROW), logical_k_major=False)[0][0]
            for ref, size in ((w, TILE), (x, rows))
        )
        nvvm.wgmma_fence_aligned()
        parts = [vector.extract(part, [], [0]) for part in sums.registers.flat]
        for i in range(_ROW // 32):
            at = [arith.addi(one, mgpu.c(i * 32 // 16, ir.IntegerType.get_signless(64))) for one in (of_w, of_x)]
            parts = _start("wgmma.mma_async", f"m64n{rows}k32.s32.s8.s8", parts, at, "ll", "")
        nvvm.wgmma_commit_group_sync_aligned()
        return _as_sums(sums, parts)

    kind = plgpu.RefType(swizzled(jnp.int8))
    return inline(dense_multiply, (SUMS, kind, kind), result(SUMS, sums.shape, sums.dtype), sums, w, x)


def wait(metadata: Sequence[jax.Array], started: int) -> jax.Array:
    """Until all products are done but those of so many calls of `multiply`; `metadata` is what the last of them read.

    Returns 0, for addresses of what is taken next. The compiler does not know that a product reads its metadata while
    it goes on, and would load the next into the same register; it has to keep what tells it this number.
    """

    def sparse_wait(_, *metas):
        nvvm.wgmma_wait_group_sync_aligned(started)
        found = constant(0)
        for meta in metas:
            for word in words_of(meta.registers.flat[0]):
                # No word of metadata is 2^32 - 1.
                code = "{ .reg .pred p; setp.eq.u32 p, $1, 0xffffffff; selp.b32 $0, 1, $2, p; }"
                found = llvm.inline_asm(i32(), [word, found], code, "=r,r,r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    number = plgpu.ShapeDtypeStruct((), jnp.int32, layout=_NUMBER)
    return inline(sparse_wait, tuple(_meta_layout(one.shape[1]) for one in metadata), number, *metadata)


def ended(sums: jax.Array) -> jax.Array:
    """Sums that were waited for: nothing that reads them moves to before here."""

    def sparse_ended(_, sums):
        return fragments.optimization_barrier(sums)

    return inline(sparse_ended, (SUMS,), result(SUMS, sums.shape, sums.dtype), sums)


def as_float32(sums: jax.Array) -> jax.Array:
    """In the layout of dense products."""

    def sparse_as_float32(_, sums):
        sums = sums.to_layout(fragments.WGMMA_LAYOUT)
        return sums if sums.is_signed is None else sums.astype(ir.F32Type.get())

    return inline(sparse_as_float32, (SUMS,), result(plgpu.Layout.WGMMA, sums.shape, jnp.float32), sums)


def _look_up(address: Value, words: int, offset: int) -> list[Value]:
    """Adjacent words of shared memory."""
    names = ", ".join(f"${i}" for i in range(words))
    names, kind = (f"{{{names}}}", f"v{words}.u32") if words > 1 else (names, "u32")
    code = f"ld.shared.{kind} {names}, [${words} + {offset}];"
    type_ = llvm.StructType.get_literal([i32()] * words) if words > 1 else i32()
    found = llvm.inline_asm(type_, [address], code, ",".join(["=r"] * words + ["r"]), has_side_effects=True)
    return [llvm.extractvalue(i32(), found, [i]) for i in range(words)] if words > 1 else [found]


def _start(
    instruction: str, shape: str, sums: Sequence[Value], operands: Sequence[Value], kinds: str, options: str
) -> list[Value]:
    """One product: sums, in the same registers afterwards. `kinds` of operands: r and l; four r are a vector."""
    n = len(sums)
    names = [f"${i}" for i in range(2 * n, 2 * n + len(operands))]
    if kinds.startswith("rrrr"):
        names = [f"{{{', '.join(names[:4])}}}", *names[4:]]
    of_sums, register = ", ".join(f"${i}" for i in range(n)), "r" if sums[0].type == i32() else "f"
    code = (
        f"{{ .reg .pred p; setp.ne.b32 p, 1, 0; {instruction}.sync.aligned.{shape} {{{of_sums}}}, {', '.join(names)}, "
        f"{options}p"
    )
    # Products of 16-bit types have signs of both operands, and may take x turned.
    code += "; }" if register == "r" else ", 1, 1, 0; }"
    constraints = ",".join([f"={register}"] * n + [str(i) for i in range(n)] + list(kinds))
    type_ = llvm.StructType.get_literal([sums[0].type] * n)
    made = llvm.inline_asm(type_, [*sums, *operands], code, constraints, has_side_effects=True)
    return [llvm.extractvalue(sums[0].type, made, [i]) for i in range(n)]


def _as_sums(like: mgpu.FragmentedArray, parts: Sequence[Value]) -> mgpu.FragmentedArray:
    kind = ir.VectorType(like.registers.flat[0].type)
    made = np.empty(len(parts), object)
    made[:] = [vector.from_elements(kind, [part]) for part in parts]
    shape = like.registers.shape
    return mgpu.FragmentedArray(_registers=made.reshape(shape), _layout=like.layout, _is_signed=like.is_signed)
