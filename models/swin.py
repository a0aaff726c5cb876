# SPDX-License-Identifier: Apache-2.0
"""Swin (Liu et al. 2021, arXiv:2103.14030): a vision transformer whose attention stays within windows, in stages.

    images [B, I, I, C] --cut into P x P--> [B, S, S, D], S = I / P, normalized
    in each stage                            of blocks, every second with its windows shifted by half of one
      x = x + attention(norm(x))             of W x W windows, with a bias for each pair of places in them
      x = x + mlp(norm(x))                   gelu
      [B, S, S, D] -> [B, S/2, S/2, 2 D]     2 x 2 tokens become one, behind every stage but the last
    logits = head(mean of tokens of norm(x))

Windows are examples of a batch for `pallas_kernels.flash_attention`. A shifted window on the image's edge holds parts
that do not belong together: they are segments. Letters: B batch, I image size, P patch size, C channels, S tokens of a
side, D width, N heads, W window.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from models.arithmetic import FLOATING, Arithmetic, Pair
from models.checkpoint import SafetensorsFolder, check_tensors
from models.hf_config import CheckpointError
from models.tokenizer import read_json
from models.vit import cut_patches
from pallas_kernels import masks


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """A Swin transformer's architecture.

    Attributes:
      image_size: I, of square images; a multiple of patch_size and of 2 for each stage after the first.
      patch_size: P.
      d_model: D of the first stage; each has twice that of the one before.
      depths: blocks of each stage.
      num_heads: of each stage.
      window: W, tokens of a window's side; no more are taken than a stage has.
      num_classes: of the logits.
      channels: C.
      mlp_ratio: width of an mlp over D.
      norm_eps: added to the variance in LayerNorm.
    """

    image_size: int
    patch_size: int
    d_model: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window: int
    num_classes: int
    channels: int = 3
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        for name in ("image_size", "patch_size", "d_model", "window", "num_classes", "channels"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"SwinConfig: {name} must be at least 1, got {value}")
        if not self.depths or len(self.depths) != len(self.num_heads):
            got = f"got {self.depths} and {self.num_heads}"
            raise ValueError(f"SwinConfig: depths and num_heads must have an entry for each stage, {got}")
        multiple = self.patch_size * 2 ** (len(self.depths) - 1)
        if self.image_size % multiple:
            raise ValueError(
                f"SwinConfig: image_size={self.image_size} must be a multiple of {multiple}, of patches that "
                f"{len(self.depths)} stages halve; resize the images"
            )
        for stage, heads in enumerate(self.num_heads):
            if self.width(stage) % heads:
                raise ValueError(f"SwinConfig: stage {stage} is {self.width(stage)} wide, no multiple of {heads} heads")

    def width(self, stage: int) -> int:
        """D of a stage."""
        return self.d_model * 2**stage

    def side(self, stage: int) -> int:
        """S of a stage."""
        return self.image_size // self.patch_size // 2**stage

    def windows(self, stage: int, block: int) -> tuple[int, int]:
        """(tokens of a window's side, by how many it is shifted)."""
        if (side := self.side(stage)) <= self.window:
            return side, 0
        return self.window, self.window // 2 if block % 2 else 0


class SwinBlock(nnx.Module):
    """x + attention(norm(x)) within windows, then x + mlp(norm(x)).

    Attributes:
      bias_table: [(2 W - 1)^2, N], of how far down and how far right a key is of a query.
    """

    def __init__(
        self,
        config: SwinConfig,
        stage: int,
        block: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        implementation: str | tuple[str, ...],
    ):
        D, self.num_heads = config.width(stage), config.num_heads[stage]
        F = int(config.mlp_ratio * D)
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = functools.partial(nnx.Linear, kernel_init=nnx.initializers.truncated_normal(0.02), **types)
        self.window, self.shift = config.windows(stage, block)
        self.attention_norm = nnx.LayerNorm(D, epsilon=config.norm_eps, **types)
        self.query, self.key, self.value, self.out = (linear(D, D) for _ in range(4))
        places = (2 * self.window - 1) ** 2
        start = nnx.initializers.truncated_normal(0.02)(rngs.params(), (places, self.num_heads), param_dtype)
        self.bias_table = nnx.Param(start)
        self.mlp_norm = nnx.LayerNorm(D, epsilon=config.norm_eps, **types)
        self.up, self.down = linear(D, F), linear(F, D)
        self.implementation = implementation

    def __call__(self, x: jax.Array, arithmetic: Arithmetic = FLOATING.blocks) -> jax.Array:
        """[B, S, S, D] -> [B, S, S, D]."""
        x = x + self._attended(self.attention_norm(x), arithmetic)
        h = arithmetic.linear("up", self.up, self.mlp_norm(x), "gelu_exact")
        return x + arithmetic.linear("down", self.down, h)

    def _attended(self, h: jax.Array, arithmetic: Arithmetic) -> jax.Array:
        B, S, _, D = h.shape
        W, more = self.window, -S % self.window
        # What is added on the right and below takes part, as zeros.
        h = jnp.pad(h, ((0, 0), (0, more), (0, more), (0, 0)))
        h = jnp.roll(h, (-self.shift, -self.shift), (1, 2))
        count = (S + more) // W
        windows = h.reshape(B, count, W, count, W, D).swapaxes(2, 3).reshape(B * count**2, W * W, D)
        heads = (*windows.shape[:2], self.num_heads, -1)
        query, key, value = (
            arithmetic.linear(name, getattr(self, name), windows).reshape(heads) for name in ("query", "key", "value")
        )
        mask = None
        if self.shift:
            segments = jnp.asarray(np.tile(_segments(S + more, W, self.shift), (B, 1)))
            mask = masks.Segments(segments, segments)
        bias = self.bias_table[...].astype(jnp.float32)[_relative_places(W)].transpose(2, 0, 1)
        out = arithmetic.attention(query, key, value, self.implementation, bias=bias, mask=mask)
        out = arithmetic.linear("out", self.out, out.reshape(windows.shape))
        out = out.reshape(B, count, count, W, W, D).swapaxes(2, 3).reshape(B, S + more, S + more, D)
        return jnp.roll(out, (self.shift, self.shift), (1, 2))[:, :S, :S]


def _relative_places(W: int) -> np.ndarray:
    """[W W, W W], the row of the table for each query and key."""
    down, right = (x.reshape(-1) for x in np.meshgrid(np.arange(W), np.arange(W), indexing="ij"))
    apart = (down[:, None] - down + W - 1), (right[:, None] - right + W - 1)
    return apart[0] * (2 * W - 1) + apart[1]


def _segments(S: int, W: int, shift: int) -> np.ndarray:
    """int32 [windows, W W]: tokens of a shifted window that were neighbors before the shift have the same number."""
    part = np.digitize(np.arange(S), [S - W, S - shift])
    number = (3 * part[:, None] + part).astype(np.int32)
    return number.reshape(S // W, W, S // W, W).swapaxes(1, 2).reshape(-1, W * W)


class Merge(nnx.Module):
    """[B, S, S, D] -> [B, S / 2, S / 2, 2 D], of 2 x 2 tokens one after the other, down first."""

    def __init__(self, D: int, *, rngs: nnx.Rngs, norm_eps: float, dtype: DTypeLike, param_dtype: DTypeLike):
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norm = nnx.LayerNorm(4 * D, epsilon=norm_eps, **types)
        self.reduction = nnx.Linear(4 * D, 2 * D, use_bias=False, **types)

    def __call__(self, x: jax.Array) -> jax.Array:
        B, S, _, D = x.shape
        x = x.reshape(B, S // 2, 2, S // 2, 2, D).transpose(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.reshape(B, S // 2, S // 2, 4 * D)))


class Swin(nnx.Module):
    """An image classifier.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models.swin import SWIN_PRESETS, Swin
      >>> model = Swin(SWIN_PRESETS["swin_tiny_28"], rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 28, 28, 1))).shape
      (2, 10)
    """

    def __init__(
        self,
        config: SwinConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.float32,
        implementation: str | tuple[str, ...] = "auto",
    ):
        """Initializes random parameters; arguments as of `models.vit.ViT`."""
        self.config, self.dtype = config, dtype
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        stages = range(len(config.depths))
        self.patches = nnx.Linear(config.patch_size**2 * config.channels, config.d_model, **types)
        self.patch_norm = nnx.LayerNorm(config.d_model, epsilon=config.norm_eps, **types)
        self.stages = nnx.List(
            nnx.List(
                SwinBlock(config, stage, block, implementation=implementation, **types)
                for block in range(config.depths[stage])
            )
            for stage in stages
        )
        self.merges = nnx.List(Merge(config.width(stage), norm_eps=config.norm_eps, **types) for stage in stages[:-1])
        last = config.width(stages[-1])
        self.final_norm = nnx.LayerNorm(last, epsilon=config.norm_eps, **types)
        self.head = nnx.Linear(last, config.num_classes, **types)

    def embed(self, images: jax.Array, arithmetic: Arithmetic = FLOATING.ends) -> jax.Array:
        """[B, I, I, C], normalized as the model wants them -> [B, S, S, D]."""
        cut = cut_patches(images, self.config)
        return self.patch_norm(arithmetic.linear("patches", self.patches, cut.astype(self.dtype)))

    def features(self, images: jax.Array, arithmetic: Pair = FLOATING) -> tuple[jax.Array, list[jax.Array]]:
        """The final norm's output [B, S, S, D], and the outputs of all stages, before their tokens are merged."""
        x, of_stages = self.embed(images, arithmetic.ends), []
        for stage, blocks in enumerate(self.stages):
            for block in blocks:
                x = block(x, arithmetic.blocks)
            of_stages.append(x)
            if stage < len(self.merges):
                x = self.merges[stage](x)
        return self.final_norm(x), of_stages

    def __call__(self, images: jax.Array, arithmetic: Pair = FLOATING) -> jax.Array:
        """float32 logits [B, classes] of images [B, I, I, C]."""
        return self.logits(self.features(images, arithmetic)[0], arithmetic.ends)

    def logits(self, hidden: jax.Array, arithmetic: Arithmetic = FLOATING.ends) -> jax.Array:
        """float32 [B, classes] of the final norm's output [B, S, S, D]."""
        return arithmetic.linear("head", self.head, hidden.mean((1, 2))).astype(jnp.float32)


SWIN_PRESETS: dict[str, SwinConfig] = {
    # For 28 x 28 gray images, such as MNIST: windows of 4 x 4 of 14 x 14 tokens, then of 7 x 7.
    "swin_tiny_28": SwinConfig(28, 2, 64, (2, 2), (2, 4), 4, 10, channels=1),
    "swin_t_224": SwinConfig(224, 4, 96, (2, 2, 6, 2), (3, 6, 12, 24), 7, 1000),
    "swin_s_224": SwinConfig(224, 4, 96, (2, 2, 18, 2), (3, 6, 12, 24), 7, 1000),
    "swin_b_224": SwinConfig(224, 4, 128, (2, 2, 18, 2), (4, 8, 16, 32), 7, 1000),
}


# --- Hugging Face ---------------------------------------------------------------------------------------------

_BLOCK_NAMES = {
    "attention_norm": "layernorm_before",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "mlp_norm": "layernorm_after",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_MODEL_NAMES = {
    "patches": "swin.embeddings.patch_embeddings.projection",
    "patch_norm": "swin.embeddings.norm",
    "final_norm": "swin.layernorm",
    "head": "classifier",
}


def swin_config_from_hf(values: dict[str, Any], source: str) -> SwinConfig:
    """The configuration of a Hugging Face config.json of a Swin classifier.

    Raises:
      CheckpointError: another model, or a setting that is not supported; names `source`, the key and the value.
    """
    wanted = {"model_type": "swin", "hidden_act": "gelu", "qkv_bias": True, "use_absolute_embeddings": False}
    for key, supported in wanted.items():
        if (value := values.get(key, supported if key != "model_type" else None)) != supported:
            raise CheckpointError(f"{source}: {key} is {value!r}, and only {supported!r} is supported")
    labels = values.get("id2label")
    try:
        return SwinConfig(
            image_size=values["image_size"],
            patch_size=values["patch_size"],
            d_model=values["embed_dim"],
            depths=tuple(values["depths"]),
            num_heads=tuple(values["num_heads"]),
            window=values["window_size"],
            num_classes=len(labels) if labels else values.get("num_labels", 2),
            channels=values.get("num_channels", 3),
            mlp_ratio=values.get("mlp_ratio", 4.0),
            norm_eps=values.get("layer_norm_eps", 1e-5),
        )
    except KeyError as error:
        raise CheckpointError(f"{source}: has no {error}") from error


def load_swin(
    folder: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    implementation: str | tuple[str, ...] = "auto",
) -> Swin:
    """A Swin classifier from a Hugging Face folder, config.json and safetensors; arguments as of `load_vit`.

    Raises:
      CheckpointError: something is missing, truncated, unexpected, of a wrong shape or unsupported. The message names
        the file, the tensor or key, and the fix.
    """
    folder = Path(folder)
    config = swin_config_from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    source = SafetensorsFolder(folder)
    types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype or dtype, "implementation": implementation}
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Swin(config, rngs=nnx.Rngs(0), **types)))
    variables = dict(nnx.to_flat_state(state))
    names = {path: _stored_name(path) for path in variables}
    shapes = {names[path]: _stored_shape(path, variable.shape, config) for path, variable in variables.items()}
    check_tensors(source, shapes)
    for path, variable in variables.items():
        tensor = source.read(names[path])
        if path[0] == "patches" and path[-1] == "kernel":  # a convolution's [D, C, P, P]
            tensor = tensor.transpose(2, 3, 1, 0).reshape(-1, len(tensor))
        elif path[-1] == "kernel":
            tensor = tensor.T
        variables[path] = variable.replace(jnp.asarray(tensor, variable.dtype))
    return nnx.merge(graphdef, nnx.from_flat_state(variables.items()))


def _stored_name(path: tuple[Any, ...]) -> str:
    last = {"kernel": "weight", "scale": "weight"}.get(path[-1], path[-1])
    if path[0] == "stages":
        block = f"swin.encoder.layers.{path[1]}.blocks.{path[2]}"
        if path[3] == "bias_table":
            return f"{block}.attention.self.relative_position_bias_table"
        return f"{block}.{_BLOCK_NAMES[path[3]]}.{last}"
    if path[0] == "merges":
        return f"swin.encoder.layers.{path[1]}.downsample.{path[2]}.{last}"
    return f"{_MODEL_NAMES[path[0]]}.{last}"


def _stored_shape(path: tuple[Any, ...], shape: tuple[int, ...], config: SwinConfig) -> tuple[int, ...]:
    if path[0] == "patches" and path[-1] == "kernel":
        return config.d_model, config.channels, config.patch_size, config.patch_size
    return shape[::-1] if path[-1] == "kernel" else shape
