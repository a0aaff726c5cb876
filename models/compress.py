# SPDX-License-Identifier: Apache-2.0
"""Quantizes the weights of a model's layers, and writes a checkpoint that infer.py runs.

    python -m models.compress --checkpoint=smollm2 --scheme=mixed_2_4 --calibration=data/genesis.txt --out=runs/small
    python infer.py --checkpoint=runs/small --prompt="In the beginning"

Weights are rounded with error compensation (pallas_kernels/quantized_matmul/gptq.py): what counts is the error of a
product on inputs that occur, and those come from real text. The text runs through the model once, a layer at a time:

    inputs of a product  --->  H = sum of x^T x  --->  its weight, quantized  --->  the product with that weight
          ^                                                                               |
          +------------------------- inputs of the next product  <------------------------+

so every weight is fitted to what the quantized weights in front of it, those of its own layer too, make of the text.
Four weights of a layer are quantized, as the decoder multiplies them: query, key and value in one, the output
projection, gate and up in one, and down. Embedding, output projection to the vocabulary, norms and biases stay as they
are.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from models.calibrate import text_rows
from models.checkpoint import CheckpointError, check_free, load_model
from models.compressed import MATRICES, save_compressed
from models.decoder import Decoder, LayerWeights, Options, heads, product
from models.layers import causal_mask, rms_norm, rope_tables
from models.tokenizer import Tokenizer
from pallas_kernels import flash_attention, masks, quantize
from pallas_kernels.quantized_matmul.quantize import FOUR_BIT_FRACTION, RANKINGS, choose_strips
from pallas_kernels.quantized_matmul.shapes import GROUP_SIZES
from pallas_kernels.quantized_matmul.weights import Weight

SCHEMES = ("mixed_2_4", *GROUP_SIZES)
DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How weights are made.

    Attributes:
      scheme, options: of `pallas_kernels.quantize`.
      compensate: round with error compensation; else each weight by itself.
    """

    scheme: Any = "mixed_2_4"
    compensate: bool = True
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def make(self, w: jax.Array, hessian: np.ndarray) -> Weight:
        """The weight for w [K, N], whose inputs have x^T x = hessian."""
        if self.compensate:
            return quantize(w, self.scheme, hessian=hessian, **self.options)
        options = dict(self.options)
        if options.get("strips") == "hessian":
            fraction = options.get("four_bit_fraction", FOUR_BIT_FRACTION)
            options["strips"] = choose_strips(w, "hessian", fraction, hessian=hessian)
        return quantize(w, self.scheme, **options)


def compress(decoder: Decoder, rows: Sequence[Mapping[str, np.ndarray]], recipe: Recipe) -> Decoder:
    """The decoder with quantized weights; shows a progress bar on a terminal.

    Args:
      decoder: made with fold_norms=False; float32 is best, for the text that runs through it. It is left as it is.
      rows: of `models.data.PackedRows`, the text.

    Raises:
      ValueError: options that `quantize` refuses; weights or inputs that are not finite, with the layer's number.
    """
    config = decoder.config
    if any(weights.attention_norm is None or weights.mlp_norm is None for weights in decoder.layers):
        raise ValueError("compress: the scales of norms must be apart: Decoder.from_model(model, fold_norms=False)")
    options = Options(config, decoder.implementation, decoder.gemm_implementation)
    texts = [_Text.of(decoder, row) for row in rows]
    layers = []
    with tqdm(total=4 * config.num_layers, desc="compressing", unit="weight", disable=None) as progress:

        def quantized(weights: LayerWeights, name: str, inputs: Sequence[jax.Array]) -> LayerWeights:
            each = zip(texts, inputs, strict=True)
            hessian = sum(np.asarray(_squared(x, text.real), np.float64) for text, x in each)
            try:
                weight = recipe.make(getattr(weights, name).T, np.asarray(hessian))
            except ValueError as error:
                raise ValueError(f"layer {len(layers)}, {name}: {error}") from error
            progress.update()
            return dataclasses.replace(weights, **{name: weight})

        for weights in decoder.layers:
            weights = quantized(weights, "qkv", [_normed(options, text.x, weights.attention_norm) for text in texts])
            attended = [_attended(options, weights, text.x, text.rope, text.mask) for text in texts]
            weights = quantized(weights, "out", attended)
            texts = [
                text.after(_product(options, h, weights.out, bias=weights.out_bias, residual=text.x))
                for text, h in zip(texts, attended, strict=True)
            ]
            weights = quantized(weights, "gate_up", [_normed(options, text.x, weights.mlp_norm) for text in texts])
            gated: dict[str, Any] = {"activation": "swiglu", "rms_norm_eps": config.norm_eps, "norm": weights.mlp_norm}
            inner = [_product(options, text.x, weights.gate_up, **gated) for text in texts]
            weights = quantized(weights, "down", inner)
            texts = [
                text.after(_product(options, h, weights.down, residual=text.x))
                for text, h in zip(texts, inner, strict=True)
            ]
            layers.append(weights)
    return dataclasses.replace(decoder, layers=tuple(layers))


@dataclasses.dataclass(frozen=True)
class _Text:
    """A row of text on its way through the layers: x [1, T, D], and `real` [T, 1], 0 for padding."""

    x: jax.Array
    rope: tuple[jax.Array, jax.Array]
    mask: masks.Mask
    real: jax.Array

    @classmethod
    def of(cls, decoder: Decoder, row: Mapping[str, np.ndarray]) -> _Text:
        config = decoder.config
        tokens, positions, segments = (jnp.asarray(row[name])[None] for name in ("tokens", "positions", "segment_ids"))
        rope = rope_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        mask = causal_mask(config.sliding_window) & masks.Segments(segments, segments)
        real = (segments[0] > 0)[:, None]  # segment 0 is padding
        return cls(decoder.embedding[tokens], rope, mask, real)

    def after(self, x: jax.Array) -> _Text:
        return dataclasses.replace(self, x=x)


@functools.partial(jax.jit, static_argnames="options")
def _normed(options: Options, x: jax.Array, norm: jax.Array) -> jax.Array:
    return rms_norm(x, norm, options.config.norm_eps)


@functools.partial(jax.jit, static_argnames="options")
def _attended(options: Options, weights: LayerWeights, x: jax.Array, rope: Any, mask: masks.Mask) -> jax.Array:
    query, key, value = heads(options, weights, x, rope)
    out = flash_attention(query, key, value, mask=mask, implementation=options.implementation)
    return out.reshape(*x.shape[:-1], -1)


_product = jax.jit(product, static_argnames=("options", "activation", "rms_norm_eps"))


@jax.jit
def _squared(x: jax.Array, real: jax.Array) -> jax.Array:
    """x^T x, float32 [K, K], of x [1, T, K] where it is `real`."""
    x = jnp.where(real, x[0], 0).astype(jnp.float32)
    return jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)


def summary(decoder: Decoder) -> str:
    """Bits a weight, with and without embeddings, and memory."""
    matrices: list[Any] = [getattr(layer, name) for layer in decoder.layers for name in MATRICES]
    count, size = sum(math.prod(weight.shape) for weight in matrices), sum(weight.nbytes for weight in matrices)
    kept = dataclasses.replace(decoder, layers=(), unified_max=None)
    others: list[Any] = jax.tree.leaves(kept)
    others += [
        x for layer in decoder.layers for name, x in vars(layer).items() if name not in MATRICES and x is not None
    ]
    all_count = count + sum(x.size for x in others)
    all_size = size + sum(2 * x.size for x in others)
    return (
        f"{8 * size / count:.3f} bits a weight in the layers ({count:,} weights, {size / 1e6:.1f} MB; bfloat16 "
        f"{2 * count / 1e6:.1f} MB), {8 * all_size / all_count:.3f} with embeddings and norms in 16 bits "
        f"({all_count:,}, {all_size / 1e6:.1f} MB; bfloat16 {2 * all_count / 1e6:.1f} MB)"
    )


# --- The program --------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.compress", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="smollm2, a Hugging Face folder, or a .gguf file")
    parser.add_argument(
        "--calibration", required=True, help="text: a file, a folder, or kjv or python (models/data.py)"
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--scheme", choices=SCHEMES, default="mixed_2_4")
    parser.add_argument("--plain", action="store_true", help="round each weight by itself, without compensation")
    parser.add_argument("--group_size", type=int, help="int2, int4, int8: inputs that share a scale")
    parser.add_argument("--activation_bits", type=int, choices=(8,), help="int8: multiply in integers")
    parser.add_argument("--four_bit_fraction", type=float, help="mixed_2_4: of strips that get 4 bits")
    parser.add_argument("--strips", choices=RANKINGS, help="mixed_2_4: which strips get 4 bits")
    parser.add_argument("--outlier_fraction", type=float, help="mixed_2_4: of weights that are kept in bfloat16")
    parser.add_argument("--tokens", type=int, default=8192, help="how much text to run")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of what is not quantized")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder once the new one is complete")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    names = ("group_size", "activation_bits", "four_bit_fraction", "strips", "outlier_fraction")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    recipe = Recipe(options.scheme, not options.plain, given)
    try:
        out = Path(options.out).absolute()
        check_free(out, options.overwrite)
        decoder, tokenizer = _load(options.checkpoint)
        rows = text_rows(options.calibration, tokenizer, decoder.config.vocab_size, options.tokens, options.length)
        decoder = compress(decoder, rows, recipe)
        text = {"calibration": options.calibration, "tokens": sum(int(np.sum(row["segment_ids"] > 0)) for row in rows)}
        how = {"scheme": recipe.scheme, "compensated": recipe.compensate, **given, **text}
        save_compressed(out, decoder, tokenizer, how, dtype=options.dtype, overwrite=options.overwrite)
        print(summary(decoder))
        print(out)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"models.compress: {error}", file=sys.stderr)
        return 2
    return 0


def _load(checkpoint: str) -> tuple[Decoder, Tokenizer]:
    model, tokenizer = load_model(checkpoint)
    return Decoder.from_model(model, fold_norms=False), tokenizer  # the model itself is dropped here


if __name__ == "__main__":
    sys.exit(main())
