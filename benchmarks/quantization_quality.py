# SPDX-License-Identifier: Apache-2.0
"""What weights of few bits cost: perplexity of a model on text that it was not calibrated on.

    python -m benchmarks.quantization_quality --checkpoint=smollm2              # all variants, into the csv
    python -m benchmarks.quantization_quality --variants=int4,int4_gptq         # some
    python -m benchmarks.quantization_quality --table                           # of the csv, in Markdown

    python train.py --preset=small --data=kjv,python --eval_fraction=0.1 --seed=1 --out=runs/small_1 ...
    python -m benchmarks.quantization_quality --checkpoint=runs/small_1 --rows=16 --length=1024
    python -m benchmarks.quantization_quality --checkpoint=small --table        # of all seeds

Calibration text is half King James Bible, half Python source; what is scored are other documents of both. A model of
train.py's own is given only documents that its run held out: every other one calibrates, the rest is scored. The model
computes in float32 from weights that are bfloat16, so that differences are those of the weights. Rows are written as
they are done, and remain when the program is stopped; a variant that is run again for the same seed replaces its row.
No accelerator is needed.
"""

import argparse
import csv
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.rows import commit
from benchmarks.table import markdown
from benchmarks.unified_max import rows_of
from models.cache import KVCache
from models.checkpoint import load_model
from models.compress import Recipe, compress
from models.compressed import MATRICES
from models.data import DataError, Documents, load_documents
from models.decoder import Decoder
from models.tokenizer import Tokenizer
from pallas_kernels.quantized_matmul.quantize import packed_bits_per_weight

RESULTS = Path(__file__).parent / "results"
COLUMNS: tuple[str, ...] = ("variant", "seed", "bits", "stored_bits", "kjv", "python", "nats_more", "seconds", "commit")
NUMBERS = COLUMNS[2:7]  # in the table
TEXTS = ("kjv", "python")
BATCH = 4  # rows that are scored together


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
    """A model, text to calibrate with, and other text to score.

    Attributes:
      name: in that of the csv.
      seed: that the model was trained with; empty for a published one.
    """

    name: str
    seed: str
    decoder: Decoder
    calibration: list[dict[str, np.ndarray]]
    scored: Mapping[str, list[dict[str, np.ndarray]]]

    @classmethod
    def load(cls, checkpoint: str, rows: int, length: int) -> "Subject":
        """A published model: the beginnings, `length` tokens each, of `rows` documents of each text; every other one
        calibrates. A folder that train.py wrote: `rows` / 2 rows of each text calibrate, and all of every other
        document that was held out is scored, in rows of `length` tokens."""
        run = training_run(checkpoint)
        model, tokenizer = load_model(checkpoint if run is None else Path(checkpoint, "export"))
        decoder = jax.tree.map(
            lambda x: x.astype(jnp.bfloat16).astype(x.dtype), Decoder.from_model(model, fold_norms=False)
        )
        # Kernels are not what is measured, and they compute in bfloat16.
        decoder = dataclasses.replace(decoder, implementation="xla", gemm_implementation="xla")
        trained_on = None if run is None else trained_documents(run, tokenizer)
        calibration, scored = [], {}
        for name in TEXTS:
            documents = load_documents(name, tokenizer, vocab_size=model.config.vocab_size)
            if trained_on is None:
                found = rows_of(documents, 0, rows, length)
                calibration += found[0::2]
                scored[name] = found[1::2]
            else:
                held_out = [document for document in documents if document.tobytes() not in trained_on]
                calibration += rows_of(cut(held_out[1::2], length), 0, rows // 2, length)
                rest = cut(held_out[0::2], length)
                scored[name] = rows_of(rest, 0, len(rest), length)
        if run is None:
            return cls(Path(checkpoint).stem, "", decoder, calibration, scored)
        return cls(run["preset"] or Path(run["checkpoint"]).stem, str(run["seed"]), decoder, calibration, scored)


def training_run(folder: str) -> dict[str, Any] | None:
    """The settings of the run whose --out this folder was, or None if it is something else."""
    file = Path(folder, "config.json")
    settings = json.loads(file.read_text()) if file.is_file() else {}
    return settings if "data_fingerprint" in settings else None


def trained_documents(run: Mapping[str, Any], tokenizer: Tokenizer) -> set[bytes]:
    """Tokens of each document that a run of train.py was trained on."""
    documents = load_documents(run["data"], tokenizer, vocab_size=run["model"]["vocab_size"], seed=run["seed"])
    if documents.fingerprint() != run["data_fingerprint"]:
        raise DataError(
            f"{run['data']}: the text is not what the model was trained on, so that what it has not seen is unknown; "
            "train it again here"
        )
    return {document.tobytes() for document in documents.split(run["eval_fraction"])[0]}


def cut(documents: Sequence[np.ndarray], length: int) -> Documents:
    """All whole pieces of `length` tokens, each of one document."""
    return Documents.join(
        document[start : start + length]
        for document in documents
        for start in range(0, len(document) - length + 1, length)
    )


def mean_loss(decoder: Decoder, rows: Sequence[Mapping[str, np.ndarray]]) -> float:
    """Nats a token, of rows of one length."""
    tokens = np.stack([row["tokens"] for row in rows])
    # The last batch is filled up by rows that do not count, so that one program does for all.
    batches = np.pad(tokens, ((0, -len(tokens) % BATCH), (0, 0))).reshape(-1, BATCH, tokens.shape[1])
    return float(np.mean(np.concatenate([_losses(decoder, batch) for batch in batches])[: len(tokens)]))


@jax.jit
def _losses(decoder: Decoder, tokens: jax.Array) -> jax.Array:
    """[B], of tokens [B, T]."""
    B, T = tokens.shape
    hidden, _ = decoder.prefill(tokens, jnp.full(B, T), KVCache.zeros(decoder.config, B, T, decoder.dtype))
    scores = jax.nn.log_softmax(decoder.logits(hidden[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], 2), (1, 2))


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


Key = tuple[str, str]  # variant, seed


def read(file: Path) -> dict[Key, dict[str, str]]:
    if not file.is_file():
        return {}
    with file.open(newline="") as opened:
        return {(row["variant"], row["seed"]): row for row in csv.DictReader(opened)}


def write(file: Path, rows: Mapping[Key, Mapping[str, Any]]) -> None:
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
        writer.writeheader()
        seeds = sorted({seed for _, seed in rows})
        writer.writerows(rows[key] for name in VARIANTS for seed in seeds if (key := (name, seed)) in rows)


def table(rows: Mapping[Key, Mapping[str, Any]]) -> str:
    """One line a variant; where there are several seeds, their mean and in brackets the least and the largest."""
    header = ["weights", "bits", "stored", "perplexity, Bible", "perplexity, Python", "nats a token more"]
    found: dict[str, dict[str, list[str]]] = {}
    for name in VARIANTS:
        if of_seeds := [row for (variant, _), row in rows.items() if variant == name]:
            found[name] = {column: [row[column] for row in of_seeds] for column in NUMBERS}
    cells = [
        [f"`{name}`", *map(_over_seeds, found[name].values())]
        for name in sorted(found, key=lambda name: np.mean([float(x) for x in found[name]["nats_more"]]))
    ]
    return "\n".join(markdown(header, cells))


def _over_seeds(values: Sequence[str]) -> str:
    if len(set(values)) == 1:
        return values[0]
    decimals = max(len(value.partition(".")[2]) for value in values)
    form = ".4g" if "e" in "".join(values) else f".{decimals}f"
    return f"{np.mean([float(x) for x in values]):{form}} ({min(values, key=float)} to {max(values, key=float)})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization_quality", description=__doc__)
    parser.add_argument(
        "--checkpoint", default="smollm2", help="smollm2, a Hugging Face folder, a .gguf file, or train.py's --out"
    )
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names, with commas")
    parser.add_argument("--rows", type=int, default=8, help="rows of each text: every other one calibrates")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--out", type=Path, help="csv; default results/quantization_NAME.csv beside this file")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args(argv)
    names = options.variants.split(",")
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"unknown variants {', '.join(sorted(unknown))}; known: {', '.join(VARIANTS)}")
    if options.table:
        print(table(read(options.out or _results(Path(options.checkpoint).stem))))
        return 0
    # GPUs would multiply float32 with 10 bits of fraction.
    with jax.default_matmul_precision("highest"):
        subject = Subject.load(options.checkpoint, options.rows, options.length)
        file = options.out or _results(subject.name)
        measure(subject, names, file)
    print(table(read(file)))
    return 0


def measure(subject: Subject, variants: Sequence[str], file: Path) -> None:
    """Writes a row for each variant into the file, beside those that are there."""
    rows: dict[Key, Mapping[str, Any]] = dict(read(file))
    exact = {name: mean_loss(subject.decoder, subject.scored[name]) for name in TEXTS}
    # Rounding in order is a long chain of small steps, which a CPU takes faster than a GPU launches them.
    cpu, (device, *_) = jax.devices("cpu")[0], jax.devices()
    on_cpu = jax.device_put(subject.decoder, cpu)
    for variant in tqdm(variants, unit="variant", disable=None):
        start, recipe = time.perf_counter(), VARIANTS[variant]
        with jax.default_device(cpu):
            decoder = on_cpu if recipe is None else compress(on_cpu, subject.calibration, recipe)
        decoder = jax.device_put(decoder, device)
        found = exact if recipe is None else {name: mean_loss(decoder, subject.scored[name]) for name in TEXTS}
        own, stored = bits(decoder, recipe)
        more = float(np.mean([found[name] - exact[name] for name in TEXTS]))
        numbers = [f"{own:.3f}", f"{stored:.3f}", *(f"{np.exp(found[name]):.4g}" for name in TEXTS), f"{more:.4f}"]
        seconds = f"{time.perf_counter() - start:.0f}"
        row = [variant, subject.seed, *numbers, seconds, commit()]
        rows[variant, subject.seed] = dict(zip(COLUMNS, row, strict=True))
        write(file, rows)


def _results(name: str) -> Path:
    return RESULTS / f"quantization_{name}.csv"


if __name__ == "__main__":
    sys.exit(main())
