# SPDX-License-Identifier: Apache-2.0
"""Functions of registers in kernels for NVIDIA GPUs: arrays in layouts of one's own, and their 32-bit words.

    def add_one(_, x):                                    # x: a FragmentedArray, its registers those of a thread
        words = [word for register in x.registers.flat for word in words_of(register)]
        return array(LAYOUT, (128, 8), jnp.uint32, [[arith.addi(word, constant(1)) for word in words]])

    y = inline(add_one, (LAYOUT,), result(LAYOUT, (128, 8), jnp.uint32), x)

The interpreter does not run them: tests put functions of arrays in their place, by name.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl  # noqa: F401  (registers the lowering rules)
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

Ref = Any
Value = Any


def inline(function: Callable, types: tuple, result: Any, *arguments: Any) -> Any:
    """Calls a function of registers on arguments of such layouts."""
    called: Any = plgpu.inline_mgpu(arg_types=types, return_type=result)
    return called(function)(*arguments)


def result(layout: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """What an inlined function returns."""
    return plgpu.ShapeDtypeStruct(shape, jnp.dtype(dtype), layout=layout)


def array(layout: Any, shape: tuple[int, ...], dtype: Any, registers: Sequence[Sequence[Value]]) -> Any:
    """Of the 32-bit words of each register."""
    kind, element = layout.to_mgpu(), mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype))
    made = np.empty(len(registers), object)
    made[:] = [vector_of(words, ir.VectorType.get((kind.vector_length,), element)) for words in registers]
    signed = {"i": True, "u": False}.get(jnp.dtype(dtype).kind)
    return mgpu.FragmentedArray(_registers=made.reshape(kind.registers_shape(shape)), _layout=kind, _is_signed=signed)


def i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def constant(x: int) -> Value:
    # Signless 32 bits: what is 2^31 or more is given as the negative number with the same bits.
    return mgpu.c(x - 2**32 if x >= 2**31 else x, i32())


def tiled(tiling: Sequence[tuple[int, ...]], warps: tuple, lanes: tuple) -> Any:
    """A layout whose last axis is a thread's vector."""
    layout: Any = mgpu.TiledLayout(
        mgpu.fragmented_array.Tiling(tuple(tiling)),
        warp_dims=warps,
        lane_dims=lanes,
        vector_dim=-1,
        _check_canonical=False,
    ).canonicalize()
    in_tiles: Any = plgpu.Layout.TILED
    return in_tiles(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def words_of(register: Value) -> list[Value]:
    """The 32-bit words of a register of the array: a vector of some type."""
    size = mgpu.utils.bitwidth(register.type) // 32
    as_words = vector.bitcast(ir.VectorType.get((size,), i32()), register)
    return [llvm.extractelement(as_words, constant(i)) for i in range(size)]


def vector_of(words: Sequence[Value], type_: ir.Type) -> Value:
    """A register of the array."""
    x = llvm.mlir_undef(ir.VectorType.get((len(words),), words[0].type))
    for i, word in enumerate(words):
        x = llvm.insertelement(x, word, constant(i))
    return x if x.type == type_ else vector.bitcast(type_, x)


def sums_of(x: mgpu.FragmentedArray) -> list[list[Value]]:
    """[tile of 8 columns][4], the accumulators of mma.sync in an array [64, columns]: rows g, g, g + 8, g + 8."""
    pairs = x.registers.reshape(-1, 2)
    return [[llvm.extractelement(r, constant(i)) for r in pair for i in range(2)] for pair in pairs]


def with_sums(x: mgpu.FragmentedArray, sums: Sequence[Sequence[Value]]) -> mgpu.FragmentedArray:
    """The array with other accumulators."""
    vectors = [vector_of(tile[i : i + 2], x.registers.flat[0].type) for tile in sums for i in (0, 2)]
    registers = np.empty(len(vectors), object)
    registers[:] = vectors
    return mgpu.FragmentedArray(
        _registers=registers.reshape(x.registers.shape), _layout=x.layout, _is_signed=x.is_signed
    )
