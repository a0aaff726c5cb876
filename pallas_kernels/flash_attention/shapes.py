# SPDX-License-Identifier: Apache-2.0
"""Named calls of flash_attention, shared by tests, tuner and benchmarks.

>>> import jax, jax.numpy as jnp
>>> arguments = SHAPES["ragged_113_203"].make(jnp.bfloat16, jax.random.key(0))
>>> {name: x.shape for name, x in arguments.items() if hasattr(x, "shape")}["query"]
(2, 113, 4, 64)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import masks
from pallas_kernels.core.softmax import UnifiedMax

# Extra arguments (mask, bias, sink, ...) of a shape: they need its letters and random numbers.
Extras = Callable[["Shape", np.random.Generator], dict[str, Any]]


def plain(shape: "Shape", random: np.random.Generator) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call. Letters as in the API; `mask_name` is what benchmark rows call its mask."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    Hv: int = 0  # 0 means H
    mask_name: str = "full"
    extras: Extras = plain

    def make(self, dtype, key: jax.Array) -> dict[str, Any]:
        """Random arguments of the call, by name."""
        # NumPy draws them: JAX would compile a generator for every shape.
        random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        return {
            "query": normal(random, (self.B, self.T, self.N, self.H), dtype),
            "key": normal(random, (self.B, self.S, self.K, self.H), dtype),
            "value": normal(random, (self.B, self.S, self.K, self.Hv or self.H), dtype),
            **self.extras(self, random),
        }

    def abstract(self, dtype) -> dict[str, Any]:
        """The same call with shapes in place of query, key and value: for `explain` and ahead-of-time compiling."""
        shapes = {
            "query": (self.B, self.T, self.N, self.H),
            "key": (self.B, self.S, self.K, self.H),
            "value": (self.B, self.S, self.K, self.Hv or self.H),
        }
        arrays = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
        return {**arrays, **self.extras(self, np.random.default_rng(0))}

    @property
    def large(self) -> bool:
        """Too large for a test on a CPU: for benchmarks only."""
        return self.B * self.N * self.T * self.S > 2**23

    def flops(self, direction: str = "forward", mask: masks.Mask | None = None) -> float:
        """Matrix operations of the live part of the plane, as the field counts them: 4 B N T S H forward (two
        products), 3.5 times that with the backward pass; half of it for a causal mask with T = S.

        Args:
          direction: "forward", "backward" or "forward_backward".
          mask: of the call that was made; None takes that of another draw, which matters for packed documents.
        """
        product = 2 * self.B * self.N * self.T * self.S * (self.H + (self.Hv or self.H))
        live = {"full": 1.0, "causal": 0.5}.get(self.mask_name)
        if live is None or (self.mask_name == "causal" and self.T != self.S):
            mask = self.extras(self, np.random.default_rng(0)).get("mask") if mask is None else mask
            live = visible_fraction(mask, self.T, self.S)
        return product * live * {"forward": 1.0, "backward": 2.5, "forward_backward": 3.5}[direction]


def visible_fraction(mask: masks.Mask | None, T: int, S: int) -> float:
    """Share of the T x S plane that a mask leaves visible, the mean over batch and heads. Linear memory.

    >>> visible_fraction(masks.Causal(), 2, 4)
    0.875
    """
    if mask is None:
        return 1.0
    cols, step = np.arange(S, dtype=np.int32), max(1, 2**24 // S)
    chunks = [np.arange(start, min(start + step, T), dtype=np.int32) for start in range(0, T, step)]
    return sum(float(np.mean(mask.allowed(rows, cols, T, S))) * len(rows) for rows in chunks) / T


def normal(random: np.random.Generator, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(random.standard_normal(shape, np.float32), dtype)


def causal(shape: Shape, random: np.random.Generator) -> dict[str, Any]:
    return {"mask": masks.Causal()}


def window(left: int) -> Extras:
    return lambda shape, random: {"mask": masks.Causal() & masks.Window(left, 0)}


def packed(documents: int) -> Extras:
    """Documents of random length, laid one after another in each row, under a causal mask."""

    def extras(shape: Shape, random: np.random.Generator) -> dict[str, Any]:
        starts = random.integers(1, shape.T, (shape.B, documents - 1, 1))
        return _documents(np.sum(np.arange(shape.T) >= starts, axis=1))

    return extras


def packed_log_uniform(shortest: int, longest: int) -> Extras:
    """Documents as they come: the logarithm of a length is uniform, each row is filled, and its last one cut off."""

    def extras(shape: Shape, random: np.random.Generator) -> dict[str, Any]:
        # More than a row can hold of them.
        size = (shape.B, shape.T // shortest + 1)
        lengths = np.exp(random.uniform(np.log(shortest), np.log(longest), size)).astype(np.int64)
        ends = np.cumsum(lengths, axis=1)[:, :, None]
        return _documents(np.sum(np.arange(shape.T) >= ends, axis=1))

    return extras


def _documents(ids: np.ndarray) -> dict[str, Any]:
    ids_on_device = jnp.asarray(ids, jnp.int32)
    return {"mask": masks.Causal() & masks.Segments(ids_on_device, ids_on_device)}


def everything(shape: Shape, random: np.random.Generator) -> dict[str, Any]:
    """Every option at once, with a length of 0 among the key lengths."""
    lengths = jnp.asarray([0, *([shape.S - shape.S // 3] * (shape.B - 1))], jnp.int32)
    return {
        "mask": masks.Causal() & masks.Window(left=shape.S // 2, right=None) & masks.Lengths(lengths),
        "bias": normal(random, (shape.N, 1, shape.S)),
        "sink": normal(random, (shape.N,)),
        "soft_cap": 5.0,
        "scale": 0.3,
    }


def asynchronous(extras: Extras, bound: float) -> Extras:
    """An asynchronous softmax. Logits of random arrays have a standard deviation of 1."""

    def with_unified_max(shape: Shape, random: np.random.Generator) -> dict[str, Any]:
        phi = jnp.asarray(random.uniform(-0.1, 0.1, shape.N), jnp.float32)
        return {**extras(shape, random), "unified_max": UnifiedMax(phi, -bound, bound)}

    return with_unified_max


def per_head_dense(shape: Shape, random: np.random.Generator) -> dict[str, Any]:
    visible = random.random((shape.N, shape.T, shape.S)) < 0.3
    visible[0, : shape.T // 2] = False  # half of head 0 sees nothing
    return {"mask": masks.Dense(jnp.asarray(visible))}


def full_bias(shape: Shape, random: np.random.Generator) -> dict[str, Any]:
    return {"bias": normal(random, (shape.B, shape.N, shape.T, shape.S))}


def prefix(shape: Shape, random: np.random.Generator) -> dict[str, Any]:
    """Prefix language model: the first keys are visible to all, the rest causally."""
    return {"mask": masks.Causal() | masks.Lengths(jnp.arange(1, shape.B + 1, dtype=jnp.int32) * (shape.S // 4))}


def cache(shape: Shape, random: np.random.Generator) -> dict[str, Any]:
    """Decoding against a cache that is only partly filled: positions say where each row's query stands."""
    end = random.integers(shape.T, shape.S, (shape.B, 1))
    return {"mask": masks.Causal(query_positions=jnp.asarray(end + np.arange(shape.T) - shape.T, jnp.int32))}


SHAPES: dict[str, Shape] = {
    # Small and ugly on purpose: for tests.
    "square_128": Shape(1, 128, 128, 2, 2, 64),
    "ragged_113_203": Shape(2, 113, 203, 4, 2, 64, mask_name="causal", extras=causal),
    "ragged_1023_1024": Shape(1, 1023, 1024, 2, 1, 32, mask_name="causal", extras=causal),
    "ragged_239_1": Shape(2, 239, 1, 2, 2, 64),
    "decode_1_8191": Shape(2, 1, 8191, 8, 2, 64, mask_name="cache", extras=cache),
    "causal_tall_200_70": Shape(1, 200, 70, 2, 2, 40, mask_name="causal", extras=causal),  # 130 empty rows
    "head_dim_72": Shape(1, 130, 130, 3, 3, 72, mask_name="causal", extras=causal),
    "head_dims_192_128": Shape(1, 96, 160, 2, 2, 192, 128, mask_name="causal", extras=causal),
    "mqa_packed_300": Shape(2, 300, 300, 4, 1, 32, mask_name="packed", extras=packed(4)),
    "window_500": Shape(1, 500, 500, 2, 1, 64, mask_name="window", extras=window(63)),
    "everything_90_150": Shape(3, 90, 150, 6, 3, 48, 56, mask_name="everything", extras=everything),
    "per_head_dense_77_91": Shape(2, 77, 91, 3, 3, 32, mask_name="dense", extras=per_head_dense),
    "full_bias_60_75": Shape(2, 60, 75, 4, 2, 32, mask_name="bias", extras=full_bias),
    "prefix_120": Shape(3, 120, 120, 2, 2, 32, mask_name="prefix", extras=prefix),
    "vit_b16_224": Shape(1, 197, 197, 12, 12, 64),
    # A few rows in a hundred are out of bounds.
    "asynchronous_140_150": Shape(2, 140, 150, 2, 1, 64, mask_name="causal", extras=asynchronous(causal, 3.2)),
    # Large: for benchmarks. Attention of 16k tokens, as the field's tables have it.
    **{
        f"d{H}_{mask}_{S // 1024}k": Shape(
            2**14 // S,
            S,
            S,
            2048 // H,
            2048 // H,
            H,
            mask_name=mask,
            extras=causal if mask == "causal" else plain,
        )
        for H in (128, 64)
        for mask in ("full", "causal")
        for S in (2048, 8192, 16384)
    },
    **{
        f"gqa_32_8_{'d64_' if H == 64 else ''}{S // 1024}k": Shape(
            2**14 // S, S, S, 32, 8, H, mask_name="causal", extras=causal
        )
        for H in (128, 64)
        for S in (2048, 8192, 16384)
    },
    "llama2_7b_prefill_4k": Shape(1, 4096, 4096, 32, 32, 128, mask_name="causal", extras=causal),
    "llama_1b_train_2k": Shape(8, 2048, 2048, 32, 8, 64, mask_name="causal", extras=causal),
    "packed_16k": Shape(1, 2**14, 2**14, 16, 16, 128, mask_name="packed", extras=packed_log_uniform(128, 2**14)),
    "window_1k_16k": Shape(1, 16384, 16384, 16, 16, 128, mask_name="window", extras=window(1023)),
    "window_4k_16k": Shape(1, 16384, 16384, 16, 16, 128, mask_name="window", extras=window(4095)),
    # Sixteen drafted tokens to verify for each of 32 sequences.
    "short_16_8k": Shape(32, 16, 8192, 32, 8, 128, mask_name="causal", extras=causal),
    # Beside the same without: what an asynchronous softmax is worth.
    **{
        f"asynchronous_d{H}_{mask}_{S // 1024}k": Shape(
            2**14 // S,
            S,
            S,
            2048 // H,
            2048 // H,
            H,
            mask_name=mask,
            extras=asynchronous(causal if mask == "causal" else plain, 20.0),
        )
        for H in (128, 64)
        for mask in ("full", "causal")
        for S in (2048, 8192)
    },
    # No multiple of any tile; the second is a chunk of a prompt that comes after 7168 other tokens.
    "ragged_4099": Shape(4, 4099, 4099, 16, 16, 128, mask_name="causal", extras=causal),
    "ragged_1023_8191": Shape(4, 1023, 8191, 16, 16, 128, mask_name="causal", extras=causal),
    "vit_b16_224_batch_256": Shape(256, 197, 197, 12, 12, 64),
}
