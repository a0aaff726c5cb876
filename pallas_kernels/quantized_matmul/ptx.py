# SPDX-License-Identifier: Apache-2.0
"""`lanes.py` in instructions for the warps of a warpgroup, and where their registers come from.

A warpgroup holds tiles of 64 outputs, 16 a warp. Layouts, thread 4 g + c of each warp:

    WORDS [64, 16]    outputs g, g + 8 of its warp; words 4 c ... 4 c + 3: 16 adjacent bytes
    STATS [64, 4]     the same outputs; word c
    STEPS [4, 16]     an output block a warp; strips 4 c ... 4 c + 3
    ROWS [8 m, 64 j]  rows g of x; inputs 16 c ... 16 c + 15 of each stretch of 64, in all warps
    SUMS  [64, 8 m]   accumulators of mma.m16n8k16
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl  # noqa: F401  (registers the lowering rules)
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.quantized_matmul import lanes

Ref = Any
Value = Any


def _tiled(tiling: Sequence[tuple[int, ...]], warps: tuple, lanes_: tuple) -> Any:
    """A layout whose last axis is a thread's vector."""
    layout: Any = mgpu.TiledLayout(
        mgpu.fragmented_array.Tiling(tuple(tiling)),
        warp_dims=warps,
        lane_dims=lanes_,
        vector_dim=-1,
        _check_canonical=False,
    ).canonicalize()
    tiled: Any = plgpu.Layout.TILED
    return tiled(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


_EVERY_WARP, _EVERY_GROUP = mgpu.fragmented_array.Replicated(4), mgpu.fragmented_array.Replicated(8)
WORDS = plgpu.Layout.WGMMA_8BIT
STATS = _tiled(((64, 4), (16, 4), (8, 4), (1,)), (-7,), (-3, -2))
STEPS = _tiled(((4, 16), (1, 16), (4,)), (-5,), (_EVERY_GROUP, -2))
ROWS = _tiled(((8, 64), (8, 16), (8,)), (_EVERY_WARP,), (-3, -4))
SUMS = plgpu.Layout.MMA_ACC(jnp.bfloat16)


def strips(
    sums: list[jax.Array], words: jax.Array, stats: jax.Array, steps: jax.Array, x: jax.Array
) -> list[jax.Array]:
    """Adds a chunk of strips to sums [64, 8 m] of each factor: `lanes.strips` of every thread. words [64, 16], stats
    [64, 4], steps [4, 16], x [8 m, 256] in ROWS."""

    def quantized_strips(_, sums, words, stats, steps, x):
        do: lanes.Instructions = _Ptx()
        parts = [_sums_of(s) for s in sums]
        parts = lanes.strips(do, parts, *_digits_of(words, stats, steps), _rows_of(x))
        return [_with_sums(s, part) for s, part in zip(sums, parts, strict=True)]

    types = ([SUMS] * len(sums), WORDS, STATS, STEPS, ROWS)
    return _inline(quantized_strips, types, [_like(s) for s in sums], sums, words, stats, steps, x)


def centered_strips(
    total: jax.Array, words: jax.Array, stats: jax.Array, steps: jax.Array, x: jax.Array, j: int
) -> jax.Array:
    """As `strips`, of the j-th stretch of 64 inputs alone, x [8 m, 64], to one sum: `lanes.centered_strips`."""

    def quantized_centered_strips(_, total, words, stats, steps, x):
        rows = [tile[0] for tile in _rows_of(x)]
        part = lanes.centered_strips(_Ptx(), _sums_of(total), *_digits_of(words, stats, steps), rows, j)
        return _with_sums(total, part)

    types = (SUMS, WORDS, STATS, STEPS, ROWS)
    return _inline(quantized_centered_strips, types, _like(total), total, words, stats, steps, x)


def integers(total: jax.Array, words: jax.Array, scale: jax.Array | None, x: jax.Array, bits: int) -> jax.Array:
    """Adds a chunk of codes to a sum [64, 8 m]: `lanes.integers` of every thread. words [64, 16], scale [64, 4] or None
    for 1, x [8 m, 512 / bits] in ROWS."""

    def quantized_integers(_, total, words, x, scale=None):
        of_outputs, sums = [_words_of(r) for r in words.registers.flat], _sums_of(total)
        if scale is None:
            return _with_sums(total, lanes.integers(_Ptx(), sums, of_outputs, _rows_of(x), bits))
        zero = arith.constant(ir.F32Type.get(), 0.0)
        parts = lanes.integers(_Ptx(), [[zero] * 4 for _ in sums], of_outputs, _rows_of(x), bits)
        factors = [
            factor for r in scale.registers.flat for factor in [llvm.extractelement(r, _constant(0))] * 2
        ]  # of outputs g, g, g + 8, g + 8
        scaled = [
            [arith.addf(y, arith.mulf(z, factor)) for y, z, factor in zip(tile, part, factors, strict=True)]
            for tile, part in zip(sums, parts, strict=True)
        ]
        return _with_sums(total, scaled)

    arrays = [total, words, x] if scale is None else [total, words, x, scale]
    return _inline(quantized_integers, (SUMS, WORDS, ROWS, STATS)[: len(arrays)], _like(total), *arrays)


@dataclasses.dataclass(frozen=True)
class Place:
    """Which thread this is, and the outputs of a tile that it holds."""

    warp: Value
    g: Value
    c: Value
    output: Value

    @classmethod
    def of(cls, output: Value) -> "Place":
        thread = mgpu.utils.thread_idx()
        lane, warp = _rem(thread, 32), _rem(_div(thread, 32), 4)
        return cls(warp, _div(lane, 4), _rem(lane, 4), output)

    def rows(self, last: int) -> list[Value]:
        """g and g + 8 of the warp's 16 outputs; what an array does not have is its last row."""
        first = arith.addi(self.output, arith.addi(arith.muli(self.warp, _constant(16)), self.g))
        return [arith.minsi(arith.addi(first, _constant(i)), _constant(last)) for i in (0, 8)]

    def block(self, last: int) -> Value:
        """Of these 16 outputs."""
        return arith.minsi(arith.addi(_div(self.output, 16), self.warp), _constant(last))


# --- Copies ahead of use: each thread copies what it will read itself, so that nobody waits for another ------

# What a thread has of a chunk, as 16 bytes each: the words of two outputs, and statistics or scales.
PIECES = 3
BYTES_AHEAD = 16 * PIECES * 128  # of a chunk of 64 outputs


def start_strips(
    slots: Ref, slot: Any, main: Sequence[Ref], tail: Sequence[Ref], output: Any, chunk: Any, end: Any
) -> None:
    """Copies words, stats and steps of 64 outputs from global memory to a slot: of a chunk of the main plane (words,
    stats, steps), or, of those numbered beyond it, of the tail. Not of chunks from `end` on."""

    def quantized_start(_, slots, slot, main, tail, output, chunk, end):
        place, number = Place.of(output.registers[()]), chunk.registers[()]
        mains, live = _shape(main[0])[1] // 16, _below(number, end)
        beyond = arith.cmpi(arith.CmpIPredicate.sge, number, _constant(mains))

        def copy(array: int, elements: int, nbytes: int, row_of: Callable[[int], Value], at: int) -> None:
            def address(plane: Sequence[Ref], chunk: Value) -> Value:
                return _address(plane[array], row_of(_shape(plane[array])[0] - 1), chunk, elements, place.c)

            source = address(main, number)
            if tail:
                source = arith.select(beyond, address(tail, arith.subi(number, _constant(mains))), source)
            _copy(_slot_address(slots, slot, at), source, nbytes, live)

        for i in range(2):
            copy(0, 16, 16, lambda last, i=i: place.rows(last)[i], 2048 * i)
            copy(1, 4, 4, lambda last, i=i: place.rows(last)[i], 4096 + 4 * i)
        copy(2, 16, 8, place.block, 4096 + 8)

    refs = [plgpu.RefType()] * len(main), [plgpu.RefType()] * len(tail)
    types = (plgpu.RefType(), _NUMBER, *refs, _NUMBER, _NUMBER, _NUMBER)
    _inline(quantized_start, types, (), slots, slot, list(main), list(tail), output, chunk, end)


def take_strips(
    slots: Ref, slot: Any, main: Sequence[Ref], tail: Sequence[Ref], output: Any, chunk: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `start_strips` has copied: words [64, 16], stats [64, 4] and steps [4, 16]."""

    def quantized_take_strips(_, slots, slot, main, tail, output, chunk):
        del main, tail, output, chunk  # for those who execute it without slots
        words = [_read(_slot_address(slots, slot, 2048 * i)) for i in range(2)]
        g, g_8, *steps = _read(_slot_address(slots, slot, 4096))
        return (
            _array(WORDS, (64, 16), jnp.uint32, words),
            _array(STATS, (64, 4), jnp.uint32, [[g], [g_8]]),
            _array(STEPS, (4, 16), jnp.bfloat16, [steps]),
        )

    refs = [plgpu.RefType()] * len(main), [plgpu.RefType()] * len(tail)
    types = (plgpu.RefType(), _NUMBER, *refs, _NUMBER, _NUMBER)
    result = [
        _result(WORDS, (64, 16), "uint32"),
        _result(STATS, (64, 4), "uint32"),
        _result(STEPS, (4, 16), "bfloat16"),
    ]
    return _inline(quantized_take_strips, types, result, slots, slot, list(main), list(tail), output, chunk)


def start_codes(slots: Ref, slot: Any, refs: Sequence[Ref], per_group: int, output: Any, chunk: Any, end: Any) -> None:
    """Copies words of 64 outputs, and their scales [groups, N'] of as many chunks each, if there are any."""

    def quantized_start(_, slots, slot, refs, output, chunk, end):
        place, number = Place.of(output.registers[()]), chunk.registers[()]
        live, (words, *scales) = _below(number, end), refs
        for i, row in enumerate(place.rows(_shape(words)[0] - 1)):
            _copy(_slot_address(slots, slot, 2048 * i), _address(words, row, number, 16, place.c), 16, live)
            for scale in scales:  # two neighbors: no copy is of fewer than four bytes
                pair = arith.muli(_div(row, 2), _constant(2))
                element = arith.addi(arith.muli(_div(number, per_group), _constant(_shape(scale)[1])), pair)
                source = _offset(_pointer(scale), arith.muli(element, _constant(2)))
                _copy(_slot_address(slots, slot, 4096 + 4 * i), source, 4, live)

    types = (plgpu.RefType(), _NUMBER, [plgpu.RefType()] * len(refs), _NUMBER, _NUMBER, _NUMBER)
    _inline(quantized_start, types, (), slots, slot, list(refs), output, chunk, end)


def take_codes(
    slots: Ref, slot: Any, refs: Sequence[Ref], per_group: int, output: Any, chunk: Any
) -> tuple[jax.Array, ...]:
    """What `start_codes` has copied: words [64, 16], and scales [64, 4], the same four times."""

    def quantized_take_codes(_, slots, slot, refs, output, chunk):
        assert per_group  # as in quantized_take_strips
        del chunk
        result = [_array(WORDS, (64, 16), jnp.uint32, [_read(_slot_address(slots, slot, 2048 * i)) for i in range(2)])]
        if len(refs) == 1:
            return result
        place = Place.of(output.registers[()])
        rows = place.rows(_shape(refs[0])[0] - 1)
        pairs = _read(_slot_address(slots, slot, 4096))[:2]
        # bfloat16 in the high half of a word is float32.
        shifts = [arith.muli(arith.subi(_constant(1), _rem(row, 2)), _constant(16)) for row in rows]
        high = [arith.shli(pair, shift) for pair, shift in zip(pairs, shifts, strict=True)]
        factors = [[arith.andi(word, _constant(0xFFFF0000))] for word in high]
        return [*result, _array(STATS, (64, 4), jnp.float32, factors)]

    types = (plgpu.RefType(), _NUMBER, [plgpu.RefType()] * len(refs), _NUMBER, _NUMBER)
    result = [_result(WORDS, (64, 16), "uint32"), _result(STATS, (64, 4), "float32")][: len(refs)]
    return _inline(quantized_take_codes, types, result, slots, slot, list(refs), output, chunk)


def end_group() -> None:
    """What was started since the last call is a group."""

    def quantized_end_group(_):
        mgpu.utils.inline_ptx("cp.async.commit_group;")

    plgpu.inline_mgpu()(quantized_end_group)()


def wait_for_groups(but: int) -> None:
    """All but so many last groups have arrived."""

    def quantized_wait(_):
        mgpu.utils.inline_ptx(f"cp.async.wait_group {but};")

    plgpu.inline_mgpu()(quantized_wait)()


# --- Rows of x ------------------------------------------------------------------------------------------------


def strips_of(chunk: jax.Array, count: int, mains: int = 0, tail_index: Ref | None = None) -> jax.Array:
    """Which 16 inputs each strip of a chunk multiplies, int32 [4, 16] in STEPS: `count` that follow each other, or, of
    chunks numbered beyond the main plane's, what the index [T'] says."""

    def quantized_strips_of(_, chunk, tail_index=None):
        number, c = chunk.registers[()], Place.of(_constant(0)).c
        own = [arith.addi(arith.muli(number, _constant(count)), arith.addi(c, _constant(4 * j))) for j in range(4)]
        if tail_index is not None:
            beyond = arith.subi(number, _constant(mains))
            inside = arith.extui(_i32(), arith.cmpi(arith.CmpIPredicate.sge, beyond, _constant(0)))
            code = "{ .reg .pred p; setp.ne.u32 p, $3, 0; mov.u32 $0, $1; @p ld.global.nc.u32 $0, [$2]; }"

            def looked_up(j: int) -> Value:
                at = arith.addi(arith.muli(beyond, _constant(16)), arith.addi(c, _constant(4 * j)))
                address = _offset(_pointer(tail_index), arith.muli(at, _constant(4)))
                return llvm.inline_asm(_i32(), [own[j], address, inside], code, "=r,r,l,r", has_side_effects=True)

            own = [looked_up(j) for j in range(4)]
        return _array(STEPS, (4, 16), jnp.int32, [own])

    refs = [] if tail_index is None else [tail_index]
    types = (_NUMBER, *[plgpu.RefType()] * len(refs))
    return _inline(quantized_strips_of, types, _result(STEPS, (4, 16), "int32"), chunk, *refs)


def load_rows(x: Ref, strips: jax.Array, rows: int, stretches: range) -> jax.Array:
    """Inputs of strips of x [M, K] in global memory, [rows, 64 j] in ROWS for stretches of 64 of them. Rows that x does
    not have are copies of its last; strips that it does not have are 0."""

    def quantized_load_rows(_, x, strips):
        place, layout = Place.of(_constant(0)), ROWS.to_mgpu()
        M, K = _shape(x)
        (numbers,) = strips.registers.flat
        registers = np.empty(layout.registers_shape((rows, 64 * len(stretches))), object)
        for tile in range(rows // 8):
            row = arith.minsi(arith.addi(place.g, _constant(8 * tile)), _constant(M - 1))
            start = arith.muli(row, _constant(2 * K))
            for i, j in enumerate(stretches):
                strip = llvm.extractelement(numbers, _constant(j))
                inside = None
                if K % 256:  # chunks may reach beyond
                    inside = arith.cmpi(arith.CmpIPredicate.slt, strip, _constant(K // 16))
                    strip = arith.minsi(strip, _constant(K // 16 - 1))
                first = _offset(_pointer(x), arith.addi(start, arith.muli(strip, _constant(32))))
                for half in range(2):
                    words = _load(_offset(first, _constant(16 * half)), "global.nc", moves=True)
                    if inside is not None:
                        words = [arith.select(inside, word, _constant(0)) for word in words]
                    registers[tile, i, 0, 0, 0, half, 0] = _vector(words, ir.VectorType.get((8,), ir.BF16Type.get()))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    result = _result(ROWS, (rows, 64 * len(stretches)), "bfloat16")
    return _inline(quantized_load_rows, (plgpu.RefType(), STEPS), result, x, strips)


class _Ptx(lanes.Instructions):
    """The instructions of a thread. Registers are i32 values."""

    def bits(self, word: Value, shift: int, mask: int, base: int) -> Value:
        moved = arith.shrui(word, _constant(shift)) if shift else word
        # (a & b) | c in one instruction, which takes one constant; the compiler, left alone, makes it two.
        code = "lop3.b32 $0, $1, $2, $3, 0xEA;"
        operands = [moved, _constant(mask), _constant(base)]
        return llvm.inline_asm(_i32(), operands, code, "=r,r,n,r", has_side_effects=False)

    def fma(self, a: Value, b: Value | int, c: Value | int) -> Value:
        operands = [x if isinstance(x, ir.Value) else _constant(x) for x in (a, b, c)]
        code = "fma.rn.bf16x2 $0, $1, $2, $3;"  # sm_80 has no other arithmetic of bfloat16
        return llvm.inline_asm(_i32(), operands, code, "=r,r,r,r", has_side_effects=False)

    def both(self, word: Value, half: int) -> Value:
        code = f"prmt.b32 $0, $1, $1, {0x3232 if half else 0x1010};"
        return llvm.inline_asm(_i32(), [word], code, "=r,r", has_side_effects=False)

    def mma(self, sums: Sequence[Value], a: Sequence[Value], b: Sequence[Value]) -> list[Value]:
        f32 = ir.F32Type.get()
        code = (
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
        )
        constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
        result = llvm.inline_asm(
            llvm.StructType.get_literal([f32] * 4), [*a, *b, *sums], code, constraints, has_side_effects=False
        )
        return [llvm.extractvalue(f32, result, [i]) for i in range(4)]


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _constant(x: int) -> Value:
    # Signless 32 bits: what is 2^31 or more is given as the negative number with the same bits.
    return mgpu.c(x - 2**32 if x >= 2**31 else x, _i32())


def _words_of(register: Value) -> list[Value]:
    """The 32-bit words of a register of the array: a vector of some type."""
    size = mgpu.utils.bitwidth(register.type) // 32
    as_words = vector.bitcast(ir.VectorType.get((size,), _i32()), register)
    return [llvm.extractelement(as_words, _constant(i)) for i in range(size)]


def _digits_of(words: Any, stats: Any, steps: Any) -> tuple[list, list, list]:
    """What a thread has of a chunk of strips: words and statistics of its two outputs, steps."""
    (both,) = steps.registers.flat
    return (
        [_words_of(r) for r in words.registers.flat],
        [_words_of(r)[0] for r in stats.registers.flat],
        _words_of(both),
    )


def _vector(words: Sequence[Value], type_: ir.Type) -> Value:
    x = llvm.mlir_undef(ir.VectorType.get((len(words),), words[0].type))
    for i, word in enumerate(words):
        x = llvm.insertelement(x, word, _constant(i))
    return x if x.type == type_ else vector.bitcast(type_, x)


def _rows_of(x: mgpu.FragmentedArray) -> list[list[list[Value]]]:
    """[tile][stretch][pair of inputs]."""
    tiles, stretches = x.registers.shape[:2]
    return [
        [[w for register in x.registers[tile, j].flat for w in _words_of(register)] for j in range(stretches)]
        for tile in range(tiles)
    ]


def _sums_of(x: mgpu.FragmentedArray) -> list[list[Value]]:
    """[tile of 8 rows][4]."""
    pairs = x.registers.reshape(-1, 2)  # outputs g and g + 8
    return [[llvm.extractelement(r, _constant(i)) for r in pair for i in range(2)] for pair in pairs]


def _with_sums(x: mgpu.FragmentedArray, sums: list[list[Value]]) -> mgpu.FragmentedArray:
    vectors = [_vector(tile[i : i + 2], x.registers.flat[0].type) for tile in sums for i in (0, 2)]
    registers = np.empty(len(vectors), object)
    registers[:] = vectors
    return mgpu.FragmentedArray(_registers=registers.reshape(x.registers.shape), _layout=x.layout, _is_signed=None)


def _inline(function: Callable, types: tuple, result: Any, *arguments: Any) -> Any:
    inline: Any = plgpu.inline_mgpu(arg_types=types, return_type=result)
    return inline(function)(*arguments)


def _result(layout: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    return plgpu.ShapeDtypeStruct(shape, jnp.dtype(dtype), layout=layout)


def _like(total: jax.Array) -> Any:
    return _result(SUMS, total.shape, jnp.float32)


def _array(layout: Any, shape: tuple[int, ...], dtype: Any, registers: Sequence[Sequence[Value]]) -> Any:
    """Of the words of each register."""
    tiled, element = layout.to_mgpu(), mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype))
    size = tiled.vector_length
    made = np.empty(len(registers), object)
    made[:] = [_vector(words, ir.VectorType.get((size,), element)) for words in registers]
    signed = {"i": True, "u": False}.get(jnp.dtype(dtype).kind)
    made = made.reshape(tiled.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=made, _layout=tiled, _is_signed=signed)


# --- Addresses, and what lies there --------------------------------------------------------------------------

_NUMBER = plgpu.Layout.WG_SPLAT


def _below(number: Value, end: Any) -> Value:
    return arith.cmpi(arith.CmpIPredicate.slt, number, end.registers[()])


def _copy(target: Value, source: Value, nbytes: int, live: Value) -> None:
    """From global to shared memory, past the L1 where whole sectors are; the memory behind the L2 gives more at once."""
    how = "cg.shared.global.L2::256B" if nbytes == 16 else "ca.shared.global"
    code = f"@$2 cp.async.{how} [$0], [$1], {nbytes};"
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [target, source, live], code, "r,l,b", has_side_effects=True)


def _slot_address(slots: Ref, slot: Any, at: int) -> Value:
    """Of this thread's 16 bytes of a piece that begins at `at`, in shared memory."""
    base = llvm.ptrtoint(_i32(), mgpu.utils.memref_ptr(slots))
    own = arith.muli(_rem(mgpu.utils.thread_idx(), 128), _constant(16))
    return arith.addi(
        base, arith.addi(arith.addi(arith.muli(slot.registers[()], _constant(BYTES_AHEAD)), own), _constant(at))
    )


def _load(address: Value, space: str, moves: bool) -> list[Value]:
    """16 bytes."""
    code = f"ld.{space}.v4.u32 {{$0, $1, $2, $3}}, [$4];"
    type_ = llvm.StructType.get_literal([_i32()] * 4)
    constraint = "=r,=r,=r,=r,l" if address.type == ir.IntegerType.get_signless(64) else "=r,=r,=r,=r,r"
    loaded = llvm.inline_asm(type_, [address], code, constraint, has_side_effects=not moves)
    return [llvm.extractvalue(_i32(), loaded, [i]) for i in range(4)]


def _read(address: Value) -> list[Value]:
    return _load(address, "shared", moves=False)  # after the wait


def _shape(ref: Value) -> list[int]:
    return ir.MemRefType(ref.type).shape


def _pointer(ref: Value) -> Value:
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu.utils.memref_ptr(ref))


def _offset(pointer: Value, nbytes: Value) -> Value:
    return arith.addi(pointer, arith.extui(ir.IntegerType.get_signless(64), nbytes))


def _address(ref: Ref, row: Value, chunk: Value, elements: int, c: Value) -> Value:
    """Of the quarter of a chunk of so many elements that is thread c's."""
    size, pitch = mgpu.utils.bitwidth(ir.MemRefType(ref.type).element_type) // 8, _shape(ref)[1]
    at = arith.addi(arith.muli(row, _constant(pitch)), arith.muli(chunk, _constant(elements)))
    return _offset(_pointer(ref), arith.muli(arith.addi(at, arith.muli(c, _constant(elements // 4))), _constant(size)))


def _div(x: Value, by: int) -> Value:
    return arith.divui(x, _constant(by))


def _rem(x: Value, by: int) -> Value:
    return arith.remui(x, _constant(by))
