# SPDX-License-Identifier: Apache-2.0
"""Layers of the Llama family: rotary embedding, grouped-query attention, SwiGLU, block; and their mathematics as
functions, which decoder.py uses too.

Letters: B batch, T query length, S cache size, L layers, D model width, N query heads, K key/value heads,
H head dim, F feed-forward width. Layers compute in `dtype` and keep parameters in `param_dtype`; they know
nothing about devices or meshes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from pallas_kernels import flash_attention, masks

# --- Configuration ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """What one block needs to know; LlamaConfig extends it with what concerns the whole model.

    Attributes:
      d_model: model width D.
      num_heads, num_kv_heads: N and K; N is a multiple of K (grouped-query attention).
      head_dim: H, even; N * H need not equal D.
      d_ff: feed-forward width F.
      norm_eps: added to the mean square in RMSNorm.
      attention_bias: query, key and value projections have a bias (Qwen2).
      attention_output_bias: the output projection has a bias.
      qk_norm: RMSNorm over H of each query and key head before the rotation (Qwen3).
      sliding_window: a token sees itself and sliding_window - 1 tokens before (Mistral); None sees all.
      num_layers: L; the residual branches are initialized smaller by sqrt(2 L).
    """

    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float = 1e-5
    attention_bias: bool = False
    attention_output_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None


# --- Rotary position embedding ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched to reach beyond the length that a model was pretrained on.

    Attributes:
      kind: "linear" divides every frequency by `factor` (position interpolation, Chen et al. 2023,
        arXiv:2306.15595); "llama3" divides only the wavelengths longer than the original context, with a
        smooth transition (Llama 3.1); "yarn" blends by rotations per context and rescales the rotated vectors
        (Peng et al. 2023, arXiv:2309.00071).
      factor: how many times longer the context becomes, >= 1.
      original_max_positions: the pretraining context length in tokens; needed by "llama3" and "yarn".
      low_frequency_factor, high_frequency_factor: "llama3": wavelengths above original_max_positions / low
        are divided by `factor`, those below original_max_positions / high are kept.
      beta_fast, beta_slow: "yarn": dimensions turning more than beta_fast times in the original context are
        kept, those turning less than beta_slow times are divided by `factor`.
      attention_factor: "yarn": what cosine and sine are multiplied by; None means 0.1 ln(factor) + 1.
      truncate: "yarn": round the two borders of the blend to whole dimensions.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_positions: int | None = None
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.kind not in ("linear", "llama3", "yarn"):
            raise ValueError(f'RopeScaling: kind must be "linear", "llama3" or "yarn", got {self.kind!r}')
        if self.factor < 1:
            raise ValueError(f"RopeScaling: factor must be >= 1, got {self.factor}")
        if self.kind != "linear" and not self.original_max_positions:
            raise ValueError(
                f"RopeScaling: kind {self.kind!r} needs original_max_positions (pretraining context length)"
            )
        if self.kind == "llama3" and self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError(
                "RopeScaling: high_frequency_factor must be above low_frequency_factor, "
                f"got {self.high_frequency_factor} and {self.low_frequency_factor}"
            )


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[np.ndarray, float]:
    """Angular frequencies, radians per position.

    Returns:
      float32 [H/2], and the factor that cosine and sine are multiplied by (1 except for "yarn").
    """
    frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequency.astype(np.float32), 1.0
    interpolated = frequency / scaling.factor
    if scaling.kind == "linear":
        return interpolated.astype(np.float32), 1.0

    context = scaling.original_max_positions
    assert context is not None  # RopeScaling validated it
    if scaling.kind == "llama3":
        turns = context * frequency / (2 * math.pi)  # turns within the original context
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return (keep * frequency + (1 - keep) * interpolated).astype(np.float32), 1.0

    def dimension(turns: float) -> float:
        """The (fractional) dimension that turns this often in the original context; YaRN, section 3.2."""
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    keep = 1 - np.clip((np.arange(head_dim // 2) - first) / max(last - first, 1e-3), 0, 1)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1
    return (keep * frequency + (1 - keep) * interpolated).astype(np.float32), factor


def rope_tables(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 [..., 1, H/2], of int32 positions [...]; shared by all layers."""
    frequency, factor = rope_frequencies(head_dim, theta, scaling)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates x [..., heads, H]; dimension i pairs with i + H/2 (the Hugging Face convention)."""
    cos, sin = (table[..., None, :] for table in rope)
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    # XLA fuses a reversal with what comes next, but not a concatenation of halves.
    sign = jnp.asarray([-1, 1], jnp.float32)[:, None]
    return (halves * cos + jnp.flip(halves, -2) * (sign * sin)).reshape(x.shape).astype(x.dtype)


# --- Norm, mask, logits -------------------------------------------------------------------------------------


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """scale * x / sqrt(mean(x^2) + epsilon) over the last axis, computed in float32 (Zhang, Sennrich 2019,
    arXiv:1910.07467)."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    # In this order XLA's GPU compiler knows a normalization, and makes one kernel of all rows.
    return (wide * jax.lax.rsqrt(mean_square + epsilon) * scale).astype(x.dtype)


class Attend(Protocol):
    """Attention in the place of a mask's: of keys that other devices have, say (parallel/context.py). A pytree."""

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, *, implementation: Any) -> jax.Array: ...


def causal_mask(sliding_window: int | None) -> masks.Mask:
    """A token sees itself and what is before it, `sliding_window` tokens in all if that is not None."""
    return masks.Causal() if sliding_window is None else masks.Window(sliding_window - 1, 0)


def vocabulary_logits(hidden: jax.Array, table: jax.Array) -> jax.Array:
    """[..., D] and the output projection's rows [V, D] -> [..., V]; accumulated and returned in float32."""
    table = table.astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


# --- Layers -------------------------------------------------------------------------------------------------


class RMSNorm(nnx.RMSNorm):
    """`rms_norm` with a learned scale; x is cast to `dtype` first."""

    scale: nnx.Param

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x.astype(self.dtype), self.scale[...].astype(self.dtype), self.epsilon)


class Attention(nnx.Module):
    """Grouped-query attention with rotary embedding, through `pallas_kernels.flash_attention`."""

    def __init__(
        self,
        config: BlockConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        implementation: str | tuple[str, ...],
    ):
        D, N, K, H = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = nnx.Linear(D, N * H, use_bias=config.attention_bias, **types)
        self.key = nnx.Linear(D, K * H, use_bias=config.attention_bias, **types)
        self.value = nnx.Linear(D, K * H, use_bias=config.attention_bias, **types)
        self.out = nnx.Linear(
            N * H,
            D,
            use_bias=config.attention_output_bias,
            kernel_init=residual_init(config.num_layers),
            **types,
        )
        if config.qk_norm:
            self.query_norm = RMSNorm(H, epsilon=config.norm_eps, **types)
            self.key_norm = RMSNorm(H, epsilon=config.norm_eps, **types)
        else:
            self.query_norm = self.key_norm = None
        self.head_dim = H
        self.implementation = implementation

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        mask: masks.Mask | Attend,
    ) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        B, T, _ = x.shape
        query, key, value = self.inputs(x, rope)
        query, key, value = checkpoint_name((query, key, value), "attention_inputs")
        if isinstance(mask, masks.Mask):
            out = flash_attention(query, key, value, mask=mask, implementation=self.implementation)
        else:
            out = mask(query, key, value, implementation=self.implementation)
        return self.out(out.reshape(B, T, -1))

    def inputs(self, x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query [B, T, N, H], key and value [B, T, K, H] of x [B, T, D]; query and key rotated."""
        query, key, value = (
            projection(x).reshape(*x.shape[:2], -1, self.head_dim) for projection in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return rotate(query, rope), rotate(key, rope), value


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        D, F = config.d_model, config.d_ff
        types: dict[str, Any] = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.gate = nnx.Linear(D, F, **types)
        self.up = nnx.Linear(D, F, **types)
        self.down = nnx.Linear(F, D, kernel_init=residual_init(config.num_layers), **types)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        config: BlockConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        implementation: str | tuple[str, ...],
    ):
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attention_norm = RMSNorm(config.d_model, epsilon=config.norm_eps, **types)
        self.attention = Attention(config, implementation=implementation, **types)
        self.mlp_norm = RMSNorm(config.d_model, epsilon=config.norm_eps, **types)
        self.mlp = Mlp(config, **types)

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        mask: masks.Mask | Attend,
    ) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), rope, mask)
        return x + self.mlp(self.mlp_norm(x))


def residual_init(num_layers: int) -> jax.nn.initializers.Initializer:
    """Initializer of projections that write to the residual stream: variance 1 / (fan_in * 2L), so that the
    stream's variance does not grow with depth (the GPT-2 rule)."""
    return jax.nn.initializers.variance_scaling(1 / (2 * num_layers), "fan_in", "truncated_normal")
