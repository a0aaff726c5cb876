# SPDX-License-Identifier: Apache-2.0
"""In which numbers a vision transformer computes: what its products read, and how.

    Floating         x w + b, flash_attention
    Sparse           the same with 2:4 weights: sparse_matmul
    Observing        the same, and remembers what products read: for calibration
    FakeQuantized    codes(x) codes(w) a b + bias, and of attention's products; gradients pass       qat.fake_codes
    Integers         the same from integers that are stored: sparse_matmul and products of int8 -> int32

A model takes one of them for its blocks, whose arrays have a leading axis of layers, and one for its ends, patches and
head. Products of a block and what each reads:

    query, key, value <- attention      out <- out      up <- up      down <- down      scores <- q, k      sums <- p, v

Letters: B batch, T tokens, N heads, H head dim, D width, L layers.

Source: Yu et al., "Boost Vision Transformer with GPU-Friendly Sparsity and Quantization", 2023 (GPUSQ-ViT), section 4.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from models import qat
from models.qat import Codes
from pallas_kernels import Sparse24Weight, flash_attention, sparse_matmul
from pallas_kernels.core.activations import ACTIVATIONS, Activation

# What each layer of a model reads, by the layer's name; layers with the same input share its range.
INPUTS = {
    "query": "attention",
    "key": "attention",
    "value": "attention",
    "out": "out",
    "up": "up",
    "down": "down",
    "patches": "patches",
    "head": "head",
}


class Arithmetic(Protocol):
    """What a model calls."""

    def linear(self, name: str, layer: nnx.Linear, x: jax.Array, activation: Activation | None = None) -> jax.Array:
        """x [..., K] through a layer that has this name in the model, and an activation of pallas_kernels."""
        ...

    def attention(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        implementation: Any,
        *,
        bias: jax.Array | None = None,
        mask: Any = None,
    ) -> jax.Array:
        """[B, T, N, H]; `bias` is added to logits, and `mask` one of pallas_kernels.masks, as of flash_attention."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Floating:
    """As the layers are."""

    def linear(self, name: str, layer: nnx.Linear, x: jax.Array, activation: Activation | None = None) -> jax.Array:
        return ACTIVATIONS[activation](layer(x))

    def attention(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        implementation: Any,
        *,
        bias: jax.Array | None = None,
        mask: Any = None,
    ) -> jax.Array:
        return flash_attention(query, key, value, bias=bias, mask=mask, implementation=implementation)

    def as_read(self, name: str, x: jax.Array) -> jax.Array:
        return x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sparse(Floating):
    """Floating, with weights of which two of four inputs are kept; kernels of layers are not looked at.

    Attributes:
      weights: by the layer's name, in the type that layers compute in; of blocks with a leading axis L.
    """

    weights: Mapping[str, Sparse24Weight]

    def linear(self, name: str, layer: nnx.Linear, x: jax.Array, activation: Activation | None = None) -> jax.Array:
        return sparse_matmul(x.astype(layer.dtype), self.weights[name], bias=_bias(layer), activation=activation)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair:
    """Of a model: for its blocks, and for its ends."""

    blocks: Any = Floating()
    ends: Any = Floating()


FLOATING = Pair()


@dataclasses.dataclass(frozen=True)
class Observing:
    """Remembers what products of another arithmetic read, within one trace.

    Attributes:
      seen: by what is read; "p" are the probabilities of attention, [B, N, T, T].
      of: Floating or FakeQuantized.
    """

    seen: dict[str, jax.Array]
    of: Any = Floating()

    def linear(self, name: str, layer: nnx.Linear, x: jax.Array, activation: Activation | None = None) -> jax.Array:
        self.seen[INPUTS[name]] = x
        return self.of.linear(name, layer, x, activation)

    def attention(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        implementation: Any,
        *,
        bias: jax.Array | None = None,
        mask: Any = None,
    ) -> jax.Array:
        p = _probabilities(_scores(self.of.as_read("q", query), self.of.as_read("k", key)), bias, mask)
        self.seen.update(q=query, k=key, p=p, v=value)
        return self.of.attention(query, key, value, implementation, bias=bias, mask=mask)


@dataclasses.dataclass(frozen=True)
class _Rounded:
    """What both of the following share: attention of codes, which they make as `_codes` says.

    Attributes:
      scales: float32 of activations, by what is read; of blocks [L].
      bits: of weights and activations, 8 or 4.
    """

    scales: Mapping[str, jax.Array]
    bits: int = dataclasses.field(metadata={"static": True})

    def attention(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        implementation: Any,
        *,
        bias: jax.Array | None = None,
        mask: Any = None,
    ) -> jax.Array:
        q, k, v = (self._codes(name, x) for name, x in zip("qkv", (query, key, value), strict=True))
        scores = _scores(q, k) * (self.scales["q"] * self.scales["k"])
        p = self._codes("p", _probabilities(scores, bias, mask))
        return (_sums(p, v) * (self.scales["p"] * self.scales["v"])).astype(query.dtype)

    def _codes(self, name: str, x: jax.Array) -> jax.Array:
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FakeQuantized(_Rounded):
    """Rounds what products read, and gradients pass."""

    def linear(self, name: str, layer: nnx.Linear, x: jax.Array, activation: Activation | None = None) -> jax.Array:
        codes, kernel = Codes(self.bits), layer.kernel[...].astype(jnp.float32)
        scale = jax.lax.stop_gradient(qat.weight_scale(kernel, codes))
        sums = self._codes(INPUTS[name], x) @ qat.fake_codes(kernel, scale, codes)
        y = sums * (self.scales[INPUTS[name]] * scale[0]) + _bias(layer).astype(jnp.float32)
        return ACTIVATIONS[activation](y).astype(layer.dtype)

    def as_read(self, name: str, x: jax.Array) -> jax.Array:
        """What products make of an activation."""
        return self._codes(name, x) * self.scales[name]

    def _codes(self, name: str, x: jax.Array) -> jax.Array:
        return qat.fake_codes(x, self.scales[name], codes_of(name, self.bits))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Integers(_Rounded):
    """Computes as `FakeQuantized` does, from stored integers: kernels of layers are not looked at.

    Attributes:
      weights: by the layer's name: Sparse24Weight, or dense int8 [N, K], which products read along K; of blocks with a
        leading axis L.
      weight_scales: float32 [N], or [L, N].
      floating_attention: attention is computed by flash_attention, in the type of the layers, and is not rounded: not
        what training saw, and faster.
    """

    weights: Mapping[str, Sparse24Weight | jax.Array]
    weight_scales: Mapping[str, jax.Array]
    floating_attention: bool = dataclasses.field(default=False, metadata={"static": True})

    def linear(self, name: str, layer: nnx.Linear, x: jax.Array, activation: Activation | None = None) -> jax.Array:
        scales = self.scales[INPUTS[name]], self.weight_scales[name]
        options: dict[str, Any] = {"bias": _bias(layer), "scales": scales, "out_dtype": layer.dtype}
        options["activation"] = activation
        weight = self.weights[name]
        weight = weight if isinstance(weight, Sparse24Weight) else weight.T
        return sparse_matmul(self._codes(INPUTS[name], x), weight, **options)

    def attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array, implementation: Any, **options: Any
    ) -> jax.Array:
        of: Any = Floating if self.floating_attention else _Rounded
        return of.attention(self, query, key, value, implementation, **options)

    def _codes(self, name: str, x: jax.Array) -> jax.Array:
        return qat.quantize(x, self.scales[name], codes_of(name, self.bits)).astype(jnp.int8)


def codes_of(name: str, bits: int) -> Codes:
    """Of activations, by what is read. Probabilities are never negative; of 8 bits they have the codes of int8."""
    return Codes(min(bits, 7), signed=False) if name == "p" else Codes(bits)


def _bias(layer: nnx.Linear) -> jax.Array:
    assert layer.bias is not None
    return layer.bias[...].astype(layer.dtype)


def _scores(query: jax.Array, key: jax.Array) -> jax.Array:
    """float32 [B, N, T, S], times 1 / sqrt(H); of integers exact."""
    scores = _product("btnh,bsnh->bnts", query, key)
    return scores / math.sqrt(query.shape[-1])


def _probabilities(scores: jax.Array, bias: jax.Array | None, mask: Any) -> jax.Array:
    """Softmax of [B, N, T, S]. Bias and mask come after the rounding: their size would take its range."""
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask.as_array(*scores.shape[2:]), scores, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)


def _sums(p: jax.Array, value: jax.Array) -> jax.Array:
    """float32 [B, T, N, H]."""
    return _product("bnts,bsnh->btnh", p, value)


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    kind = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    return jnp.einsum(axes, a, b, preferred_element_type=kind).astype(jnp.float32)
