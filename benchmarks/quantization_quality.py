# SPDX-License-Identifier: Apache-2.0
"""What weights of few bits cost: perplexity of a model on text that it was not calibrated on.

    python -m benchmarks.quantization_quality --checkpoint=smollm2              # all variants, into the csv
    python -m benchmarks.quantization_quality --variants=int4,int4_gptq         # some
    python -m benchmarks.quantization_quality --table                           # of the csv, in Markdown

Calibration text is half King James Bible, half Python source; what is scored are other documents of both. The model
computes in float32 from weights that are bfloat16, so that differences are those of the weights. Rows are written as
they are done, and remain when the program is stopped; a variant that is run again replaces its row. No accelerator.
"""

import argparse
import csv
import dataclasses
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.table import markdown
from benchmarks.unified_max import rows_of
from models.cache import KVCache
from models.checkpoint import load_model
from models.compress import Recipe, compress
from models.compressed import MATRICES
from models.data import load_documents
from models.decoder import Decoder
from pallas_kernels.quantized_matmul.quantize import packed_bits_per_weight

RESULTS = Path(__file__).parent / "results"
COLUMNS: tuple[str, ...] = ("variant", "bits", "stored_bits", "kjv", "python", "nats_more", "seconds", "commit")
TEXTS = ("kjv", "python")


def mixed(compensate: bool = True, **options: Any) -> Recipe:
    return Recipe("mixed_2_4", compensate, options)


VARIANTS: Mapping[str, Recipe | None] = {
    "bfloat16": None,
    "int8": Recipe("int8", False),
    "int4": Recipe("int4", False),
    "int4_gptq": Recipe("int4"),
    "int2": Recipe("int2", False),
    "2_bits": mixed(False, four_bit_fraction=0),
    "2_bits_gptq": mixed(four_bit_fraction=0),
    "mixed_range": mixed(False),
    "mixed_range_gptq": mixed(),
    "mixed_hessian_gptq": mixed(strips="hessian"),
    "mixed_random_0_gptq": mixed(strips="random", seed=0),
    "mixed_outliers_gptq": mixed(outlier_fraction=0.0025),
    "mixed_clip_gptq": mixed(clip_scales=True),
    "int2_32_gptq": Recipe("int2", options={"group_size": 32}),  # about the same bits, spent on all groups
    "int2_gptq": Recipe("int2"),
    "mixed_error_gptq": mixed(strips="error"),
    "mixed_clamp_gptq": mixed(clip_scales="clamp"),
    "mixed_random_1_gptq": mixed(strips="random", seed=1),
    "mixed_random_2_gptq": mixed(strips="random", seed=2),
}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, text to calibrate with, and other text to score."""

    decoder: Decoder
    calibration: list[dict[str, np.ndarray]]
    scored: Mapping[str, list[dict[str, np.ndarray]]]

    @classmethod
    def load(cls, checkpoint: str, rows: int, length: int) -> "Subject":
        """`rows` rows of `length` tokens to calibrate with, and as many to score; each is one document's beginning."""
        model, tokenizer = load_model(checkpoint)
        decoder = jax.tree.map(
            lambda x: x.astype(jnp.bfloat16).astype(x.dtype), Decoder.from_model(model, fold_norms=False)
        )
        calibration, scored = [], {}
        for name in TEXTS:
            documents = load_documents(name, tokenizer, vocab_size=model.config.vocab_size)
            found = rows_of(documents, 0, rows, length)
            calibration += found[0::2]
            scored[name] = found[1::2]
        return cls(decoder, calibration, scored)


def mean_loss(decoder: Decoder, rows: Sequence[Mapping[str, np.ndarray]]) -> float:
    """Nats a token."""
    return float(np.mean([_loss(decoder, jnp.asarray(row["tokens"])) for row in rows]))


@jax.jit
def _loss(decoder: Decoder, tokens: jax.Array) -> jax.Array:
    cache = KVCache.zeros(decoder.config, 1, len(tokens), decoder.dtype)
    hidden, _ = decoder.prefill(tokens[None], jnp.asarray([len(tokens)]), cache)
    scores = jax.nn.log_softmax(decoder.logits(hidden[0, :-1]))
    return -jnp.mean(jnp.take_along_axis(scores, tokens[1:, None], 1))


def bits(decoder: Decoder, recipe: Recipe | None) -> tuple[float, float]:
    """Bits a weight in the layers: without what only fills up words and chunks, and as stored."""
    if recipe is None:
        return 16.0, 16.0
    weights: list[Any] = [getattr(layer, name) for layer in decoder.layers for name in MATRICES]
    sizes = [float(np.prod(weight.shape)) for weight in weights]

    def own(weight: Any) -> float:
        K, N = weight.shape
        if recipe.scheme == "mixed_2_4":
            if recipe.options.get("clip_scales"):
                return packed_bits_per_weight(weight)
            strips = weight.strips + int(np.sum(weight.four_bit_strips()))
            outliers = 0 if weight.outliers is None else 32 * weight.outliers.values.size + 32 * N
            return (strips * N * (32 + 8 + 1) + outliers) / (K * N)
        each = 32 if weight.group_size is None else 24 if weight.bits == 2 else 16
        return weight.bits + each * weight.scale.shape[0] / K

    stored = sum(8 * weight.nbytes for weight in weights) / sum(sizes)
    return float(np.average([own(weight) for weight in weights], weights=sizes)), stored


def read(file: Path) -> dict[str, dict[str, str]]:
    if not file.is_file():
        return {}
    with file.open(newline="") as opened:
        return {row["variant"]: row for row in csv.DictReader(opened)}


def write(file: Path, rows: Mapping[str, dict[str, Any]]) -> None:
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in VARIANTS if name in rows)


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    header = ["weights", "bits", "stored", "perplexity, Bible", "perplexity, Python", "nats a token more"]
    cells = [
        [f"`{name}`", *(rows[name][column] for column in COLUMNS[1:6])]
        for name in sorted((n for n in VARIANTS if n in rows), key=lambda n: float(rows[n]["nats_more"]))
    ]
    return "\n".join(markdown(header, cells))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization_quality", description=__doc__)
    parser.add_argument("--checkpoint", default="smollm2", help="smollm2, a Hugging Face folder, or a .gguf file")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names, with commas")
    parser.add_argument("--rows", type=int, default=8, help="documents of each text: every other one calibrates")
    parser.add_argument("--length", type=int, default=512, help="tokens of a document")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args(argv)
    names = options.variants.split(",")
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"unknown variants {', '.join(sorted(unknown))}; known: {', '.join(VARIANTS)}")
    file = RESULTS / f"quantization_{Path(options.checkpoint).stem}.csv"
    rows: dict[str, Any] = dict(read(file))
    if not options.table:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        subject = Subject.load(options.checkpoint, options.rows, options.length)
        exact = {name: mean_loss(subject.decoder, subject.scored[name]) for name in TEXTS}
        for variant in tqdm(names, unit="variant", disable=None):
            start, recipe = time.perf_counter(), VARIANTS[variant]
            decoder = subject.decoder if recipe is None else compress(subject.decoder, subject.calibration, recipe)
            found = exact if recipe is None else {name: mean_loss(decoder, subject.scored[name]) for name in TEXTS}
            own, stored = bits(decoder, recipe)
            more = float(np.mean([found[name] - exact[name] for name in TEXTS]))
            numbers = [f"{own:.3f}", f"{stored:.3f}", *(f"{np.exp(found[name]):.4g}" for name in TEXTS), f"{more:.4f}"]
            seconds = f"{time.perf_counter() - start:.0f}"
            rows[variant] = dict(zip(COLUMNS, [variant, *numbers, seconds, commit], strict=True))
            write(file, rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
