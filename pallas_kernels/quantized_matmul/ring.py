# SPDX-License-Identifier: Apache-2.0
"""Chunks of a weight on their way, with the rows of x that they multiply: a ring of slots in shared memory.

    start(chunk + stages - 1)        128 threads copy pieces of 16 bytes, past the L1: cp.async
    wait, barrier                    of what all have copied
    take_...(chunk)                  each thread reads its own, in the layouts of ptx.py

A slot, of T tiles of 64 outputs and M rows of x; "scales" are stats and steps, or those of groups:

    words   [T, 64, 16] words        two rows are all banks
    scales  stats [T, 64, 4] words and steps [T, 4, 16]; or [T, 64]; of the same chunk, or of that of the next step
    x       [M, inputs + 8]          8 more, so that the rows of two threads side by side are in other banks
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl  # noqa: F401  (registers the lowering rules)
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.core.inline import Ref, Value, array, constant, i32, inline, result
from pallas_kernels.quantized_matmul.config import chunk_inputs
from pallas_kernels.quantized_matmul.packing import CHUNK
from pallas_kernels.quantized_matmul.ptx import ROWS, STATS, STEPS, SUMS, WORDS, rows_in_order
from pallas_kernels.quantized_matmul.weights import BLOCK, IntWeight, Weight

THREADS, PIECE = 128, 16  # bytes that a thread copies at a time
_NUMBER, _REF = plgpu.Layout.WG_SPLAT, plgpu.RefType()
# Bytes of 64 outputs.
_WORDS, _STATS, _STEPS, _SCALES = 4096, 1024, 128, 128


@dataclasses.dataclass(frozen=True)
class Stored:
    """A weight as kernels read it, chunk by chunk.

    Attributes:
      arrays: words, stats and steps of the main plane of digits, the same of the tail, if there is one, and the index
        of its strips; or words of codes, and scales of groups, if there are any.
      inputs: of a chunk.
      chunks: of all planes; those of the tail are numbered after those of the main plane.
      mains: of the main plane, or of codes.
      per_group: chunks that have a scale in common; 0 for digits.
    """

    arrays: tuple[jax.Array, ...]
    inputs: int
    chunks: int
    mains: int
    per_group: int

    @classmethod
    def of(cls, weight: Weight) -> "Stored":
        if isinstance(weight, IntWeight):
            arrays, inputs = (weight.words,), chunk_inputs(weight.bits)
            chunks, group_size = weight.words.shape[1] // (BLOCK * CHUNK), weight.group_size
            if group_size is not None:
                arrays += (weight.scale,)
            return cls(arrays, inputs, chunks, chunks, max((group_size or weight.shape[0]) // inputs, 1))
        planes = [plane for plane in (weight.main, weight.tail) if plane.steps.shape[1]]
        arrays = tuple(array for p in planes for array in (p.words, p.stats, p.steps))
        mains, *tails = (plane.steps.shape[1] // CHUNK for plane in planes)
        return cls(arrays + (weight.tail_index,) * len(tails), chunk_inputs(2), mains + sum(tails), mains, 0)


def index_of[T](arrays: Sequence[T]) -> T | None:
    """Of those of `Stored`: which strips the tail's are."""
    return arrays[6] if len(arrays) > 6 else None


@dataclasses.dataclass(frozen=True)
class Ring:
    """How a slot is laid out, and where its contents come from.

    Attributes:
      inputs: of a chunk.
      chunks: of the weight.
      tiles: of 64 outputs.
      rows: of x.
      shares: chunks in a slot, one after another; as many groups of the four warps take one each, of the same
        64 / shares outputs.
      per_group: chunks that have a scale in common; 0 for planes of digits, with stats and steps.
      mains: chunks of the main plane: those numbered beyond are of the tail.
    """

    inputs: int
    chunks: int
    tiles: int
    rows: int
    shares: int = 1
    per_group: int = 0
    mains: int = 0

    @property
    def pitch(self) -> int:
        return 2 * self.inputs + PIECE

    @property
    def scales_at(self) -> int:
        return _WORDS * self.tiles

    @property
    def x_at(self) -> int:
        return self.scales_at + (_SCALES if self.per_group else _STATS + _STEPS) * self.tiles

    @property
    def nbytes(self) -> int:
        """Of a slot."""
        return self.x_at + self.shares * self.rows * self.pitch

    def start(
        self,
        slots: Ref,
        slot: Any,
        arrays: Sequence[Ref],
        x: Ref,
        outputs: Sequence[Any],
        chunk: Any,
        scales_of: Any,
        left: Any,
    ) -> None:
        """Copies chunks from `chunk` on, scales from chunk `scales_of` on, of tiles that begin at `outputs`; nothing if
        no step is left. Each call is a group to wait for. `arrays`: those of `Stored`."""
        ring = self

        def quantized_start(_, slots, slot, arrays, x, outputs, chunk, scales_of, left):
            live = arith.cmpi(arith.CmpIPredicate.sgt, left.registers[()], constant(0))
            copies = _Copies(ring, slots, slot.registers[()], chunk.registers[()], live)
            of_scales = dataclasses.replace(copies, chunk=scales_of.registers[()])
            for tile, output in enumerate(outputs):
                copies.words(arrays, tile, output.registers[()])
                of_scales.scales(arrays, tile, output.registers[()])
            copies.x(x, index_of(arrays))
            mgpu.utils.inline_ptx("cp.async.commit_group;")

        types = (_REF, _NUMBER, [_REF] * len(arrays), _REF, [_NUMBER] * len(outputs), _NUMBER, _NUMBER, _NUMBER)
        inline(quantized_start, types, (), slots, slot, list(arrays), x, list(outputs), chunk, scales_of, left)

    def start_scales(self, slots: Ref, slot: Any, arrays: Sequence[Ref], outputs: Sequence[Any], chunk: Any) -> None:
        """The same of scales alone."""
        ring = self

        def quantized_start_scales(_, slots, slot, arrays, outputs, chunk):
            always = arith.constant(ir.IntegerType.get_signless(1), 1)
            copies = _Copies(ring, slots, slot.registers[()], chunk.registers[()], always)
            for tile, output in enumerate(outputs):
                copies.scales(arrays, tile, output.registers[()])
            mgpu.utils.inline_ptx("cp.async.commit_group;")

        types = (_REF, _NUMBER, [_REF] * len(arrays), [_NUMBER] * len(outputs), _NUMBER)
        inline(quantized_start_scales, types, (), slots, slot, list(arrays), list(outputs), chunk)

    def take_words(self, slots: Ref, slot: Any, arrays: Sequence[Ref], tile: int, output: Any, chunk: Any) -> jax.Array:
        """Of a tile, [64, 16]."""
        ring = self

        def quantized_take_words(_, slots, slot, arrays, output, chunk):
            del arrays, output, chunk  # for those who execute it without slots
            words, thread = _slot(ring, slots, slot.registers[()]) + tile * _WORDS, Thread.own()
            return _words(thread, words)

        types = (_REF, _NUMBER, [_REF] * len(arrays), _NUMBER, _NUMBER)
        kind = result(WORDS, (64, 16), "uint32")
        return inline(quantized_take_words, types, kind, slots, slot, list(arrays), output, chunk)

    def take_scales(
        self, slots: Ref, slot: Any, arrays: Sequence[Ref], tile: int, output: Any, chunk: Any
    ) -> list[jax.Array]:
        """Of a tile: stats [64, 4] and steps [4, 16], or scales [64, 4], the same four times, if there are any."""
        ring = self

        def quantized_take_scales(_, slots, slot, arrays, output, chunk):
            del arrays, output, chunk  # as in `take_words`
            at, thread = _slot(ring, slots, slot.registers[()]) + ring.scales_at, Thread.own()
            if ring.per_group:
                factors = [_read_bfloat16((at + tile * _SCALES).to(2, row)) for row in thread.outputs]
                return [array(STATS, (64, 4), jnp.float32, factors)]
            at += tile * (_STATS + _STEPS)
            return _scales(thread, at, at + _STATS)

        if len(arrays) == 1:
            return []
        types = (_REF, _NUMBER, [_REF] * len(arrays), _NUMBER, _NUMBER)
        kinds = [result(STATS, (64, 4), "float32")]
        if not self.per_group:
            kinds = [result(STATS, (64, 4), "uint32"), result(STEPS, (4, 16), "bfloat16")]
        return inline(quantized_take_scales, types, kinds, slots, slot, list(arrays), output, chunk)

    def take_rows(
        self, slots: Ref, slot: Any, x: Ref, index: Ref | None, chunk: Any, rows: int, stretches: range
    ) -> jax.Array:
        """Stretches of 64 inputs of a chunk, [rows, 64 j] in ROWS. Rows that x does not have are copies of its last."""
        ring = self

        def quantized_take_rows(_, slots, slot, x, chunk, index=None):
            del x, chunk, index  # as in `take_words`
            at, thread, read = _slot(ring, slots, slot.registers[()]) + ring.x_at, Thread.own(), []
            share = _div(thread.warp, 4 // ring.shares)
            for tile in range(rows // 8):
                row = arith.minsi(thread.g, constant(min(ring.rows - 8 * tile, 8) - 1))
                row = arith.addi(row, arith.muli(share, constant(ring.rows)))
                own = (at + 8 * tile * ring.pitch).to(ring.pitch, row, 32, thread.c)
                for j, half in itertools.product(stretches, range(2)):
                    read.append(load(arith.addi(own, constant(128 * j + 16 * half)), 4))
            return array(ROWS, (rows, 64 * len(stretches)), jnp.bfloat16, read)

        types = (_REF, _NUMBER, _REF, _NUMBER, *[_REF] * (index is not None))
        shape = result(ROWS, (rows, 64 * len(stretches)), "bfloat16")
        indices = [] if index is None else [index]
        return inline(quantized_take_rows, types, shape, slots, slot, x, chunk, *indices)


def wait(but: int) -> None:
    """Until all but so many of the last groups are there, of all threads."""

    def quantized_wait(_):
        mgpu.utils.inline_ptx(f"cp.async.wait_group {but};")
        mgpu.utils.warpgroup_barrier()

    plgpu.inline_mgpu()(quantized_wait)()


def put(out: Ref, y: jax.Array, output: jax.Array, outputs: int) -> None:
    """The first `outputs` rows of y [64, 8 m], in SUMS, to columns of out [M, O], bfloat16 in global memory."""

    def quantized_put(_, out, y, output):
        (M, O), thread = _shape(out), Thread.own()
        for at, register in enumerate(y.registers.flat):
            row, tile = thread.outputs[at % 2], at // 2
            column = arith.addi(output.registers[()], row)
            mine = arith.cmpi(arith.CmpIPredicate.slt, row, constant(outputs))
            mine = arith.andi(mine, arith.cmpi(arith.CmpIPredicate.slt, column, constant(O)))
            for i in range(2):
                m = arith.addi(arith.muli(thread.c, constant(2)), constant(8 * tile + i))
                live = arith.andi(mine, arith.cmpi(arith.CmpIPredicate.slt, m, constant(M)))
                code = "{ .reg .b16 h; cvt.rn.bf16.f32 h, $1; @$2 st.global.b16 [$0], h; }"
                operands = [_element(out, m, column), llvm.extractelement(register, constant(i)), live]
                llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, code, "l,f,b", has_side_effects=True)

    inline(quantized_put, (_REF, SUMS, _NUMBER), (), out, y, output)


def barrier() -> None:
    """Until all threads are here."""

    def quantized_wait(_):
        mgpu.utils.warpgroup_barrier()

    plgpu.inline_mgpu()(quantized_wait)()


def take_digits(words: Ref, stats: Ref, steps: Ref) -> tuple[jax.Array, ...]:
    """As `Ring.take_words` and `Ring.take_scales`, of arrays [4, 256], [4, 64] and [4, 16] in shared
    memory: of 16 outputs each."""

    def quantized_take_digits(_, words, stats, steps):
        thread = Thread.own()
        return [_words(thread, Address.of(words)), *_scales(thread, Address.of(stats), Address.of(steps))]

    kinds = [result(WORDS, (64, 16), "uint32"), result(STATS, (64, 4), "uint32"), result(STEPS, (4, 16), "bfloat16")]
    return inline(quantized_take_digits, (_REF, _REF, _REF), kinds, words, stats, steps)


def take_codes(words: Ref, scale: Ref | None = None) -> tuple[jax.Array, ...]:
    """Words [64, 16] of an array [4, 256] in shared memory, and scales [64, 4] of one [64], each twice in a word."""

    def quantized_take_codes(_, words, scale=None):
        thread, taken = Thread.own(), [_words(Thread.own(), Address.of(words))]
        if scale is None:
            return taken
        factors = [_read_twice(Address.of(scale).to(2, row)) for row in thread.outputs]
        return [*taken, array(STATS, (64, 4), jnp.uint32, factors)]

    kinds = [result(WORDS, (64, 16), "uint32"), result(STATS, (64, 4), "uint32")]
    given = [words] if scale is None else [words, scale]
    return inline(quantized_take_codes, (_REF,) * len(given), kinds[: len(given)], *given)


def take_rows_in_order(x: Ref, index: Ref | None, chunk: Any, rows: int, inputs: int, mains: int) -> jax.Array:
    """Rows of x, in global memory, of a chunk of so many inputs, [rows, inputs]: of each 64 inputs, those of strip c
    come as columns 8 p + 2 c and one more, for all p. Chunks from `mains` on are of strips that `index` tells. What x
    does not have is 0."""

    def quantized_take_rows_in_order(_, x, chunk, index=None):
        (M, K), thread, of_row = _shape(x), Thread.own(), inputs // 64
        first_row, stretch = _div(thread.warp, of_row), _rem(thread.warp, of_row)
        within = arith.addi(arith.muli(stretch, constant(4)), thread.c)
        chunk, strips = chunk.registers[()], constant(inputs // 16)
        strip = arith.addi(arith.muli(chunk, strips), within)
        if index is not None:
            of_tail = arith.addi(arith.muli(arith.subi(chunk, constant(mains)), strips), within)
            beyond = arith.cmpi(arith.CmpIPredicate.sge, chunk, constant(mains))
            strip = arith.select(beyond, _look_up(_element(index, None, of_tail), beyond), strip)
        inside = arith.cmpi(arith.CmpIPredicate.slt, strip, constant(K // 16))
        column = arith.addi(arith.muli(strip, constant(16)), arith.muli(thread.g, constant(2)))
        own, read = _element(x, first_row, column), []
        for row in range(0, rows, 4 // of_row):
            there = arith.cmpi(arith.CmpIPredicate.slt, first_row, constant(M - row))
            address = _beside(own, constant(row * K), x)
            read.append([_look_up(address, arith.andi(inside, there))])
        return array(rows_in_order(inputs), (rows, inputs), jnp.bfloat16, read)

    given = [x, chunk] if index is None else [x, chunk, index]
    shape = result(rows_in_order(inputs), (rows, inputs), "bfloat16")
    return inline(quantized_take_rows_in_order, (_REF, _NUMBER, _REF)[: len(given)], shape, *given)


# --- In registers ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Thread:
    number: Value
    warp: Value
    g: Value
    c: Value

    @classmethod
    def own(cls) -> "Thread":
        number = _rem(mgpu.utils.thread_idx(), THREADS)
        lane = _rem(number, 32)
        return cls(number, _div(number, 32), _div(lane, 4), _rem(lane, 4))

    @property
    def outputs(self) -> list[Value]:
        """g and g + 8 of the warp's 16."""
        first = arith.addi(arith.muli(self.warp, constant(16)), self.g)
        return [first, arith.addi(first, constant(8))]


@dataclasses.dataclass(frozen=True)
class Address:
    """In shared memory."""

    base: Value
    offset: int = 0

    @classmethod
    def of(cls, ref: Ref) -> "Address":
        return cls(llvm.ptrtoint(i32(), mgpu.utils.memref_ptr(ref)))

    def __add__(self, nbytes: int) -> "Address":
        return Address(self.base, self.offset + nbytes)

    def to(self, *steps: Any) -> Value:
        """The address of so many times so many bytes: to(16, row, 4, column)."""
        total = arith.addi(self.base, constant(self.offset))
        for size, count in zip(steps[::2], steps[1::2], strict=True):
            total = arith.addi(total, arith.muli(count, constant(size)))
        return total


def _slot(ring: Ring, slots: Ref, slot: Value) -> Address:
    return Address(arith.addi(Address.of(slots).base, arith.muli(slot, constant(ring.nbytes))))


def _words(thread: Thread, words: Address) -> Any:
    """[64, 16], of 64 bytes an output."""
    of_outputs = [load(words.to(64, row, 16, thread.c), 4) for row in thread.outputs]
    return array(WORDS, (64, 16), jnp.uint32, of_outputs)


def _scales(thread: Thread, stats: Address, steps: Address) -> list:
    """Stats [64, 4] and steps [4, 16]."""
    of_outputs = [load(stats.to(16, row, 4, thread.c), 1) for row in thread.outputs]
    of_block = load(steps.to(32, thread.warp, 8, thread.c), 2)
    return [array(STATS, (64, 4), jnp.uint32, of_outputs), array(STEPS, (4, 16), jnp.bfloat16, [of_block])]


@dataclasses.dataclass(frozen=True)
class _Copies:
    """From chunk `chunk` on to a slot, if it is `live`. Addresses are sums of what belongs to a thread, which is
    computed once, and of the chunk times a number."""

    ring: Ring
    slots: Ref
    slot: Value
    chunk: Value
    live: Value

    @functools.cached_property
    def at(self) -> "Address":
        return _slot(self.ring, self.slots, self.slot)

    @functools.cached_property
    def thread(self) -> "Thread":
        return Thread.own()

    def words(self, arrays: Sequence[Ref], tile: int, output: Value) -> None:
        self._blocks_of(arrays, 0, output, 256, self.at + tile * _WORDS)

    def scales(self, arrays: Sequence[Ref], tile: int, output: Value) -> None:
        at = self.at + self.ring.scales_at
        if not self.ring.per_group:
            at += tile * (_STATS + _STEPS)
            self._blocks_of(arrays, 1, output, 64, at)
            self._blocks_of(arrays, 2, output, 16, at + _STATS)
        elif len(arrays) > 1:
            groups, columns = _shape(arrays[1])
            at, per_share = at + tile * _SCALES, 8 // self.ring.shares

            def source(i: Value) -> tuple[Value, Value | None]:
                share, piece = _div(i, per_share), _rem(i, per_share)
                group = _div(arith.addi(self.chunk, share), self.ring.per_group)
                group = arith.minsi(group, constant(groups - 1))
                column = arith.minsi(arith.addi(output, arith.muli(piece, constant(8))), constant(columns - 8))
                return _element(arrays[1], group, column), self._inside(share)

            self._pieces(8, source, lambda i: at.to(PIECE, i))

    def x(self, x: Ref, index: Ref | None) -> None:
        (M, K), inputs = _shape(x), self.ring.inputs
        per_row, at = inputs // 8, self.at + self.ring.x_at

        def source(i: Value) -> tuple[Value, Value | None]:
            row, piece = _div(i, per_row), _rem(i, per_row)  # of every share, one after another
            share, row = (constant(0), row) if self.ring.shares == 1 else (_div(row, M), _rem(row, M))
            column, inside = arith.muli(arith.addi(self.chunk, share), constant(inputs)), self._inside(share)
            within = arith.muli(piece, constant(8))
            if index is not None:
                beyond, number = self._beyond(share)
                place = arith.addi(arith.muli(number, constant(16)), _div(piece, 2))
                there = beyond if inside is None else arith.andi(beyond, inside)
                strip = _look_up(_element(index, None, place), there)
                # A strip is two pieces.
                before = arith.subi(arith.muli(strip, constant(16)), arith.muli(_div(piece, 2), constant(16)))
                column = arith.select(beyond, before, column)
            if K % inputs:
                last = arith.cmpi(arith.CmpIPredicate.slt, arith.addi(column, within), constant(K))
                inside = last if inside is None else arith.andi(inside, last)
            if inside is not None:
                column = arith.select(inside, column, constant(0))  # a copy of nothing still wants an address
            return _beside(_element(x, row, within), column, x), inside

        pieces = self.ring.shares * M * per_row
        self._pieces(pieces, source, lambda i: at.to(self.ring.pitch, _div(i, per_row), PIECE, _rem(i, per_row)))

    def _blocks_of(self, arrays: Sequence[Ref], which: int, output: Value, elements: int, to: Address) -> None:
        """Of the main plane's array or the tail's, so many adjacent elements of each four blocks of 16 outputs."""
        per_piece = PIECE * 8 // mgpu.utils.bitwidth(ir.MemRefType(arrays[which].type).element_type)
        pieces = elements // per_piece  # of a block

        def source(i: Value) -> tuple[Value, Value | None]:
            number, blocks = _div(i, pieces), 4 // self.ring.shares
            share = constant(0) if self.ring.shares == 1 else _div(number, blocks)
            inside = self._inside(share)

            def first(ref: Ref) -> Value:
                block = arith.addi(_div(output, 16), _rem(number, blocks))
                block = arith.minsi(block, constant(_shape(ref)[0] - 1))
                return _element(ref, block, arith.muli(_rem(i, pieces), constant(per_piece)))

            address, chunk = first(arrays[which]), arith.addi(self.chunk, share)
            if len(arrays) > 3:
                beyond, number_of_tail = self._beyond(share)
                address = arith.select(beyond, first(arrays[3 + which]), address)
                chunk = arith.select(beyond, number_of_tail, chunk)
            if inside is not None:
                chunk = arith.select(inside, chunk, constant(0))
            return _beside(address, arith.muli(chunk, constant(elements)), arrays[which]), inside

        self._pieces(4 * pieces, source, lambda i: to.to(PIECE, i))

    def _inside(self, share: Value) -> Value | None:
        """Whether a share has a chunk in this step; None if it always has."""
        if self.ring.chunks % self.ring.shares == 0:
            return None
        return arith.cmpi(arith.CmpIPredicate.slt, arith.addi(self.chunk, share), constant(self.ring.chunks))

    def _beyond(self, share: Value) -> tuple[Value, Value]:
        """Whether a share's chunk is of the tail, and which of its chunks it is then."""
        mains = self.ring.mains
        chunk = arith.addi(self.chunk, share)
        # Where the main plane ends between two steps, it is one answer for all shares.
        asked = chunk if mains % self.ring.shares else self.chunk
        return arith.cmpi(arith.CmpIPredicate.sge, asked, constant(mains)), arith.subi(chunk, constant(mains))

    def _pieces(
        self,
        count: int,
        source: Callable[[Value], tuple[Value, Value | None]],
        target: Callable[[Value], Value],
    ) -> None:
        """`source` of a piece: its address, and whether it is there; what is not is filled with 0."""
        for first in range(0, count, THREADS):
            i, live = arith.addi(self.thread.number, constant(first)), self.live
            if count - first < THREADS:
                mine = arith.cmpi(arith.CmpIPredicate.slt, i, constant(count))
                live = arith.andi(live, mine)
            address, inside = source(i)
            operands, constraint, size = [target(i), address, live], "r,l,b", ""
            if inside is not None:
                operands.append(arith.select(inside, constant(PIECE), constant(0)))
                constraint, size = "r,l,b,r", ", $3"
            code = f"@$2 cp.async.cg.shared.global [$0], [$1], 16{size};"
            llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, code, constraint, has_side_effects=True)


def _look_up(address: Value, live: Value) -> Value:
    """A word of global memory, or 0."""
    code = "{ mov.u32 $0, 0;\n@$2 ld.global.nc.u32 $0, [$1]; }"
    return llvm.inline_asm(i32(), [address, live], code, "=r,l,b", has_side_effects=True)


def load(address: Value, words: int) -> list[Value]:
    """Has side effects: it stays behind the wait."""
    if words == 1:
        return [llvm.inline_asm(i32(), [address], "ld.shared.u32 $0, [$1];", "=r,r", has_side_effects=True)]
    names = ", ".join(f"${i}" for i in range(words))
    code, constraint = f"ld.shared.v{words}.u32 {{{names}}}, [${words}];", ",".join(["=r"] * words + ["r"])
    type_ = llvm.StructType.get_literal([i32()] * words)
    loaded = llvm.inline_asm(type_, [address], code, constraint, has_side_effects=True)
    return [llvm.extractvalue(i32(), loaded, [i]) for i in range(words)]


def _read_bfloat16(address: Value) -> list[Value]:
    """As float32, in a word."""
    code = "{ .reg .b16 h; ld.shared.u16 h, [$1]; mov.b32 $0, {0, h}; }"
    return [llvm.inline_asm(i32(), [address], code, "=r,r", has_side_effects=True)]


def _read_twice(address: Value) -> list[Value]:
    """A bfloat16 in both halves of a word."""
    code = "{ .reg .b16 h; ld.shared.u16 h, [$1]; mov.b32 $0, {h, h}; }"
    return [llvm.inline_asm(i32(), [address], code, "=r,r", has_side_effects=True)]


def _shape(ref: Ref) -> list[int]:
    return ir.MemRefType(ref.type).shape


def _element(ref: Ref, row: Value | None, column: Value) -> Value:
    """Address in global memory."""
    i64, size = ir.IntegerType.get_signless(64), mgpu.utils.bitwidth(ir.MemRefType(ref.type).element_type) // 8
    at = column if row is None else arith.addi(arith.muli(row, constant(_shape(ref)[1])), column)
    pointer = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref))
    return arith.addi(pointer, arith.muli(arith.extui(i64, at), mgpu.c(size, i64)))


def _beside(address: Value, elements: Value, ref: Ref) -> Value:
    """So many elements of an array behind an address."""
    i64, size = ir.IntegerType.get_signless(64), mgpu.utils.bitwidth(ir.MemRefType(ref.type).element_type) // 8
    return arith.addi(address, arith.muli(arith.extsi(i64, elements), mgpu.c(size, i64)))


def _div(x: Value, by: int) -> Value:
    return arith.divui(x, constant(by))


def _rem(x: Value, by: int) -> Value:
    return arith.remui(x, constant(by))
