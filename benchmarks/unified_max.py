# SPDX-License-Identifier: Apache-2.0
"""What an asynchronous softmax does on real text: how many rows are computed again, and how far results are off.

    python -m benchmarks.unified_max --checkpoint=smollm2 --calibration=calibration.json --data=python

Runs a model over documents that it was not calibrated on (models/calibrate.py), and gives the queries, keys and values
of each layer to `flash_attention` (all rows) and to `decode_attention` (some rows as newest tokens), with the
asynchronous softmax and with the online one. Errors are against the specification in float64 of the same inputs: their
root mean square over that of the output, and the largest over the largest output. Needs no accelerator.
"""

import argparse
import collections
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from models.calibrate import Calibration, attention_inputs
from models.checkpoint import load_model
from models.data import Documents, load_documents
from pallas_kernels import UnifiedMax, decode_attention, flash_attention, masks
from pallas_kernels.flash_attention import reference

OPERATIONS, DTYPES, SOFTMAXES = (
    ("flash_attention", "decode_attention"),
    ("float32", "bfloat16"),
    ("asynchronous", "online"),
)


@dataclasses.dataclass
class Tally:
    """Sums over layers and documents."""

    rows: int = 0
    recomputed: int = 0
    squared_error: float = 0.0
    squared_output: float = 0.0
    largest_error: float = 0.0
    largest_output: float = 0.0

    def add(self, out: jax.Array, exact: np.ndarray, recomputed: jax.Array) -> None:
        error = np.asarray(out, np.float64) - exact
        self.rows += exact[..., 0].size
        self.recomputed += int(np.sum(recomputed))
        self.squared_error += float(np.sum(error**2))
        self.squared_output += float(np.sum(exact**2))
        self.largest_error = max(self.largest_error, float(np.abs(error).max()))
        self.largest_output = max(self.largest_output, float(np.abs(exact).max()))


def rows_of(documents: Documents, skip: int, count: int, length: int) -> list[dict[str, np.ndarray]]:
    """`count` documents of at least `length` tokens, cut to that, spread over those from number `skip` on."""
    long = [document[:length] for document in list(documents)[skip:] if len(document) >= length]
    if len(long) < count:
        raise ValueError(f"{count} documents of {length} tokens are wanted, and there are {len(long)}")
    chosen = [long[i] for i in np.linspace(0, len(long) - 1, count).astype(int)]
    everywhere = {"positions": np.arange(length, dtype=np.int32), "segment_ids": np.ones(length, np.int32)}
    return [{"tokens": tokens, **everywhere} for tokens in chosen]


def exactly(query: jax.Array, key: jax.Array, value: jax.Array) -> np.ndarray:
    """Causal attention by the specification, in float64."""
    with jax.enable_x64(True):
        arrays = (jnp.asarray(np.asarray(x, np.float64)) for x in (query, key, value))
        return np.asarray(_specification(*arrays)[0])


@jax.jit
def _specification(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    return reference.attention(query, key, value, mask=masks.Causal(), scale=query.shape[-1] ** -0.5)


@jax.jit
def outputs(
    arrays: Sequence[jax.Array], positions: jax.Array, unified_max: UnifiedMax | None
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """By operation: output [rows, N, H], and recomputed rows."""
    query, key, value = arrays
    options: dict[str, Any] = {"unified_max": unified_max, "return_stats": True, "implementation": "xla"}
    out, stats = flash_attention(query, key, value, mask=masks.Causal(), **options)
    found = {"flash_attention": (out[0], stats.recomputed_rows)}
    # Each position is a sequence that ends there.
    key, value = (jnp.broadcast_to(x, (len(positions), *x.shape[1:])) for x in (key, value))
    out, stats = decode_attention(query[0, positions], key, value, positions + 1, **options)
    return found | {"decode_attention": (out, stats.recomputed_rows)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.unified_max", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--checkpoint", default="smollm2", help="smollm2, a Hugging Face folder, or a .gguf file")
    parser.add_argument("--calibration", required=True, help="what python -m models.calibrate wrote")
    parser.add_argument("--data", required=True, help="as of models.calibrate; other text")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many documents: those of the calibration")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a document")
    options = parser.parse_args(argv)
    model, tokenizer = load_model(options.checkpoint)
    calibration = Calibration.load(options.calibration, model.config)
    documents = load_documents(options.data, tokenizer, vocab_size=model.config.vocab_size)
    rows = rows_of(documents, options.skip, options.documents, options.length)
    positions = np.arange(31, options.length, 32)
    tallies: dict[tuple[str, ...], Tally] = collections.defaultdict(Tally)
    layers_with_any = set()
    with tqdm(total=len(rows) * model.config.num_layers, unit="layer", disable=None) as progress:
        for row in rows:
            for layer, (*inputs, _) in enumerate(attention_inputs(model, row)):
                unified_max = calibration.unified_max(layer)
                for dtype in DTYPES if unified_max is not None else ():
                    arrays = [x.astype(dtype) for x in inputs]
                    exact = exactly(*arrays)[0]
                    for softmax, constant in zip(SOFTMAXES, (unified_max, None), strict=True):
                        found = outputs(arrays, jnp.asarray(positions), constant)
                        for name, (out, recomputed) in found.items():
                            wanted = exact if name == "flash_attention" else exact[positions]
                            tallies[name, dtype, softmax].add(out, wanted, recomputed)
                            layers_with_any |= {layer} if np.sum(recomputed) else set()
                progress.update()
    on = sum(calibration.unified_max(layer) is not None for layer in range(model.config.num_layers))
    print(
        f"{options.data}: {len(rows)} documents of {options.length} tokens, {on} of {model.config.num_layers} layers; ",
        end="",
    )
    print(f"rows were computed again in layers {sorted(layers_with_any) or 'none'}.\n")
    print("| operation | dtype | softmax | rows | computed again | rms error | largest error |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (name, dtype, softmax), tally in sorted(tallies.items()):
        again = f"{tally.recomputed} ({tally.recomputed / tally.rows:.4%})" if softmax == "asynchronous" else ""
        rms = (tally.squared_error / tally.squared_output) ** 0.5
        largest = tally.largest_error / tally.largest_output
        print(f"| `{name}` | {dtype} | {softmax} | {tally.rows} | {again} | {rms:.3g} | {largest:.3g} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
