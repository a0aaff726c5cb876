# SPDX-License-Identifier: Apache-2.0
"""Weights of which two of four inputs are kept, as a pytree, in the order in which sparse tensor cores take them.

Letters: K inputs, N outputs, G = K / 4 groups; x' is x rounded up. Plain order is values [K / 2, N] and which of the
group's four inputs each is, [K / 2, N]. Hardware order is by 64 outputs, and by 128 threads that hold them, thread
32 w + 4 g + c the outputs 16 w + g and 16 w + g + 8:

    values [N' / 64, steps, 128, 16 bytes]   a step is 32 bytes of kept values of each output; a thread has of each of
                                             its two outputs bytes 4 c ... 4 c + 3 and 16 + 4 c ... 16 + 4 c + 3
    metadata [N' / 64, K' / 64, 128]         2 + 2 bits for each group, two places of 0 to 3. 16-bit types: a word has
                                             16 bits of each of the thread's two outputs, for inputs 16 c ... 16 c + 15
                                             of 64. int8: the 32 bits of one, 16 w + g + 8 (c % 2), for inputs
                                             32 (c / 2) ... + 31

so that a thread reads 16 adjacent bytes for each product, and nothing is moved on the way to it. Values take 1/2 and
metadata 1/16 (16-bit types) or 1/8 (int8) of the dense bytes. Weights of 4 bits keep two of four pairs of adjacent
inputs; a pair is a byte, the first input in its lower half, so that they are a 2:4 weight of bytes.

Source: PTX ISA, "Sparse wgmma" and "Matrix fragments for sparse mma"; Mishra et al., "Accelerating Sparse Deep Neural
Networks", 2021.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

ROWS = 64  # outputs of a block
DTYPES = ("float32", "bfloat16", "float16", "int8")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sparse24Weight:
    """A weight [K, N] with at most two nonzero inputs in every four, of every output.

    >>> import jax.numpy as jnp
    >>> from pallas_kernels import Sparse24Weight, prune_2_4
    >>> w = prune_2_4(jnp.arange(64 * 64, dtype=jnp.bfloat16).reshape(64, 64))
    >>> weight = Sparse24Weight.from_dense(w)
    >>> bool((weight.dequantize() == w).all()), weight.bits_per_weight
    (True, 9.0)

    Attributes:
      values: float32, bfloat16, float16 or int8, in hardware order.
      metadata: uint32, in hardware order.
      shape: (K, N).
      bits: 4 for pairs of 4 bits in bytes of int8; else None.
    """

    values: jax.Array
    metadata: jax.Array
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    bits: int | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def from_dense(cls, w: jax.Array, *, bits: int | None = None) -> "Sparse24Weight":
        """The weight of a dense one that has the pattern already (`prune_2_4`, or `prune_4_8_pairs` for bits=4).

        Where fewer than two of a group are nonzero, the first free inputs are kept, too.

        Args:
          w: [K, N], float32, bfloat16, float16 or int8; for bits=4 integers from -8 to 7. K is a multiple of 4, or 8.

        Raises:
          ValueError: sizes that do not fit, or more than two nonzeros in a group, which is named. Traced values are not
            looked at: of them the first two nonzeros are kept.
          TypeError: another dtype.
        """
        if jnp.ndim(w) != 2:
            raise ValueError(f"Sparse24Weight: w must be [K, N], got shape {jnp.shape(w)}.")
        K, N = w.shape
        _check_sizes(K, bits)
        if bits == 4:
            w = _as_bytes(w)
        elif w.dtype.name not in DTYPES:
            raise TypeError(f"Sparse24Weight: w must be one of {', '.join(DTYPES)}, got {w.dtype}.")
        groups = w.reshape(-1, 4, N)
        if not isinstance(w, Tracer):
            _check_pattern(np.asarray(groups != 0), w, bits)
        # Nonzeros first, in order, then zeros in order; the two that are kept in the order of inputs.
        places = jnp.sort(jnp.argsort(groups == 0, axis=1, stable=True)[:, :2], axis=1)
        values = jnp.take_along_axis(groups, places, axis=1)
        return cls._packed(values.reshape(-1, N), places.reshape(-1, N), (K, N), bits)

    @classmethod
    def from_plain(cls, values: jax.Array, places: jax.Array, *, bits: int | None = None) -> "Sparse24Weight":
        """The weight of values [K / 2, N] at `places` [K / 2, N], 0 to 3, ascending within each group of two; for
        bits=4 of bytes, [K / 4, N].

        Raises:
          ValueError: shapes that do not fit; places that are not 0 to 3 or do not ascend, with the group's index.
        """
        if jnp.ndim(values) != 2 or jnp.shape(values) != jnp.shape(places) or values.shape[0] % 2:
            raise ValueError(
                "Sparse24Weight: values and places must both be [K / 2, N], two for each group of four inputs, got "
                f"{jnp.shape(values)} and {jnp.shape(places)}."
            )
        if values.dtype.name not in (DTYPES if bits is None else ("int8",)):
            raise TypeError(f"Sparse24Weight: values must be one of {', '.join(DTYPES)}, got {values.dtype}.")
        K, N = values.shape[0] * (4 if bits == 4 else 2), values.shape[1]
        _check_sizes(K, bits)
        if not isinstance(places, Tracer):
            _check_places(np.asarray(places))
        return cls._packed(values, places, (K, N), bits)

    def to_plain(self) -> tuple[jax.Array, jax.Array]:
        """Values [K / 2, N] and places, uint8 [K / 2, N]; for bits=4 of bytes, [K / 4, N]."""
        kept, N = self._inputs // 2, self.shape[1]
        values, places = _from_hardware(self.values), _from_metadata(self.metadata, self.values.dtype)
        return values[:N, :kept].T, places[:N, :kept].T.astype(jnp.uint8)

    def dequantize(self) -> jax.Array:
        """[K, N], dense; int8 for bits=4."""
        values, places = self.to_plain()
        N = self.shape[1]
        of_groups = values.reshape(-1, 2, 1, N), places.reshape(-1, 2, 1, N)
        four = jnp.arange(4, dtype=jnp.uint8)[None, None, :, None]
        # Two comparisons for each input, and no scatter.
        dense = jnp.sum(jnp.where(of_groups[1] == four, of_groups[0], 0), axis=1, dtype=values.dtype).reshape(-1, N)
        return dense if self.bits is None else _from_bytes(dense)

    def kept_of(self, dense: jax.Array) -> jax.Array:
        """Entries of an array [K, N] that are kept here, in the order of `values`: what becomes of a gradient."""
        _, places = self.to_plain()
        groups = dense.reshape(-1, 4, dense.shape[1])
        at = places.reshape(-1, 2, dense.shape[1]).astype(jnp.int32)
        return _to_hardware(jnp.take_along_axis(groups, at, axis=1).reshape(-1, dense.shape[1]).T)

    @property
    def dtype(self) -> jnp.dtype:
        """What it multiplies in."""
        return jnp.dtype(self.values.dtype)

    @property
    def nbytes(self) -> int:
        """Of both arrays, padding included."""
        return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in (self.values, self.metadata))

    @property
    def bits_per_weight(self) -> float:
        """From the bytes of both arrays, for each of the K N weights, zeros included."""
        return 8 * self.nbytes / math.prod(self.shape)

    def check(self) -> None:
        """ValueError or TypeError that names the first array whose shape or dtype is not that of a weight [K, N]."""
        (K, N), dtype = self.shape, jnp.dtype(self.values.dtype)
        _check_sizes(K, self.bits)
        if dtype.name not in (DTYPES if self.bits is None else ("int8",)):
            raise TypeError(f"values must be one of {', '.join(DTYPES)} (int8 with bits=4), got {dtype.name}.")
        if jnp.dtype(self.metadata.dtype) != jnp.uint32:
            raise TypeError(f"metadata must be uint32, got {jnp.dtype(self.metadata.dtype).name}.")
        inputs, blocks = _padded_inputs(self._inputs, dtype), -(-N // ROWS)
        for name, shape in {
            "values": (blocks, inputs * dtype.itemsize // 64, 128, 16 // dtype.itemsize),
            "metadata": (blocks, inputs // 64, 128),
        }.items():
            if (found := tuple(getattr(self, name).shape)) != shape:
                raise ValueError(
                    f"{name} of a weight [K={K}, N={N}] in {dtype.name} must have shape {shape}, got {found}."
                )

    def check_metadata(self) -> None:
        """ValueError that names the first group whose places do not ascend: of a weight that was read from a file."""
        self.check()
        _check_places(np.asarray(self.to_plain()[1]))

    @classmethod
    def _packed(
        cls, values: jax.Array, places: jax.Array, shape: tuple[int, int], bits: int | None
    ) -> "Sparse24Weight":
        kept = _padded_inputs(2 * values.shape[0], values.dtype) // 2
        more = ((0, -shape[1] % ROWS), (0, kept - values.shape[0]))
        values = jnp.pad(values.T, more)
        # Padding keeps the first two of each four.
        odd = jnp.arange(kept) % 2
        real = (jnp.arange(len(values)) < shape[1])[:, None] & (jnp.arange(kept) < places.shape[0])
        places = jnp.where(real, jnp.pad(places.T, more), odd)
        return cls(_to_hardware(values), _to_metadata(places, values.dtype), shape, bits)

    @property
    def _inputs(self) -> int:
        """Values, or bytes of two, along K."""
        return self.shape[0] if self.bits is None else self.shape[0] // 2


# --- Order ----------------------------------------------------------------------------------------------------


def _padded_inputs(inputs: int, dtype: Any) -> int:
    """To whole words of metadata, and to 128 bytes of a row of x: two products."""
    multiple = max(64, 128 // jnp.dtype(dtype).itemsize)
    return -(-inputs // multiple) * multiple


def _to_hardware(values: jax.Array) -> jax.Array:
    """[N' / 64, steps, 128, 16 bytes] of [N', kept]."""
    values = jnp.pad(
        values, ((0, -values.shape[0] % ROWS), (0, -values.shape[1] % (_padded_inputs(1, values.dtype) // 2)))
    )
    four = 4 // values.dtype.itemsize  # values in a word
    # [block, warp, row or row + 8, g, step, half, c, values]
    parts = values.reshape(-1, 4, 2, 8, values.shape[1] // (8 * four), 2, 4, four)
    return parts.transpose(0, 4, 1, 3, 6, 5, 2, 7).reshape(parts.shape[0], parts.shape[4], 128, 4 * four)


def _from_hardware(values: jax.Array) -> jax.Array:
    """[N', kept]."""
    blocks, steps, _, width = values.shape
    parts = values.reshape(blocks, steps, 4, 8, 4, 2, 2, width // 4).transpose(0, 2, 6, 3, 1, 5, 4, 7)
    return parts.reshape(ROWS * blocks, -1)


def _to_metadata(places: jax.Array, dtype: Any) -> jax.Array:
    """uint32 [N' / 64, K' / 64, 128] of [N', K' / 2], for values of a type."""
    pairs = places.astype(jnp.uint32).reshape(len(places), -1, 2)
    nibbles = (pairs[..., 0] | pairs[..., 1] << 2).reshape(len(places), -1, 4)
    halves = jnp.sum(nibbles << jnp.arange(0, 16, 4, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)
    # [block, warp, row or row + 8, g, word, c] of 16 bits; for int8 c is 2 * (which half of the inputs) + lower, upper
    parts = halves.reshape(-1, 4, 2, 8, halves.shape[1] // 4, 4)
    if jnp.dtype(dtype) == jnp.int8:
        words = parts[..., ::2] | parts[..., 1::2] << 16  # [block, warp, row or row + 8, g, word, half]
        words = words.transpose(0, 4, 1, 3, 5, 2)
    else:
        words = (parts[:, :, 0] | parts[:, :, 1] << 16).transpose(0, 3, 1, 2, 4)
    return words.reshape(words.shape[0], words.shape[1], 128)


def _from_metadata(metadata: jax.Array, dtype: Any) -> jax.Array:
    """[N', K' / 2]."""
    blocks, words, _ = metadata.shape
    if jnp.dtype(dtype) == jnp.int8:
        parts = metadata.reshape(blocks, words, 4, 8, 2, 2).transpose(0, 2, 5, 3, 1, 4)
        halves = jnp.stack([parts & 0xFFFF, parts >> 16], axis=-1).reshape(blocks, 4, 2, 8, words, 4)
    else:
        parts = metadata.reshape(blocks, words, 4, 8, 4).transpose(0, 2, 3, 1, 4)
        halves = jnp.stack([parts & 0xFFFF, parts >> 16], axis=2)  # [block, warp, row or row + 8, g, word, c]
    places = halves[..., None] >> jnp.arange(0, 16, 2, dtype=jnp.uint32) & 3
    return places.reshape(ROWS * blocks, -1)


# --- Pairs of 4 bits ------------------------------------------------------------------------------------------


def _as_bytes(w: jax.Array) -> jax.Array:
    """int8 [K / 2, N] of integers [K, N] from -8 to 7."""
    if not jnp.issubdtype(w.dtype, jnp.integer):
        raise TypeError(f"Sparse24Weight: w of bits=4 must be of integers, got {w.dtype}.")
    w = w.astype(jnp.int32)
    if not isinstance(w, Tracer) and w.size and (jnp.max(w) > 7 or jnp.min(w) < -8):
        raise ValueError(
            f"Sparse24Weight: w of bits=4 must be from -8 to 7, got {int(jnp.min(w))} to {int(jnp.max(w))}."
        )
    pairs = w.reshape(-1, 2, w.shape[1]) & 15
    return lax.bitcast_convert_type((pairs[:, 0] | pairs[:, 1] << 4).astype(jnp.uint8), jnp.int8)


def _from_bytes(pairs: jax.Array) -> jax.Array:
    """int8 [K, N] of [K / 2, N]."""
    both = jnp.stack([pairs << 4, pairs], axis=1) >> 4  # with the sign
    return both.reshape(-1, pairs.shape[1])


# --- Checks ---------------------------------------------------------------------------------------------------


def _check_sizes(K: int, bits: int | None) -> None:
    if bits not in (None, 4):
        raise ValueError(f"Sparse24Weight: bits must be None or 4, got {bits!r}.")
    multiple = 4 if bits is None else 8
    if K % multiple or not K:
        raise ValueError(
            f"Sparse24Weight: K={K} inputs; the pattern is of {multiple}: pad with zeros to "
            f"{max(1, -(-K // multiple)) * multiple}, or leave this weight dense."
        )


def _check_pattern(nonzero: np.ndarray, w: jax.Array, bits: int | None) -> None:
    """nonzero [G, 4, N]."""
    if len(bad := np.argwhere(nonzero.sum(1) > 2)):
        group, n = map(int, bad[0])
        first, what = (4 * group, "inputs") if bits is None else (8 * group, "pairs of inputs")
        last = first + (4 if bits is None else 8)
        found = np.asarray(w).reshape(-1, 4, w.shape[1])[group, :, n].tolist()
        raise ValueError(
            f"Sparse24Weight: group {group} of output {n}, inputs {first} to {last - 1}, has "
            f"{int(nonzero[group, :, n].sum())} nonzero {what} and may have 2: {found}; {len(bad)} such groups. "
            "prune_2_4 (prune_4_8_pairs for bits=4) makes the pattern; its axis must be that of the inputs, 0."
        )


def _check_places(places: np.ndarray) -> None:
    """places [K / 2, N]."""
    pairs = places.reshape(-1, 2, places.shape[1])
    wrong = (pairs[:, 0] >= pairs[:, 1]) | (pairs < 0).any(1) | (pairs > 3).any(1)
    if len(bad := np.argwhere(wrong)):
        group, n = map(int, bad[0])
        raise ValueError(
            f"Sparse24Weight: group {group} of output {n} keeps places {pairs[group, :, n].tolist()}, which must "
            f"ascend within 0 to 3; {len(bad)} such groups. The metadata is damaged, or in another order."
        )
