# SPDX-License-Identifier: Apache-2.0
"""A Llama made ready to generate: weights fused and laid out for flat products, layers unrolled, attention to a cache.

    one layer, R rows of x           weights, all stored [outputs, inputs]
      q, k, v = norm(x) qkv^T + bias qkv      [(N + 2K) H, D]    query, key and value heads
      rotate q, k; k, v -> cache
      x = x + attention out^T        out      [D, N H]           the sum is part of the product
      g = silu(gate h) * up h        gate_up  [2F, D]            h = norm(x); gate rows, then up rows; one product
      x = x + g down^T               down     [D, F]

Training scans over stacked layers (llama.py). Here that would copy every layer's slice of the weights and of the cache
before a kernel reads it, three times the bytes; so each layer has arrays of its own and the loop over them is Python's.
The learned scales of the norms are multiplied into the weights that follow, and the norms done within their products.
Each of the four weights may be a quantized one (compress.py), with the scales of norms apart: large inputs have small
ones, and weights times those would share a step with others. `product` is where quantized weights differ.
The function of a layer is jitted, so that a program of 32 layers is traced and lowered as one.

Letters as in layers.py, V vocabulary size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.cache import KVCache, Places, write
from models.layers import Block, RMSNorm, causal_mask, rms_norm, rope_tables, rotate, vocabulary_logits
from models.llama import Llama, LlamaConfig
from pallas_kernels import (
    IntWeight,
    MixedBitWeight,
    UnifiedMax,
    decode_attention,
    flash_attention,
    flat_gemm,
    quantized_matmul,
)

if TYPE_CHECKING:
    from models.calibrate import Calibration
    from models.paged_cache import PagedCache

Implementation = str | tuple[str, ...]
AnyCache = TypeVar("AnyCache", KVCache, "PagedCache")
Matrix = jax.Array | MixedBitWeight | IntWeight  # [outputs, inputs]; `shape` of the others is turned


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """One layer's weights, as drawn above; biases, query_norm and key_norm [H] are None in models without them, and the
    scales of norms [D] where they are part of qkv and gate_up."""

    qkv: Matrix
    qkv_bias: jax.Array | None
    query_norm: jax.Array | None
    key_norm: jax.Array | None
    out: Matrix
    out_bias: jax.Array | None
    gate_up: Matrix
    down: Matrix
    attention_norm: jax.Array | None = None
    mlp_norm: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoder:
    """The weights of a Llama for inference and the functions that use them; a pytree, to be passed to jit.

    It is a copy: beside a model in the same dtype it needs the model's memory once more, until the model is dropped
    (nothing here refers to it). Changing the model later changes nothing here.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from models import Decoder, KVCache, Llama, preset
    >>> decoder = Decoder.from_model(Llama(preset("tiny"), rngs=nnx.Rngs(0)))
    >>> cache = KVCache.zeros(decoder.config, batch=1, size=64, dtype=decoder.dtype)
    >>> hidden, cache = decoder.prefill(jnp.asarray([[72, 105, 0, 0]]), jnp.asarray([2]), cache)
    >>> logits, cache = decoder.step(jnp.asarray([33]), cache)
    >>> logits.shape, cache.lengths.tolist()
    ((1, 320), [3])

    Attributes:
      embedding: [V, D].
      output: [V, D], or None where the embedding is the output projection too.
      final_norm: [D].
      layers: LayerWeights, L times.
      config: the architecture.
      implementation: of `flash_attention` in `prefill` and of `decode_attention` in `step`. Both run what is named or
        raise UnsupportedError; names in order of preference let one take what the other has not.
      gemm_implementation: of `flat_gemm`, which every product of a layer goes through, and of `quantized_matmul`.
      unified_max: the constants of an asynchronous softmax for each layer, None in it for an online one, as
        `models.calibrate` measures them; None is online everywhere.
    """

    embedding: jax.Array
    output: jax.Array | None
    final_norm: jax.Array
    layers: tuple[LayerWeights, ...]
    unified_max: tuple[UnifiedMax | None, ...] | None = None
    config: LlamaConfig = dataclasses.field(metadata={"static": True}, kw_only=True)
    implementation: Implementation = dataclasses.field(default="auto", metadata={"static": True})
    gemm_implementation: Implementation = dataclasses.field(default="auto", metadata={"static": True})

    @classmethod
    def from_model(
        cls,
        model: Llama,
        *,
        gemm_implementation: Implementation = "auto",
        calibration: Calibration | None = None,
        fold_norms: bool = True,
    ) -> Decoder:
        """The model's weights in its compute dtype, with its `implementation` of attention.

        Without `fold_norms` the scales of norms stay arrays of their own, as weights that will be quantized need it.

        With a `calibration` (`models.calibrate`), layers whose logits stay together use an asynchronous softmax.
        """
        graphdef, stacked = nnx.split(model.blocks)
        dtype = jnp.dtype(model.dtype)
        # One layer at a time: what is made beside the model and this copy is never more than a layer.
        layers = [_fused(graphdef, stacked, layer, dtype, fold_norms) for layer in range(model.config.num_layers)]
        decoder = cls(
            embedding=_copied(model.embedding.embedding[...], dtype),
            output=None if model.output is None else _copied(model.output.kernel[...].T, dtype),
            final_norm=_copied(model.final_norm.scale[...], dtype),
            layers=tuple(layers),
            config=model.config,
            implementation=model.blocks.attention.implementation,
            gemm_implementation=gemm_implementation,
        )
        return decoder.calibrated(calibration)

    def calibrated(self, calibration: Calibration | None) -> Decoder:
        """This decoder with the asynchronous softmax of a calibration, or the online one for None."""
        layers = range(self.config.num_layers)
        return self.with_unified_max(None if calibration is None else [calibration.unified_max(l) for l in layers])

    def with_unified_max(self, constants: Sequence[UnifiedMax | None] | None) -> Decoder:
        """This decoder with these constants, one for each layer."""
        if constants is not None:
            # One for each head, on the device: a number would be brought there and spread out by every step.
            N = self.config.num_heads
            constants = tuple(one and dataclasses.replace(one, phi=one.per_head(N)) for one in constants)
        return dataclasses.replace(self, unified_max=constants)

    @property
    def dtype(self) -> jnp.dtype:
        """Of weights, activations and cache."""
        return self.embedding.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes that every step reads: all weights, but of an embedding that is not also the output next to none."""
        output = self.embedding if self.output is None else self.output
        read = jax.tree.leaves((output, self.final_norm, self.layers))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in read)  # of shapes, too, which have no nbytes

    def attention_bytes(self, tokens: int) -> int:
        """Bytes of keys and values that one token reads to attend to `tokens` tokens, itself among them."""
        config = self.config
        seen = min(tokens, config.sliding_window or tokens)
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * seen * self.dtype.itemsize

    def prefill(self, tokens: jax.Array, lengths: jax.Array, cache: AnyCache) -> tuple[jax.Array, AnyCache]:
        """Runs right-padded prompts into the rows of an empty cache.

        Args:
          tokens: int32 [B, T].
          lengths: int32 [B], tokens of each prompt; what follows them is padding.
          cache: a row for each prompt; what it held before is forgotten.

        Returns:
          hidden states [B, T, D] after the final norm (of padding: anything), and the cache holding the prompts.
        """
        self._check_rows(tokens, 2, cache)
        B, T = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        places = cache.places(positions, positions < lengths[:, None])
        x, key, value = self._run(_prefill_layer, tokens, positions, cache, places)
        lengths = jnp.asarray(lengths, jnp.int32)
        return x, dataclasses.replace(cache, key=key, value=value, lengths=lengths)

    def step(self, token: jax.Array, cache: AnyCache, *, live: jax.Array | None = None) -> tuple[jax.Array, AnyCache]:
        """One more token of each row.

        Args:
          token: int32 [B].
          cache: what each row has so far. A row that is full does not keep the token.
          live: bool [B]; a row that is not live leaves its cache as it is and gets logits that mean nothing, at no
            cost of attention. None: all are.

        Returns:
          float32 logits [B, V] of the tokens that come next, and the cache with this token.
        """
        self._check_rows(token, 1, cache)
        live = jnp.ones(token.shape, bool) if live is None else live
        positions = cache.lengths
        places = cache.places(positions[:, None], live[:, None])
        attended = jnp.where(live, jnp.minimum(positions + 1, cache.size), 0)
        # The one new token of a row needs no axis of its own: [B, 1] -> [B].
        places = jax.tree.map(lambda index: index[:, 0], places)
        x, key, value = self._run(_step_layer, token, positions, cache, places, attended, cache.page_table)
        lengths = jnp.where(live, positions + 1, positions)
        return self.logits(x), dataclasses.replace(cache, key=key, value=value, lengths=lengths)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        return vocabulary_logits(hidden, self.embedding if self.output is None else self.output)

    def _run(self, layer, tokens, positions, cache: KVCache | PagedCache, places: Places, *more) -> Any:
        """tokens [...] through all layers and the final norm: hidden states [..., D], new keys, new values."""
        config = self.config
        options = Options(config, self.implementation, self.gemm_implementation)
        rope = rope_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        x = self.embedding[tokens]
        keys, values = [], []
        unified_max = self.unified_max or (None,) * len(self.layers)
        for weights, phi, key, value in zip(self.layers, unified_max, cache.key, cache.value, strict=True):
            x, key, value = layer(options, weights, phi, x, rope, key, value, places, *more)
            keys.append(key)
            values.append(value)
        return rms_norm(x, self.final_norm, config.norm_eps), tuple(keys), tuple(values)

    def _check_rows(self, tokens: jax.Array, axes: int, cache: KVCache | PagedCache) -> None:
        if jnp.ndim(tokens) != axes or not jnp.issubdtype(tokens.dtype, jnp.integer):
            expected = "[B, T]" if axes == 2 else "[B]"
            given = f"{tokens.dtype}{list(tokens.shape)}"
            raise ValueError(f"Decoder: tokens must be an integer array {expected}, got {given}")
        if cache.lengths.shape != (len(tokens),):
            raise ValueError(f"Decoder: the cache has {len(cache.lengths)} rows but the tokens have {len(tokens)}")
        if cache.key[0].dtype != self.dtype:
            raise ValueError(
                f"Decoder: the cache holds {cache.key[0].dtype} but the model computes in {self.dtype}: "
                "make the cache with dtype=decoder.dtype"
            )


# --- One layer -----------------------------------------------------------------------------------------------


class Options(NamedTuple):
    """What the functions of a layer are compiled for."""

    config: LlamaConfig
    implementation: Implementation
    gemm_implementation: Implementation


@functools.partial(jax.jit, static_argnames="options")
def _prefill_layer(options: Options, weights: LayerWeights, unified_max, x, rope, key, value, places):
    """x [B, T, D]: the tokens see each other only, so attention reads them and not the cache."""
    query, new_key, new_value = heads(options, weights, x, rope)
    mask = causal_mask(options.config.sliding_window)
    attended = flash_attention(
        query, new_key, new_value, mask=mask, unified_max=unified_max, implementation=options.implementation
    )
    x = _after_attention(options, weights, x, attended)
    return x, write(key, places, new_key), write(value, places, new_value)


@functools.partial(jax.jit, static_argnames="options")
def _step_layer(options: Options, weights: LayerWeights, unified_max, x, rope, key, value, places, lengths, page_table):
    """x [B, D]: the new token of each row is written first and then sees `lengths` tokens, itself among them."""
    query, new_key, new_value = heads(options, weights, x, rope)
    key, value = write(key, places, new_key), write(value, places, new_value)
    attended = decode_attention(
        query,
        key,
        value,
        lengths,
        page_table=page_table,
        window=options.config.sliding_window,
        unified_max=unified_max,
        implementation=options.implementation,
    )
    return _after_attention(options, weights, x, attended), key, value


def heads(options: Options, weights: LayerWeights, x, rope) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotated queries [..., N, H], rotated keys and values [..., K, H] of x [..., D]."""
    config = options.config
    N, K, H, eps = config.num_heads, config.num_kv_heads, config.head_dim, config.norm_eps
    together = product(options, x, weights.qkv, bias=weights.qkv_bias, rms_norm_eps=eps, norm=weights.attention_norm)
    query, key, value = jnp.split(together.reshape(*x.shape[:-1], N + 2 * K, H), (N, N + K), axis=-2)
    if weights.query_norm is not None and weights.key_norm is not None:
        query, key = rms_norm(query, weights.query_norm, eps), rms_norm(key, weights.key_norm, eps)
    return rotate(query, rope), rotate(key, rope), value


def _after_attention(options: Options, weights: LayerWeights, x: jax.Array, attended: jax.Array) -> jax.Array:
    """The rest of the block: output projection and feed-forward, both added to the residual stream x [..., D]."""
    attended = attended.reshape(*x.shape[:-1], -1)
    x = product(options, attended, weights.out, bias=weights.out_bias, residual=x)
    eps = options.config.norm_eps
    h = product(options, x, weights.gate_up, activation="swiglu", rms_norm_eps=eps, norm=weights.mlp_norm)
    return product(options, h, weights.down, residual=x)


def product(
    options: Options,
    x: jax.Array,
    weight: Matrix,
    *,
    rms_norm_eps: float | None = None,
    norm: jax.Array | None = None,
    residual: jax.Array | None = None,
    **epilogue: Any,
) -> jax.Array:
    """x [..., inputs] times a weight, and what is around it in a layer: with `rms_norm_eps` rows of x are normed first,
    and scaled by `norm` [inputs] if it is not part of the weight."""
    implementation = options.gemm_implementation
    quantized = isinstance(weight, MixedBitWeight | IntWeight)
    if rms_norm_eps is not None and (quantized or norm is not None):
        x, rms_norm_eps = _norm(x, jnp.float32(1) if norm is None else norm, rms_norm_eps), None
    if quantized:
        out = quantized_matmul(x, weight, implementation=implementation, **epilogue)
        return out if residual is None else out + residual
    around: dict[str, Any] = {"rms_norm_eps": rms_norm_eps, "residual": residual}
    return flat_gemm(x, weight, transpose_w=True, implementation=implementation, **around, **epilogue)


def _norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """`rms_norm`. For rows XLA's GPU compiler makes it one kernel, a sum in front of it included, but two for a single
    row: so that one gets zeros beside it, which are never stored."""
    if x.size > x.shape[-1]:
        return rms_norm(x, scale, epsilon)
    rows = jnp.where(jnp.arange(2)[:, None] == 0, x.reshape(1, -1), 0)
    # Behind a barrier the first row is cut out by that kernel, and not by those that read it.
    return jax.lax.optimization_barrier(rms_norm(rows, scale, epsilon)[:1]).reshape(x.shape)


# --- Weights -------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype", "fold_norms"))
def _fused(
    graphdef: nnx.GraphDef[Block], stacked: nnx.State, layer: int, dtype: jnp.dtype, fold_norms: bool
) -> LayerWeights:
    """One of the stacked layers as LayerWeights."""
    one = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), stacked)
    block = nnx.merge(graphdef, one)
    attention, mlp = block.attention, block.mlp
    projections = (attention.query, attention.key, attention.value)

    def rows(*linears: nnx.Linear, norm: RMSNorm | None = None) -> jax.Array:
        """[outputs, inputs] of layers of one input, one below the other, with the scale of the norm before them
        if norms are folded."""
        weight = jnp.concatenate([linear.kernel[...].T for linear in linears])
        if norm is None or not fold_norms:
            return weight
        return weight * norm.scale[...].astype(jnp.promote_types(weight.dtype, jnp.float32))

    def biases(*linears: nnx.Linear) -> jax.Array | None:
        return jnp.concatenate([l.bias[...] for l in linears if l.bias is not None]) if linears[0].use_bias else None

    def scale(norm: RMSNorm | None) -> jax.Array | None:
        return None if norm is None else norm.scale[...]

    weights = LayerWeights(
        qkv=rows(*projections, norm=block.attention_norm),
        qkv_bias=biases(*projections),
        query_norm=scale(attention.query_norm),
        key_norm=scale(attention.key_norm),
        out=rows(attention.out),
        out_bias=biases(attention.out),
        gate_up=rows(mlp.gate, mlp.up, norm=block.mlp_norm),
        down=rows(mlp.down),
        attention_norm=None if fold_norms else scale(block.attention_norm),
        mlp_norm=None if fold_norms else scale(block.mlp_norm),
    )
    return jax.tree.map(lambda leaf: leaf.astype(dtype), weights)


def _copied(array: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The array in another dtype, or a copy in the same: training may donate the model's own."""
    return jnp.array(array, dtype, copy=True)
