# SPDX-License-Identifier: Apache-2.0
"""The Llama family in Flax NNX: Llama 2/3, Mistral, Qwen2, Qwen3, SmolLM2 and anything else of that shape.

A model is a LlamaConfig plus parameters. The blocks are stacked (every block parameter has a leading layer
axis L) and run by one `jax.lax.scan`, so compile time does not grow with depth. This is for training and for
scoring text; to generate, decoder.py makes a `Decoder` of a model. Letters as in layers.py, V vocabulary size.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.layers import Attend, Block, BlockConfig, RMSNorm, RopeScaling, causal_mask, rope_tables, vocabulary_logits
from pallas_kernels import masks


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(BlockConfig):
    """Everything that determines what a model computes, parameters aside (see BlockConfig for the block).

    Attributes:
      vocab_size: V, rows of the embedding; the tokenizer may have fewer tokens, never more.
      max_positions: the longest sequence the model is meant for, in tokens; informative, never enforced here.
      rope_theta: base of the rotary wavelengths.
      rope_scaling: context extension, or None.
      tie_embeddings: the output projection is the embedding's transpose.
    """

    vocab_size: int
    max_positions: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False

    def __post_init__(self):
        sizes = (
            "vocab_size",
            "d_model",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "d_ff",
            "max_positions",
        )
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"LlamaConfig: {name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            heads = f"{self.num_heads} and {self.num_kv_heads}"
            raise ValueError(f"LlamaConfig: num_heads must be a multiple of num_kv_heads, got {heads}")
        if self.head_dim % 2:
            raise ValueError(f"LlamaConfig: head_dim must be even for rotary embedding, got {self.head_dim}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"LlamaConfig: sliding_window must be None or >= 1, got {self.sliding_window}")
        if self.rope_theta <= 0 or self.norm_eps <= 0:
            values = f"{self.rope_theta} and {self.norm_eps}"
            raise ValueError(f"LlamaConfig: rope_theta and norm_eps must be positive, got {values}")

    @property
    def num_parameters(self) -> int:
        """Number of parameters; a tied embedding counts once."""
        D, N, K, H = self.d_model, self.num_heads, self.num_kv_heads, self.head_dim
        biases = (N + 2 * K) * H * self.attention_bias + D * self.attention_output_bias
        norms = 2 * D + 2 * H * self.qk_norm
        embeddings = self.vocab_size * D * (1 if self.tie_embeddings else 2)
        return self.num_layers * (self._block_weights + biases + norms) + embeddings + D

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of one forward pass per token, averaged over `seq_len` tokens.

        Two per multiply-add, counting matrix products only:

            2 (L (2 D N H + 2 D K H + 3 D F) + D V) + 4 L N H visible

        where visible is the mean number of keys that a query sees: (seq_len + 1) / 2 when causal, fewer with
        a sliding window. Half of attention's square is therefore not counted, since it need not be computed.
        A training step takes three times this (one forward, two in the backward pass); rematerialized work
        does not count.
        """
        window = min(self.sliding_window or seq_len, seq_len)
        visible = (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
        weights = self.num_layers * self._block_weights + self.d_model * self.vocab_size
        return 2 * weights + 4 * self.num_layers * self.num_heads * self.head_dim * visible

    @property
    def _block_weights(self) -> int:
        """Matrix entries of one block: 2 D N H + 2 D K H + 3 D F."""
        return self.d_model * (2 * (self.num_heads + self.num_kv_heads) * self.head_dim + 3 * self.d_ff)


# What the forward pass keeps for the backward pass, from least memory to most. remat=None keeps everything.
_attention = jax.checkpoint_policies.save_only_these_names("attention_inputs", "flash_attention")
_dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
REMAT_POLICIES = {
    # Only the residual stream between blocks; a block's forward pass runs again.
    "full": jax.checkpoint_policies.nothing_saveable,
    # Also attention's query, key, value and output: the feed-forward half runs again, attention's projections
    # do not.
    "attention": _attention,
    # The results of all projections; attention itself and elementwise work run again.
    "dots": _dots,
    # Both: only elementwise work runs again.
    "dots_and_attention": jax.checkpoint_policies.save_from_both_policies(_dots, _attention),
}


class Llama(nnx.Module):
    """A causal language model of the Llama family.

    Example:
      >>> model = Llama(preset("tiny"), rngs=nnx.Rngs(0))
      >>> logits = model(jnp.zeros((1, 16), jnp.int32))  # float32 [1, 16, V]
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.float32,
        remat: str | None = None,
        implementation: str | tuple[str, ...] = "auto",
    ):
        """Initializes random parameters.

        Args:
          config: the architecture.
          rngs: source of randomness for the parameters.
          dtype: of activations; parameters are cast to it where they are used.
          param_dtype: of stored parameters.
          remat: None, or a name in REMAT_POLICIES: what the forward pass keeps for the backward pass.
          implementation: of attention, as in `pallas_kernels.flash_attention`.
        """
        if remat is not None and remat not in REMAT_POLICIES:
            raise ValueError(f"Llama: unknown remat policy {remat!r}; known: None, {', '.join(REMAT_POLICIES)}")
        self.config = config
        self.dtype = dtype
        self.remat = remat
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.d_model,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
            **types,
        )

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs, implementation=implementation, **types)

        self.blocks = stacked(rngs)
        self.final_norm = RMSNorm(config.d_model, epsilon=config.norm_eps, rngs=rngs, **types)
        if config.tie_embeddings:
            self.output = None
        else:
            self.output = nnx.Linear(config.d_model, config.vocab_size, use_bias=False, rngs=rngs, **types)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32 tokens [B, T] -> [B, T, D]."""
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"Llama: tokens must be an integer array [B, T], got {tokens.dtype}{list(tokens.shape)}")
        return self.embedding(tokens)

    def hidden(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        attend: Attend | None = None,
    ) -> jax.Array:
        """Runs the blocks and the final norm.

        Args:
          x: embedded tokens [B, T, D].
          positions: int32 [B, T] or [T], for the rotary embedding only; None means 0, 1, ... Packed rows restart
            them in each document.
          segment_ids: int32 [B, T]: the document of each token; attention stays within equal ids.
          attend: attention in the place of causal attention within documents; it knows who sees whom.

        Returns:
          [B, T, D].

        Raises:
          ValueError: `attend` with a sliding window, of which it knows nothing.
        """
        B, T, _ = x.shape
        positions = jnp.arange(T, dtype=jnp.int32) if positions is None else positions
        positions = jnp.broadcast_to(positions, (B, T))
        rope = rope_tables(positions, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        # By index in the row, not by position: positions of packed documents restart, indices do not.
        if attend is not None and self.config.sliding_window is not None:
            raise ValueError(f"Llama: attend= has no sliding_window={self.config.sliding_window}; set it to None")
        mask = causal_mask(self.config.sliding_window)
        if segment_ids is not None:
            mask = mask & masks.Segments(segment_ids, segment_ids)
        mask = mask if attend is None else attend
        graphdef, stacked = nnx.split(self.blocks)
        return self.final_norm(_run_blocks(graphdef, stacked, x.astype(self.dtype), rope, mask, remat=self.remat))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]; inputs in the model's dtype, accumulation and result in float32."""
        table = self.embedding.embedding[...] if self.output is None else self.output.kernel[...].T
        return vocabulary_logits(hidden.astype(self.dtype), table)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """int32 tokens [B, T] -> float32 logits [B, T, V]."""
        return self.logits(self.hidden(self.embed(tokens), positions=positions, segment_ids=segment_ids))


@functools.partial(jax.jit, static_argnames=("graphdef", "remat"))
def _run_blocks(
    graphdef: nnx.GraphDef[Block],
    stacked: nnx.State,
    x: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    mask: masks.Mask | Attend,
    *,
    remat: str | None,
) -> jax.Array:
    """Scans x [B, T, D] over the stacked blocks. Jitted so that calling a model outside of jit compiles only once."""

    def run_block(x, parameters):
        return nnx.merge(graphdef, parameters)(x, rope, mask), None

    if remat is not None:
        # prevent_cse would only slow a scan down: its body is not merged with anything.
        run_block = jax.checkpoint(run_block, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(run_block, x, stacked)[0]
