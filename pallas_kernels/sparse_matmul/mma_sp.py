# SPDX-License-Identifier: Apache-2.0
"""Sparse products of Ampere in inline PTX: of a warp, from registers.

    mma.sp.m16n8k32     z [16, 8] += w [16, 32] x^T [32, 8]      16-bit types: of 32 inputs 16 are kept
    mma.sp.m16n8k64     z [16, 8] += w [16, 64] x^T [64, 8]      int8, summed in int32: of 64, 32

A step is two of them for every 8 rows of x. Of the left operand a thread holds what it does for Hopper's products
(ptx.py), as weights.py stores it; of the right one, 64 bytes of 8 rows, ldmatrix brings it 4 bytes of each 16.

Source: PTX ISA, "Matrix multiply-accumulate operation using mma.sp instruction with sparse matrix A".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl  # noqa: F401  (registers the lowering rules)
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.core.inline import Ref, Value, constant, i32, inline, result, sums_of, tiled, with_sums, words_of
from pallas_kernels.sparse_matmul import ptx

SUMS = plgpu.Layout.MMA_ACC(jnp.bfloat16)
_META = tiled(((128,), (32,), (1,)), (-3,), (-2,))
_SHAPES = {"bfloat16": "m16n8k32.row.col.f32.bf16.bf16.f32", "float16": "m16n8k32.row.col.f32.f16.f16.f32"}
_SHAPES["int8"] = "m16n8k64.row.col.s32.s8.s8.s32"


class Kept(NamedTuple):
    """What is kept of a step of 64 outputs: [128, 16 bytes] for each product, and words of metadata [128]."""

    values: list[jax.Array]
    metadata: list[jax.Array]


def _values(dtype: Any) -> Any:
    n = 16 // jnp.dtype(dtype).itemsize
    return tiled(((128, n), (32, n), (1, n)), (-6,), (-4,))


def take(values: Ref, metadata: Ref, step: Any, words: int) -> Kept:
    """From memory: of values [products, 128, 16 bytes] and metadata [words of all steps, 128] of 64 outputs."""
    layout: Any = _values(values.dtype)
    of_step = [values.at[ptx.PRODUCTS * step + i] for i in range(ptx.PRODUCTS)]
    places = [metadata.at[words * step + i] for i in range(words)]
    return Kept(
        [plgpu.load(one, layout=layout, optimized=False) for one in of_step],
        [plgpu.load(one, layout=_META, optimized=False) for one in places],
    )


def multiply(sums: jax.Array, kept: Kept, x: Ref) -> jax.Array:
    """sums [64, R] + w [64, ...] x^T of a step; x [R, 128 bytes] in swizzled shared memory."""
    shape, integers = _SHAPES[x.dtype.name], x.dtype == jnp.int8

    def sparse_mma(_, sums, kept, x):
        values = [words_of(one.registers.flat[0]) for one in kept.values]
        places = [word for one in kept.metadata for word in words_of(one.registers.flat[0])]
        lane = arith.remui(mgpu.utils.thread_idx(), constant(32))
        # ldmatrix takes from lane l where row l % 8 has its (l / 8)-th 16 bytes, of which each row holds 8.
        at, part = arith.remui(lane, constant(8)), arith.divui(lane, constant(8))
        base = llvm.ptrtoint(i32(), mgpu.utils.memref_ptr(x))
        base = arith.addi(base, arith.muli(at, constant(128)))
        starts = []
        for i in range(ptx.PRODUCTS):
            # Swizzled: 16 bytes number j of row r lie at number j ^ r % 8.
            chunk = arith.xori(arith.addi(part, constant(4 * i)), at)
            starts.append(arith.addi(base, arith.muli(chunk, constant(16))))
        tiles = sums_of(sums)
        for tile, z in enumerate(tiles):
            for i in range(ptx.PRODUCTS):
                # Two products of 16-bit types share a word of metadata: its lanes 0, 1 of a quad, then 2, 3.
                place, selector = (places[i], 0) if integers else (places[0], i)
                z = _product(shape, z, values[i], _rows(starts[i], 1024 * tile), place, selector)
            tiles[tile] = z
        return with_sums(sums, tiles)

    types = (
        SUMS,
        Kept([_values(x.dtype)] * len(kept.values), [_META] * len(kept.metadata)),
        plgpu.RefType(ptx.swizzled(x.dtype)),
    )
    return inline(sparse_mma, types, result(SUMS, sums.shape, sums.dtype), sums, kept, x)


def _rows(address: Value, offset: int) -> list[Value]:
    """The right operand of a product: 64 bytes of 8 rows of x."""
    code = f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$0, $1, $2, $3}}, [$4 + {offset}];"
    type_ = llvm.StructType.get_literal([i32()] * 4)
    found = llvm.inline_asm(type_, [address], code, "=r,=r,=r,=r,r", has_side_effects=True)
    return [llvm.extractvalue(i32(), found, [i]) for i in range(4)]


def _product(shape: str, z: list[Value], w: list[Value], x: list[Value], places: Value, selector: int) -> list[Value]:
    code = (
        f"mma.sp.sync.aligned.{shape} {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9, $10, $11}}, "
        f"{{$12, $13, $14, $15}}, $16, {selector};"
    )
    register = "r" if z[0].type == i32() else "f"
    constraints = ",".join([f"={register}"] * 4 + ["r"] * 8 + [register] * 4 + ["r"])
    type_ = llvm.StructType.get_literal([z[0].type] * 4)
    made = llvm.inline_asm(type_, [*w, *x, *z, places], code, constraints, has_side_effects=False)
    return [llvm.extractvalue(z[0].type, made, [i]) for i in range(4)]
