# SPDX-License-Identifier: Apache-2.0
"""Weights in few bits, as pytrees: they go through jit, scan, shardings and files as any other parameters do.

Letters: K inputs, N outputs, a strip is 16 consecutive inputs, S strips; x' is x rounded up to a multiple of 16. Arrays
have outputs first. How values lie in words, and words in memory, is told in packing.py.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantized_matmul import packing
from pallas_kernels.quantized_matmul.packing import CHUNK, ROWS, round_up

STRIP = 16  # inputs that share a scale and a zero, of every output: one word at 2 bits
BLOCK = 16  # outputs that share a step


def rounded(x: jax.Array) -> jax.Array:
    """float32 rounded to bfloat16. A cast there and back does not do it: XLA leaves both out."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


class _Weight:
    """What all have in common: arrays by name, and their sizes."""

    shape: tuple[int, int]

    @property
    def dtype(self) -> jnp.dtype:
        """What it multiplies in."""
        return jnp.dtype(jnp.bfloat16)

    @property
    def nbytes(self) -> int:
        """Of all arrays, padding included."""
        return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """From the bytes of all arrays, for each of the K N weights."""
        return 8 * self.nbytes / math.prod(self.shape)

    def tensors(self) -> dict[str, jax.Array]:
        """The arrays by the names of their attributes."""
        return _named(self)

    def layout(self) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """Name of an array -> the shape that it must have, and the dtypes that it may have."""
        raise NotImplementedError

    def check(self, prefix: str = "") -> None:
        """ValueError or TypeError that names the first array whose shape or dtype is not that of a weight [K, N]."""
        tensors = self.tensors()
        for name, (shape, dtypes) in self.layout().items():
            x = tensors[name]
            if tuple(x.shape) != shape:
                K, N = self.shape
                raise ValueError(
                    f"{prefix}{name} of a weight [K={K}, N={N}] must have shape {shape}, got {tuple(x.shape)}."
                )
            if jnp.dtype(x.dtype).name not in dtypes:
                raise TypeError(f"{prefix}{name} must be {' or '.join(dtypes)}, got {jnp.dtype(x.dtype).name}.")

    def decode(self, dtype: Any, start: jax.Array | int = 0, count: int | None = None) -> jax.Array:
        """[count, K]: `count` outputs from `start` on, multiples of 16; all N' of them by default. Computed in float32
        and rounded once, to `dtype`."""
        raise NotImplementedError

    def dequantize(self) -> jax.Array:
        """The weight that this one stands for, [K, N] in float32."""
        return _dequantize(self)


def _named(tree: Any, prefix: str = "") -> dict[str, jax.Array]:
    found = {}
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name)
        if dataclasses.is_dataclass(value):
            found |= _named(value, f"{prefix}{field.name}.")
        elif not field.metadata.get("static") and value is not None:
            found[prefix + field.name] = value
    return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plane:
    """A matrix of 2-bit digits with a scale and a zero for each output and strip: w = (q - z) * scale.

    Scales have two orders: scale = bfloat16(code * step), with a code of 4 bits for each output and strip, and a step
    for each block of 16 outputs and strip. Codes are 1 to 15; padding has 0. The zeros of scales are left out (ADR 7).

    Attributes:
      words: uint32 [N' / 16, 16 S'], 16 digits each.
      stats: uint32 [N' / 16, 4 S'], scale codes and zeros as `packing.pack_stats` has them.
      steps: bfloat16 [N' / 16, S'], in the order of words.
    """

    words: jax.Array
    stats: jax.Array
    steps: jax.Array

    def parts(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Words, zeros and scales (float32, of bfloat16's values), each [N', S'] in the order of inputs."""
        scale_codes, zeros = packing.unpack_stats(self.stats)
        steps = jnp.repeat(packing.from_memory(self.steps).astype(jnp.float32), BLOCK, axis=0)
        words = packing.from_memory(packing.unblocked(self.words, CHUNK))
        return words, zeros, rounded(scale_codes.astype(jnp.float32) * steps)

    def rows(self, start: jax.Array | int, count: int) -> "Plane":
        """Outputs from `start` on; both are multiples of 16."""
        return _blocks(self, start, count)


def _blocks[Tree](tree: Tree, start: jax.Array | int, count: int) -> Tree:
    """Of arrays with a row for each 16 outputs."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start // BLOCK, count // BLOCK), tree)


def _decode(words: jax.Array, zeros: jax.Array, scales: jax.Array) -> jax.Array:
    """(q - z) * scale, float32 [N', S', 16]: at most 10 bits, so that it is exact."""
    digits = packing.from_words(words, 2).astype(jnp.int32) - zeros[..., None].astype(jnp.int32)
    return digits.astype(jnp.float32) * scales[..., None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outliers:
    """Entries that are added to a weight, in compressed rows: those of output n are pointers[n] ... pointers[n + 1].

    Attributes:
      values: bfloat16 or float16 [entries].
      columns: uint16 [entries], int32 for more than 65536 inputs; ascending in each row.
      pointers: int32 [N + 1].
    """

    values: jax.Array
    columns: jax.Array
    pointers: jax.Array

    def rows(self) -> jax.Array:
        """The output of each entry, int32."""
        N = self.pointers.shape[0] - 1
        counts = self.pointers[1:] - self.pointers[:-1]
        return jnp.repeat(jnp.arange(N, dtype=jnp.int32), counts, total_repeat_length=self.values.shape[0])

    def added_to(self, w: jax.Array, start: jax.Array | int) -> jax.Array:
        """w [count, K], outputs from `start` on, with those entries that are theirs. No two share a place, so that the
        sum does not depend on the order."""
        row = self.rows() - start
        row = jnp.where((row >= 0) & (row < len(w)), row, len(w))  # a negative one would count from the end
        return w.at[row, self.columns].add(self.values.astype(w.dtype), mode="drop")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixedBitWeight(_Weight):
    """2 bits a weight, 4 in some strips: all of it is 2-bit planes of one form.

    A 4-bit code is two digits, q = 4 high + low. The high digits of a 4-bit strip lie in `main`, where the word of any
    strip lies, the low ones in `tail`, with a quarter of the scale; weight = main + tail. So no word moves whatever the
    precision map is, and a kernel needs no branch: a tail strip multiplies the inputs of its main strip once more.

        main   | strip 0 | strip 1 high | strip 2 | strip 3 | strip 4 high | ...        one word of each output
        tail   | strip 1 low | strip 4 low |                                            tail_index = [1, 4]

    Attributes:
      main: Plane of all strips, S' = ceil(K / 16) rounded up to a multiple of 16.
      tail: Plane of the low digits; its S', T', may be 0.
      tail_index: int32 [T'], the strips of `main` that they belong to, ascending, then 0 for padding.
      shape: (K, N).
      outliers: entries to add, or None.

    Source: Li et al., "Fast and Efficient 2-bit LLM Inference on GPU", 2023, section 2; docs/adr/0007 says what is not
    as it is there.
    """

    main: Plane
    tail: Plane
    tail_index: jax.Array
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    outliers: Outliers | None = None

    @property
    def strips(self) -> int:
        """S, without padding."""
        return -(-self.shape[0] // STRIP)

    def layout(self) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        N, S, T = round_up(self.shape[1], ROWS), round_up(self.strips, CHUNK), math.prod(self.tail_index.shape)
        expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
        for name, strips in (("main", S), ("tail", round_up(T, CHUNK))):
            expected[f"{name}.words"] = (N // BLOCK, BLOCK * strips), ("uint32",)
            expected[f"{name}.stats"] = (N // BLOCK, BLOCK * strips // 4), ("uint32",)
            expected[f"{name}.steps"] = (N // BLOCK, strips), ("bfloat16",)
        expected["tail_index"] = (T,), ("int32",)
        if self.outliers is not None:
            entries = (math.prod(self.outliers.values.shape),)
            expected["outliers.values"] = entries, ("bfloat16", "float16")
            expected["outliers.columns"] = entries, ("uint16" if self.shape[0] <= 2**16 else "int32",)
            expected["outliers.pointers"] = (self.shape[1] + 1,), ("int32",)
        return expected

    def tail_slots(self) -> jax.Array:
        """int32 [S']: where in `tail` the low digits of each strip are, T' for strips of 2 bits."""
        S, T = self.main.steps.shape[1], self.tail_index.shape[0]
        # Padding repeats 0 after a larger index, or after 0 itself.
        real = jnp.concatenate([jnp.ones(min(T, 1), bool), self.tail_index[1:] > self.tail_index[:-1]])
        strips = jnp.where(real, self.tail_index, S)
        return jnp.full(S, T, jnp.int32).at[strips].set(jnp.arange(T, dtype=jnp.int32), mode="drop")

    def four_bit_strips(self) -> jax.Array:
        """bool [S]: the precision map."""
        return self.tail_slots()[: self.strips] < self.tail_index.shape[0]

    def decode(self, dtype: Any, start: jax.Array | int = 0, count: int | None = None) -> jax.Array:
        count = BLOCK * self.main.words.shape[0] if count is None else count
        w = _decode(*self.main.rows(start, count).parts())
        if self.tail_index.shape[0]:
            slots = self.tail_slots()
            tail = self.tail.rows(start, count).parts()
            # A strip without low digits gets scale 0.
            w += _decode(*(jnp.take(x, slots, axis=1, mode="fill", fill_value=0) for x in tail))
        w = w.reshape(count, -1)[:, : self.shape[0]]
        return (w if self.outliers is None else self.outliers.added_to(w, start)).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IntWeight(_Weight):
    """2, 4 or 8 bits for all weights, with a scale for each output or each group of its inputs.

    w = (code - 2^(bits - 1)) * scale for 4 and 8 bits, (code - zero) * scale for 2.

    Attributes:
      words: uint32 [N' / 16, 16 W'], W' for each output.
      scale: float32 [1, N'] for each output, bfloat16 [ceil(K / group_size), N'] for groups; padding has 0.
      zero: uint8, as scale, for 2 bits; else None.
      shape: (K, N).
      bits: 2, 4 or 8.
      group_size: inputs that share a scale, the last group may have fewer; None if all do.
      activation_bits: 8 if x is rounded to int8 too, row by row, and multiplied in integers; else None.
    """

    words: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    group_size: int | None = dataclasses.field(default=None, metadata={"static": True})
    activation_bits: int | None = dataclasses.field(default=None, metadata={"static": True})

    def layout(self) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        K, N = self.shape[0], round_up(self.shape[1], ROWS)
        groups = 1 if self.group_size is None else -(-K // self.group_size)
        words = (N // BLOCK, BLOCK * round_up(-(-K * self.bits // 32), CHUNK)), ("uint32",)
        scale = (groups, N), ("float32" if self.group_size is None else "bfloat16",)
        expected = {"words": words, "scale": scale}
        return expected if self.zero is None else expected | {"zero": ((groups, N), ("uint8",))}

    def integers(self, start: jax.Array | int = 0, count: int | None = None) -> jax.Array:
        """The weight without its scales, int32 [count, K]."""
        words = self.words if count is None else _blocks(self.words, start, count)
        codes = packing.unpack(words, self.bits, self.shape[0]).astype(jnp.int32)
        zero = 2 ** (self.bits - 1) if self.zero is None else self._each(self.zero.astype(jnp.int32), start, count)
        return codes - zero

    def scales(self, start: jax.Array | int = 0, count: int | None = None) -> jax.Array:
        """float32, [count, K] or [count, 1]."""
        return self._each(self.scale.astype(jnp.float32), start, count)

    def decode(self, dtype: Any, start: jax.Array | int = 0, count: int | None = None) -> jax.Array:
        return (self.integers(start, count).astype(jnp.float32) * self.scales(start, count)).astype(dtype)

    def _each(self, groups: jax.Array, start: jax.Array | int, count: int | None) -> jax.Array:
        """Of groups [G, N'], what broadcasts to all inputs of some outputs, [count, K] or [count, 1]."""
        groups = groups.T if count is None else lax.dynamic_slice_in_dim(groups.T, start, count)
        return groups if self.group_size is None else jnp.repeat(groups, self.group_size, axis=1)[:, : self.shape[0]]


Weight = MixedBitWeight | IntWeight


@jax.jit
def _dequantize(weight: Weight) -> jax.Array:
    return weight.decode(jnp.float32)[: weight.shape[1]].T
