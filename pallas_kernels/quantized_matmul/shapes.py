# SPDX-License-Identifier: Apache-2.0
"""Named calls of quantized_matmul, shared by tests, tuner and benchmarks.

>>> import jax, jax.numpy as jnp
>>> arguments = SHAPES["swiglu_2_3"].make(jnp.bfloat16, jax.random.key(0))
>>> arguments["x"].shape, arguments["weight"].shape, arguments["activation"]
((2, 3, 200), (200, 72), 'swiglu')
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flat_gemm.shapes import MODELS
from pallas_kernels.quantized_matmul import packing
from pallas_kernels.quantized_matmul.packing import CHUNK, ROWS, round_up
from pallas_kernels.quantized_matmul.weights import BLOCK, STRIP, IntWeight, MixedBitWeight, Outliers, Plane, Weight

Scheme = Literal["mixed_2_4", "int2", "int4", "int8"]
GROUP_SIZES: dict[str, int | None] = {"int2": 64, "int4": 128, "int8": None}  # what `quantize` takes by default


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call. Letters as in the API.

    Attributes:
      scheme: as of `quantize`, with its default group size.
      four_bit_strips: how many strips of a "mixed_2_4" weight have 4 bits; None for an eighth of them.
      outliers: entries of each output, of a "mixed_2_4" weight.
      activation_bits: of an "int8" weight.
      leading: axes before M.
    """

    M: int
    N: int
    K: int
    scheme: Scheme = "mixed_2_4"
    four_bit_strips: int | None = None
    outliers: int = 0
    activation_bits: int | None = None
    activation: str | None = None
    bias: bool = False
    leading: tuple[int, ...] = ()
    mask_name: str = ""

    def make(self, dtype, key: jax.Array) -> dict[str, Any]:
        """Random arguments of the call, by name; sums of products are of size 1. Every digit, zero and scale code that
        the format allows is drawn, not only what a weight would be rounded to."""
        random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        arguments = self.abstract(dtype)
        for name in ("x", "bias"):
            if (array := arguments[name]) is not None:
                arguments[name] = jnp.asarray(random.standard_normal(array.shape, np.float32), array.dtype)
        return arguments | {"weight": self._draw(random)}

    def abstract(self, dtype) -> dict[str, Any]:
        """The same call with shapes in place of arrays: for `explain` and ahead-of-time compiling."""
        array = jax.ShapeDtypeStruct
        return {
            "x": array((*self.leading, self.M, self.K), jnp.dtype(dtype)),
            "weight": self._abstract_mixed() if self.scheme == "mixed_2_4" else self._abstract_int(),
            "bias": array((self.N,), jnp.dtype(dtype)) if self.bias else None,
            "activation": self.activation,
        }

    def flops(self, direction: str = "forward", mask: None = None) -> float:
        """Of one product; the backward pass has one too, for the weight has no gradient."""
        passes = 2 if direction == "forward_backward" else 1
        return 2.0 * passes * math.prod(self.leading) * self.M * self.N * self.K

    @property
    def large(self) -> bool:
        """Too large for a test on a CPU: for benchmarks only."""
        return self.N * self.K > 2**20

    def _abstract_mixed(self) -> Any:
        N, S = round_up(self.N, ROWS), -(-self.K // STRIP)
        T = round_up(self._tails(), CHUNK)

        def plane(strips: int) -> Plane:
            blocks, per_strip = N // BLOCK, BLOCK * strips
            steps = (blocks, strips, "bfloat16")
            return _abstract(Plane, words=(blocks, per_strip), stats=(blocks, per_strip // 4), steps=steps)

        entries = self.outliers * self.N
        outliers = _abstract(
            Outliers, values=(entries, "bfloat16"), columns=(entries, "uint16"), pointers=(self.N + 1, "int32")
        )
        index = jax.ShapeDtypeStruct((T,), jnp.int32)
        main, tail = plane(round_up(S, CHUNK)), plane(T)
        return MixedBitWeight(main, tail, index, (self.K, self.N), outliers if self.outliers else None)  # type: ignore

    def _abstract_int(self) -> Any:
        N, bits, group_size = round_up(self.N, ROWS), int(self.scheme[3:]), GROUP_SIZES[self.scheme]
        groups = (-(-self.K // (group_size or self.K)), N)
        words = (N // BLOCK, BLOCK * round_up(-(-self.K * bits // 32), CHUNK))
        arrays = _abstract(
            dict, words=words, scale=(*groups, "bfloat16" if group_size else "float32"), zero=(*groups, "uint8")
        )
        if bits != 2:
            arrays["zero"] = None
        return IntWeight(
            **arrays, shape=(self.K, self.N), bits=bits, group_size=group_size, activation_bits=self.activation_bits
        )

    def _tails(self) -> int:
        S = -(-self.K // STRIP)
        return round(S / 8) if self.four_bit_strips is None else self.four_bit_strips

    def _draw(self, random: np.random.Generator) -> Weight:
        weight = self.abstract("float32")["weight"]
        size = self.K**-0.5
        if isinstance(weight, IntWeight):
            words = _words(random, weight.words.shape)
            if weight.bits == 8:
                words |= np.uint32(0x01010101)  # no -128
            scale = size * 2.0 ** (1 - weight.bits) * random.uniform(1, 3, weight.scale.shape)
            scale[:, self.N :] = 0
            zero = None if weight.zero is None else jnp.asarray(random.integers(0, 4, weight.zero.shape, np.uint8))
            return dataclasses.replace(
                weight, words=jnp.asarray(words), scale=jnp.asarray(scale, weight.scale.dtype), zero=zero
            )
        strips = np.sort(random.choice(weight.strips, self._tails(), replace=False))
        T = weight.tail_index.shape[0]
        # The scale of a 4-bit strip's high digits is four times that of its low ones: same codes, four times the step.
        outputs = BLOCK * len(weight.main.steps), weight.main.steps.shape[1]
        scale_codes = _padded(random.integers(1, 16, outputs), self.N)
        scale_codes[:, weight.strips :] = 0
        steps = random.uniform(0.5, 1.5, weight.main.steps.shape) * size / 13
        steps[:, strips] /= 2
        main = _plane(random, scale_codes, steps)
        tail_codes, tail_steps = np.zeros((len(scale_codes), T), np.uint8), np.ones((len(steps), T))
        tail_codes[:, : len(strips)], tail_steps[:, : len(strips)] = scale_codes[:, strips], steps[:, strips] / 4
        index = np.zeros(T, np.int32)
        index[: len(strips)] = strips
        outliers = None
        if self.outliers:
            columns = [np.sort(random.choice(self.K, self.outliers, replace=False)) for _ in range(self.N)]
            outliers = Outliers(
                jnp.asarray(4 * size * random.standard_normal(self.N * self.outliers), jnp.bfloat16),
                jnp.asarray(np.concatenate(columns), jnp.uint16),
                jnp.asarray(np.arange(self.N + 1) * self.outliers, jnp.int32),
            )
        return dataclasses.replace(
            weight,
            main=main,
            tail=_plane(random, tail_codes, tail_steps),
            tail_index=jnp.asarray(index),
            outliers=outliers,
        )


def _abstract(kind: Any, **shapes: tuple[int | str, ...]) -> Any:
    """`kind` of abstract arrays; the last of a shape may be its dtype, else it is of words."""
    split = {name: (s[:-1], s[-1]) if isinstance(s[-1], str) else (s, "uint32") for name, s in shapes.items()}
    return kind(**{name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for name, (shape, dtype) in split.items()})


def _words(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.integers(0, 2**32, shape, np.uint32)


def _padded(array: np.ndarray, N: int) -> np.ndarray:
    """0 in the rows of padding."""
    array[N:] = 0
    return array


def _plane(random: np.random.Generator, scale_codes: np.ndarray, steps: np.ndarray) -> Plane:
    """Of scale codes [N', S'] and steps [N' / 16, S'] in the order of inputs."""
    stats = packing.pack_stats(scale_codes, random.integers(0, 4, scale_codes.shape))
    steps = packing.to_memory(steps.astype(jnp.bfloat16))
    words = _words(random, (len(steps), BLOCK * steps.shape[1]))
    return Plane(jnp.asarray(words), jnp.asarray(stats), jnp.asarray(steps))


SHAPES: dict[str, Shape] = {
    # Small and ugly on purpose: for tests.
    "mixed_1": Shape(1, 48, 256),
    "mixed_5": Shape(5, 40, 300, activation="silu", bias=True),
    "two_bits_3": Shape(3, 35, 100, four_bit_strips=0, bias=True),
    "four_bits_4": Shape(4, 24, 264, four_bit_strips=17),
    "outliers_8": Shape(8, 50, 128, outliers=3, activation="gelu"),
    "swiglu_2_3": Shape(3, 72, 200, activation="swiglu", bias=True, leading=(2,)),
    "int8_2": Shape(2, 40, 150, "int8", activation="silu", bias=True),
    "int8_rows_8": Shape(8, 48, 160, "int8", activation_bits=8, bias=True),
    "int4_3": Shape(3, 33, 300, "int4", activation="gelu"),
    "int2_17": Shape(17, 16, 100, "int2", activation="swiglu"),
    # What kernels take: whole chunks and tiles.
    "digits_8": Shape(8, 128, 512, activation="silu", bias=True),
    "digits_swiglu_8": Shape(8, 256, 768, activation="swiglu", bias=True),
    "digits_24": Shape(24, 128, 512),
    "codes_4_8": Shape(8, 128, 512, "int4", bias=True),
    "codes_8_3": Shape(3, 128, 512, "int8", activation="gelu", bias=True),
    # Large: for benchmarks.
    **{
        f"{model}_{layer}_{scheme}_m{M}": Shape(M, N, K, scheme)
        for model, layers in MODELS.items()
        for layer, (N, K) in layers.items()
        for scheme in ("mixed_2_4", "int4", "int8")
        for M in (1, 2, 4, 8, 16, 32, 64)
    },
}
