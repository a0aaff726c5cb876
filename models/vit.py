# SPDX-License-Identifier: Apache-2.0
"""Vision transformers: ViT (Dosovitskiy et al. 2021, arXiv:2010.11929), DeiT (Touvron et al. 2021, arXiv:2012.12877).

    images [B, I, I, C] --cut into P x P--> patches [B, (I / P)^2, P P C] --linear--> tokens; a class token before them
      x = tokens + position
      x = x + attention(norm(x))       bidirectional, `pallas_kernels.flash_attention`
      x = x + mlp(norm(x))             gelu                                                      L times
    logits = head(norm(x)[class token])

Letters: B batch, I image size, P patch size, C channels, T tokens, D model width, N heads, F feed-forward width, L
layers. DeiT has a second token, distilled from a teacher, and may have a head of its own for it; its logits are the
mean of both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from models.arithmetic import FLOATING, Arithmetic, Observing, Pair
from models.checkpoint import SafetensorsFolder, check_tensors
from models.hf_config import CheckpointError
from models.tokenizer import read_json


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A vision transformer's architecture.

    Attributes:
      image_size: I, of square images; a multiple of patch_size.
      patch_size: P.
      channels: C.
      d_model: D, a multiple of num_heads.
      num_layers, num_heads, d_ff: L, N, F.
      num_classes: of the logits.
      norm_eps: added to the variance in LayerNorm.
      distilled: there is a distillation token behind the class token (DeiT).
      distillation_head: and a head of its own for it.
    """

    image_size: int
    patch_size: int
    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    num_classes: int
    channels: int = 3
    norm_eps: float = 1e-12
    distilled: bool = False
    distillation_head: bool = False

    def __post_init__(self):
        for name in (
            "image_size",
            "patch_size",
            "d_model",
            "num_layers",
            "num_heads",
            "d_ff",
            "num_classes",
            "channels",
        ):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"ViTConfig: {name} must be at least 1, got {value}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"ViTConfig: image_size={self.image_size} must be a multiple of patch_size={self.patch_size}; resize "
                "the images or choose another patch"
            )
        if self.d_model % self.num_heads:
            raise ValueError(f"ViTConfig: d_model={self.d_model} must be a multiple of num_heads={self.num_heads}")
        if self.distillation_head and not self.distilled:
            raise ValueError("ViTConfig: distillation_head needs the token of distilled=True")

    @property
    def extra_tokens(self) -> int:
        """Class token, and that of distillation."""
        return 1 + self.distilled

    @property
    def num_tokens(self) -> int:
        """T."""
        return (self.image_size // self.patch_size) ** 2 + self.extra_tokens

    @property
    def num_parameters(self) -> int:
        D, F = self.d_model, self.d_ff
        block = 4 * D * (D + 1) + D * F + F + F * D + D + 4 * D
        patches = self.patch_size**2 * self.channels * D + D
        heads = (1 + self.distillation_head) * (D + 1) * self.num_classes
        return self.num_layers * block + patches + (self.num_tokens + self.extra_tokens) * D + 2 * D + heads


class ViTBlock(nnx.Module):
    """One transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        config: ViTConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        implementation: str | tuple[str, ...],
    ):
        D, F = config.d_model, config.d_ff
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = functools.partial(nnx.Linear, kernel_init=nnx.initializers.truncated_normal(0.02), **types)
        self.attention_norm = nnx.LayerNorm(D, epsilon=config.norm_eps, **types)
        self.query, self.key, self.value, self.out = (linear(D, D) for _ in range(4))
        self.mlp_norm = nnx.LayerNorm(D, epsilon=config.norm_eps, **types)
        self.up, self.down = linear(D, F), linear(F, D)
        self.num_heads = config.num_heads
        self.implementation = implementation

    def __call__(self, x: jax.Array, arithmetic: Arithmetic = FLOATING.ends) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        h = self.attention_norm(x)
        heads = (*h.shape[:2], self.num_heads, -1)
        query, key, value = (
            arithmetic.linear(name, getattr(self, name), h).reshape(heads) for name in ("query", "key", "value")
        )
        attended = arithmetic.attention(query, key, value, self.implementation).reshape(h.shape)
        x = x + arithmetic.linear("out", self.out, attended)
        h = arithmetic.linear("up", self.up, self.mlp_norm(x), "gelu_exact")
        return x + arithmetic.linear("down", self.down, h)


def cut_patches(images: jax.Array, config: Any) -> jax.Array:
    """[B, I / P, I / P, P P C] of images [B, I, I, C], as a configuration says; ValueError if they are others."""
    I, P, C = config.image_size, config.patch_size, config.channels
    if images.ndim != 4 or images.shape[1:] != (I, I, C):
        name = type(config).__name__.removesuffix("Config")
        raise ValueError(f"{name}: images must be [B, {I}, {I}, {C}], got {list(images.shape)}; resize them")
    B, side = len(images), I // P
    return images.reshape(B, side, P, side, P, C).swapaxes(2, 3).reshape(B, side, side, -1)


class ViT(nnx.Module):
    """An image classifier.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models.vit import VIT_PRESETS, ViT
      >>> model = ViT(VIT_PRESETS["vit_tiny_28"], rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 28, 28, 1))).shape
      (2, 10)
    """

    def __init__(
        self,
        config: ViTConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.float32,
        implementation: str | tuple[str, ...] = "auto",
    ):
        """Initializes random parameters; arguments as of `models.llama.Llama`."""
        self.config, self.dtype = config, dtype
        D, patch = config.d_model, config.patch_size**2 * config.channels
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        linear = functools.partial(nnx.Linear, kernel_init=nnx.initializers.truncated_normal(0.02), rngs=rngs, **types)

        def tokens(count: int) -> nnx.Param:
            return nnx.Param(nnx.initializers.truncated_normal(0.02)(rngs.params(), (1, count, D), param_dtype))

        self.patches = linear(patch, D)
        self.class_token = tokens(1)
        self.distillation_token = tokens(1) if config.distilled else None
        self.position = tokens(config.num_tokens)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> ViTBlock:
            return ViTBlock(config, rngs=rngs, implementation=implementation, **types)

        self.blocks = stacked(rngs)
        self.final_norm = nnx.LayerNorm(D, epsilon=config.norm_eps, rngs=rngs, **types)
        self.head = linear(D, config.num_classes)
        self.distillation_head = linear(D, config.num_classes) if config.distillation_head else None

    def embed(self, images: jax.Array, arithmetic: Arithmetic = FLOATING.ends) -> jax.Array:
        """[B, I, I, C], normalized as the model wants them -> [B, T, D]."""
        B = len(images)
        cut = cut_patches(images, self.config).reshape(B, self.config.num_tokens - self.config.extra_tokens, -1)
        extra = [token[...] for token in (self.class_token, self.distillation_token) if token is not None]
        extra = [jnp.broadcast_to(token, (B, *token.shape[1:])).astype(self.dtype) for token in extra]
        x = jnp.concatenate([*extra, arithmetic.linear("patches", self.patches, cut.astype(self.dtype))], axis=1)
        return x + self.position[...].astype(self.dtype)

    def features(self, images: jax.Array, arithmetic: Pair = FLOATING) -> tuple[jax.Array, jax.Array]:
        """The final norm's output [B, T, D], and the outputs of all blocks [L, B, T, D]."""
        graphdef, stacked = nnx.split(self.blocks)
        x, of_blocks = _run_blocks(graphdef, stacked, arithmetic.blocks, self.embed(images, arithmetic.ends))
        return self.final_norm(x), of_blocks

    def __call__(self, images: jax.Array, arithmetic: Pair = FLOATING) -> jax.Array:
        """float32 logits [B, classes] of images [B, I, I, C]."""
        return self.logits(self.features(images, arithmetic)[0], arithmetic.ends)

    def logits(self, hidden: jax.Array, arithmetic: Arithmetic = FLOATING.ends) -> jax.Array:
        """float32 [B, classes] of the final norm's output [B, T, D]."""
        logits = arithmetic.linear("head", self.head, hidden[:, 0])
        if self.distillation_head is not None:
            logits = (logits + self.distillation_head(hidden[:, 1])) / 2
        return logits.astype(jnp.float32)

    def observed(
        self, images: jax.Array, arithmetic: Pair = FLOATING
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """What products read (models/arithmetic.py), of blocks [L, ...] and of the ends."""
        graphdef, stacked = nnx.split(self.blocks)
        ends = Observing({}, arithmetic.ends)

        def run_block(x: jax.Array, of_layer: tuple[nnx.State, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
            parameters, own = of_layer
            observing = Observing({}, own)
            return nnx.merge(graphdef, parameters)(x, observing), observing.seen

        x, of_blocks = jax.lax.scan(run_block, self.embed(images, ends), (stacked, arithmetic.blocks))
        self.logits(self.final_norm(x), ends)
        return of_blocks, ends.seen


@functools.partial(jax.jit, static_argnames="graphdef")
def _run_blocks(
    graphdef: nnx.GraphDef[ViTBlock], stacked: nnx.State, arithmetic: Any, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def run_block(x: jax.Array, of_layer: tuple[nnx.State, Arithmetic]) -> tuple[jax.Array, jax.Array]:
        parameters, arithmetic = of_layer
        x = nnx.merge(graphdef, parameters)(x, arithmetic)
        return x, x

    return jax.lax.scan(run_block, x, (stacked, arithmetic))


# --- Presets --------------------------------------------------------------------------------------------------

VIT_PRESETS: dict[str, ViTConfig] = {
    # For 28 x 28 gray images, such as MNIST: 0.8 million parameters.
    "vit_tiny_28": ViTConfig(28, 4, 128, 4, 4, 512, 10, channels=1),
    # The same with wide matrices, for compression: 4.8 million.
    "vit_small_28": ViTConfig(28, 4, 256, 6, 8, 1024, 10, channels=1),
    "vit_b16_224": ViTConfig(224, 16, 768, 12, 12, 3072, 1000),
    "deit_ti16_224": ViTConfig(224, 16, 192, 12, 3, 768, 1000, distilled=True, distillation_head=True),
    "deit_s16_224": ViTConfig(224, 16, 384, 12, 6, 1536, 1000, distilled=True, distillation_head=True),
}


# --- Hugging Face ---------------------------------------------------------------------------------------------

_MODEL_NAMES = {
    "class_token": "embeddings.cls_token",
    "distillation_token": "embeddings.distillation_token",
    "position": "embeddings.position_embeddings",
    "patches.kernel": "embeddings.patch_embeddings.projection.weight",
    "patches.bias": "embeddings.patch_embeddings.projection.bias",
    "final_norm.scale": "layernorm.weight",
    "final_norm.bias": "layernorm.bias",
}
_BLOCK_NAMES = {
    "attention_norm": "layernorm_before",
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "out": "attention.output.dense",
    "mlp_norm": "layernorm_after",
    "up": "intermediate.dense",
    "down": "output.dense",
}
# model_type -> names of the heads, with and without one for distillation.
_HEADS: dict[str, Callable[[bool], dict[str, str]]] = {
    "vit": lambda both: {"head": "classifier"},
    "deit": lambda both: {
        "head": "cls_classifier" if both else "classifier",
        "distillation_head": "distillation_classifier",
    },
}


def vit_config_from_hf(values: dict[str, Any], source: str) -> ViTConfig:
    """The configuration of a Hugging Face config.json of a ViT or DeiT classifier.

    Raises:
      CheckpointError: another model, or a setting that is not supported; names `source`, the key and the value.
    """
    kind = values.get("model_type")
    if kind not in _HEADS:
        raise CheckpointError(f"{source}: model_type is {kind!r}; supported: {', '.join(_HEADS)}")
    wanted = {"hidden_act": "gelu", "qkv_bias": True}
    for key, supported in wanted.items():
        if (value := values.get(key, supported)) != supported:
            raise CheckpointError(f"{source}: {key} is {value!r}, and only {supported!r} is supported")
    labels = values.get("id2label")
    num_classes = len(labels) if labels else values.get("num_labels", 2)
    try:
        return ViTConfig(
            image_size=values["image_size"],
            patch_size=values["patch_size"],
            channels=values.get("num_channels", 3),
            d_model=values["hidden_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=values["num_attention_heads"],
            d_ff=values["intermediate_size"],
            num_classes=num_classes,
            norm_eps=values.get("layer_norm_eps", 1e-12),
            distilled=kind == "deit",
            distillation_head=any("WithTeacher" in name for name in values.get("architectures") or ()),
        )
    except KeyError as error:
        raise CheckpointError(f"{source}: has no {error}") from error


def load_vit(
    folder: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    implementation: str | tuple[str, ...] = "auto",
) -> ViT:
    """A ViT or DeiT classifier from a Hugging Face folder, config.json and safetensors; arguments as of `load_model`.

    Raises:
      CheckpointError: something is missing, truncated, unexpected, of a wrong shape or unsupported. The message names
        the file, the tensor or key, and the fix.
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    config = vit_config_from_hf(values, str(folder / "config.json"))
    source = SafetensorsFolder(folder)
    types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype or dtype, "implementation": implementation}
    graphdef, state = nnx.split(nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0), **types)))
    variables = dict(nnx.to_flat_state(state))
    stored = {path: _Stored.of(path, values["model_type"], config) for path in variables}
    shapes = {}
    for path, variable in variables.items():
        shape = variable.shape[path[0] == "blocks" :]
        shapes |= dict.fromkeys(stored[path].names, stored[path].shape(shape, config))
    check_tensors(source, shapes)
    for path, variable in variables.items():
        arrays = [stored[path].turned(source.read(name)) for name in stored[path].names]
        array = np.stack(arrays) if path[0] == "blocks" else arrays[0]
        variables[path] = variable.replace(jnp.asarray(array, variable.dtype))
    return nnx.merge(graphdef, nnx.from_flat_state(variables.items()))


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Where a parameter lies in a file: one tensor, or one of each layer; and how."""

    names: list[str]
    kind: str  # "linear", "patches" or "plain"

    @classmethod
    def of(cls, path: tuple[Any, ...], model_type: str, config: ViTConfig) -> _Stored:
        name = ".".join(map(str, path))
        kind = "plain" if path[-1] != "kernel" else "patches" if path[0] == "patches" else "linear"
        last = {"kernel": "weight", "scale": "weight"}.get(path[-1], path[-1])
        if path[0] == "blocks":
            layers = (f"{model_type}.encoder.layer.{layer}." for layer in range(config.num_layers))
            return cls([f"{layer}{_BLOCK_NAMES[path[1]]}.{last}" for layer in layers], kind)
        if name in _MODEL_NAMES:
            return cls([f"{model_type}.{_MODEL_NAMES[name]}"], kind)
        return cls([f"{_HEADS[model_type](config.distillation_head)[path[0]]}.{last}"], kind)

    def shape(self, shape: tuple[int, ...], config: ViTConfig) -> tuple[int, ...]:
        """That of the tensor, of a parameter's."""
        if self.kind == "patches":  # a convolution's [D, C, P, P]
            return config.d_model, config.channels, config.patch_size, config.patch_size
        return shape[::-1] if self.kind == "linear" else shape

    def turned(self, tensor: np.ndarray) -> np.ndarray:
        if self.kind == "patches":
            return tensor.transpose(2, 3, 1, 0).reshape(-1, len(tensor))
        return tensor.T if self.kind == "linear" else tensor
