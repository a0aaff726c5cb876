# SPDX-License-Identifier: Apache-2.0
"""Measures attention's logits on real text, and chooses the constants of an asynchronous softmax for each layer.

    python -m models.calibrate --checkpoint=smollm2 --data=data/genesis.txt --out=calibration.json
    python -m models.calibrate --checkpoint=path/to/folder --data=kjv              # path/to/folder/calibration.json

    calibration = Calibration.load("path/to/folder", model.config)
    calibration.unified_max(layer)        # what decode_attention and flash_attention take, or None: online softmax

An asynchronous softmax (pallas_kernels/core/softmax.py) replaces each row's maximum by a constant phi, and computes a
row again if one of its logits is 60 or more away from it. So phi is put halfway between the lowest and the highest
logit that a head had, which leaves the same room on both sides for text that goes further, and the bounds stay as wide
as float32 allows: narrower ones would only find more rows. FlashDecoding++ takes one phi for a model, and the 99.99 %
interval of its logits; but one logit is enough to have a row computed again, so extremes count, not quantiles, and
heads differ more than that interval is wide. A layer keeps the online softmax if a head leaves less room than MARGIN:
computing many rows twice costs more than the technique gains.

A calibration that does not suit a text costs time, and never changes a result by more than rounding.

Source: Hong et al., "FlashDecoding++", 2023, section 3.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from tqdm import tqdm

from models.checkpoint import PACKAGED_MODELS, CheckpointError, load_model
from models.layers import Block, rope_tables
from models.llama import Llama, LlamaConfig
from pallas_kernels import UnifiedMax, masks
from pallas_kernels.core.softmax import HIGHEST

FILE = "calibration.json"
VERSION = 1
# How much further than what was seen logits may go, on either side. On text of another kind SmolLM2's went 4.6 further
# in the mean over layers, and 14 at most, where there was room (docs/performance.md).
MARGIN = 10.0
# The histogram of logits: bins of 1/8; the first and the last take what lies beyond.
BIN, BINS = 0.125, 4096
# Rows of queries whose logits are there at a time.
ROWS = 128


class CalibrationError(ValueError):
    """A calibration that cannot be used; the message names the file, the key and the fix."""


# --- What is stored -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LayerLogits:
    """The logits of one layer: scale * query.key where the mask lets a query see a key.

    Attributes:
      lowest, highest: of each query head, N numbers.
      interval: holds 99.99 % of the logits of all heads; to 1/8.
    """

    lowest: tuple[float, ...]
    highest: tuple[float, ...]
    interval: tuple[float, float]

    @property
    def widest(self) -> float:
        """The largest span of a head."""
        return max(high - low for low, high in zip(self.lowest, self.highest, strict=True))

    @property
    def phi(self) -> tuple[float, ...] | None:
        """One constant a head, or None where a head's logits spread too far."""
        if self.widest > 2 * (HIGHEST - MARGIN):
            return None
        return tuple((low + high) / 2 for low, high in zip(self.lowest, self.highest, strict=True))


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was measured of a model.

    Attributes:
      model: the sizes of the model, `sizes_of` its configuration.
      source: the text.
      tokens: how many of it.
      layers: one entry a layer.
    """

    model: Mapping[str, int]
    source: str
    tokens: int
    layers: tuple[LayerLogits, ...]

    def unified_max(self, layer: int) -> UnifiedMax | None:
        """What attention of a layer takes; None asks for the online softmax."""
        phi = self.layers[layer].phi
        return None if phi is None else UnifiedMax(jnp.asarray(phi, jnp.float32), -HIGHEST, HIGHEST)

    def save(self, path: str | Path) -> Path:
        """Writes `path`, or calibration.json in the folder `path`, whole or not at all; returns the file."""
        file = _file(path)
        layers = [dataclasses.asdict(layer) | {"phi": layer.phi} for layer in self.layers]
        values = {"version": VERSION, "model": dict(self.model), "source": self.source, "tokens": self.tokens}
        new = file.with_name(f"{file.name}.{os.getpid()}.new")
        try:
            new.write_text(json.dumps(values | {"layers": layers}, indent=1) + "\n", encoding="utf-8")
            os.replace(new, file)
        finally:
            new.unlink(missing_ok=True)
        return file

    @classmethod
    def beside(cls, checkpoint: str | Path, config: LlamaConfig) -> Calibration | None:
        """That of a checkpoint, where the program writes it; None if there is none. Raises as `load` does."""
        if _is_packaged(checkpoint):
            return None
        file = default_file(str(checkpoint))
        return cls.load(file, config) if file.is_file() else None

    @classmethod
    def load(cls, path: str | Path, config: LlamaConfig) -> Calibration:
        """Reads what `save` wrote.

        Raises:
          CalibrationError: there is no such file, it is damaged or of another version, or of a model of other sizes
            than `config`.
        """
        file = _file(path)
        again = "run python -m models.calibrate again"
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CalibrationError(f"{file}: no such file; python -m models.calibrate writes one") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CalibrationError(f"{file}: is not valid JSON ({error}); {again}") from error
        version = values.get("version") if isinstance(values, dict) else None
        if version != VERSION:
            raise CalibrationError(f"{file}: is of version {version!r}, and this is version {VERSION}; {again}")
        try:
            layers = tuple(
                LayerLogits(tuple(entry["lowest"]), tuple(entry["highest"]), tuple(entry["interval"]))
                for entry in values["layers"]
            )
            found = cls(values["model"], values["source"], values["tokens"], layers)
        except (KeyError, TypeError) as error:
            raise CalibrationError(f"{file}: the key {error} is missing or malformed; {again}") from error
        wanted = sizes_of(config)
        if wrong := [name for name in wanted if found.model.get(name) != wanted[name]]:
            sizes = ", ".join(f"{name} is {found.model.get(name)} and must be {wanted[name]}" for name in wrong)
            raise CalibrationError(f"{file}: is of another model: {sizes}; {again}")
        for number, layer in enumerate(layers):
            _check_layer(f"{file}: layer {number}", layer, config.num_heads)
        if len(layers) != config.num_layers:
            raise CalibrationError(f"{file}: has {len(layers)} layers and the model {config.num_layers}; {again}")
        return found

    def table(self) -> str:
        """What was seen and chosen, a line a layer."""
        lines = ["layer   lowest   99.99 % of all      highest   widest head   phi of heads"]
        for number, layer in enumerate(self.layers):
            low, high = layer.interval
            chosen = "online softmax: too wide"
            if layer.phi is not None:
                chosen = f"{min(layer.phi):6.1f} to {max(layer.phi):5.1f}"
            seen = f"{min(layer.lowest):9.1f} {low:8.1f} to {high:6.1f} {max(layer.highest):9.1f}"
            lines.append(f"{number:5d}{seen}{layer.widest:14.1f}   {chosen}")
        on = sum(layer.phi is not None for layer in self.layers)
        lines.append(f"{on} of {len(self.layers)} layers take the asynchronous softmax ({self.tokens} tokens)")
        return "\n".join(lines)


def sizes_of(config: LlamaConfig) -> dict[str, int]:
    """The sizes by which a calibration is told to be of a model."""
    names = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "d_model", "vocab_size")
    return {name: getattr(config, name) for name in names}


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path / FILE if path.is_dir() else path


def _check_layer(where: str, layer: LayerLogits, N: int) -> None:
    for name in ("lowest", "highest"):
        numbers = getattr(layer, name)
        if len(numbers) != N or not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
            raise CalibrationError(f"{where}: {name} must be {N} finite numbers, one a head, got {numbers}")


# --- Measuring ----------------------------------------------------------------------------------------------


class AttentionInputs(NamedTuple):
    """What one layer's attention is called with: query [1, T, N, H], key and value [1, T, K, H], and the mask."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    mask: masks.Mask


def attention_inputs(model: Llama, row: Mapping[str, np.ndarray]) -> Iterator[AttentionInputs]:
    """Runs a model over one packed row (`models.data.PackedRows`), layer by layer, and yields what attention gets."""
    config = model.config
    tokens, positions, segments = (jnp.asarray(row[name])[None] for name in ("tokens", "positions", "segment_ids"))
    rope = rope_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
    window = config.sliding_window
    mask = (masks.Causal() if window is None else masks.Window(window - 1, 0)) & masks.Segments(segments, segments)
    mask = mask & masks.Lengths(jnp.count_nonzero(segments, axis=1))  # segment 0 is padding, at the end of a row
    graphdef, stacked = nnx.split(model.blocks)
    x = model.embed(tokens).astype(model.dtype)
    for layer in range(config.num_layers):
        x, (query, key, value) = _run_block(graphdef, stacked, layer, x, rope, mask)
        yield AttentionInputs(query, key, value, mask)


@functools.partial(jax.jit, static_argnames="graphdef")
def _run_block(graphdef: nnx.GraphDef[Block], stacked: nnx.State, layer, x, rope, mask):
    block = nnx.merge(graphdef, jax.tree.map(lambda parameter: parameter[layer], stacked))
    inputs = block.attention.inputs(block.attention_norm(x), rope)
    x = block(x, rope, mask)
    return x, inputs


@jax.jit
def _statistics(query: jax.Array, key: jax.Array, mask: masks.Mask) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lowest and highest logit of each head [N], and their histogram [N, BINS]; a few rows of queries at a time."""
    _, T, N, H = query.shape
    S, K = key.shape[1:3]
    cols = jnp.arange(S, dtype=jnp.int32)
    padded = jnp.pad(query, ((0, 0), (0, -T % ROWS), (0, 0), (0, 0)))

    def some(i, state):
        lowest, highest, counts = state
        rows = i * ROWS + jnp.arange(ROWS, dtype=jnp.int32)
        q = lax.dynamic_slice_in_dim(padded, i * ROWS, ROWS, axis=1).reshape(1, ROWS, K, N // K, H)
        x = jnp.einsum("btkgh,bskh->kgts", q, key, preferred_element_type=jnp.float32) * H**-0.5
        x = x.reshape(N, ROWS, S)
        seen = jnp.broadcast_to(mask.allowed(rows, cols, T, S)[0] & (rows < T)[:, None], x.shape)
        lowest = jnp.minimum(lowest, jnp.min(x, axis=(1, 2), where=seen, initial=jnp.inf))
        highest = jnp.maximum(highest, jnp.max(x, axis=(1, 2), where=seen, initial=-jnp.inf))
        bins = jnp.clip(jnp.floor(x / BIN).astype(jnp.int32) + BINS // 2, 0, BINS - 1)
        heads = jnp.arange(N, dtype=jnp.int32)[:, None, None]
        return lowest, highest, counts.at[heads, bins].add(seen.astype(jnp.int32))

    start = jnp.full(N, jnp.inf), jnp.full(N, -jnp.inf), jnp.zeros((N, BINS), jnp.int32)
    return lax.fori_loop(0, padded.shape[1] // ROWS, some, start)


def measure(model: Llama, rows: Iterable[Mapping[str, np.ndarray]], source: str) -> Calibration:
    """The logits of a model over packed rows; shows a progress bar on a terminal.

    Args:
      model: any precision; float32 is what the bounds are meant for.
      rows: of `models.data.PackedRows`.
      source: what to say about them in the file.
    """
    L, N, tokens = model.config.num_layers, model.config.num_heads, 0
    lowest, highest, counts = np.full((L, N), np.inf), np.full((L, N), -np.inf), np.zeros((L, BINS), np.int64)
    rows = list(rows)
    with tqdm(total=len(rows) * L, desc="calibrating", unit="layer", disable=None) as progress:
        for row in rows:
            tokens += int(np.count_nonzero(row["segment_ids"]))  # 0 marks padding
            for layer, inputs in enumerate(attention_inputs(model, row)):
                low, high, histogram = jax.device_get(_statistics(inputs.query, inputs.key, inputs.mask))
                lowest[layer], highest[layer] = np.minimum(lowest[layer], low), np.maximum(highest[layer], high)
                counts[layer] += histogram.sum(0)
                progress.update()
    finite = np.isfinite([lowest, highest]).all((0, 2))
    if not finite.all():
        layer = int(np.argmin(finite))
        raise CalibrationError(f"the logits of layer {layer} are not all finite: the model, or the text, is broken")
    layers = tuple(
        LayerLogits(tuple(map(float, low)), tuple(map(float, high)), interval(histogram))
        for low, high, histogram in zip(lowest, highest, counts, strict=True)
    )
    return Calibration(sizes_of(model.config), source, tokens, layers)


def interval(histogram: np.ndarray, share: float = 0.9999) -> tuple[float, float]:
    """The edges of the bins between which `share` of what was counted lies, the same beyond either."""
    below = np.cumsum(histogram) / np.sum(histogram)
    first, last = np.searchsorted(below, [(1 - share) / 2, (1 + share) / 2])
    return float((first - BINS // 2) * BIN), float((last + 1 - BINS // 2) * BIN)


# --- The program --------------------------------------------------------------------------------------------


def text_rows(data: str, tokenizer: Any, vocab_size: int, tokens: int, length: int) -> list[dict[str, np.ndarray]]:
    """Packed rows of `length` tokens, `tokens` of them in all, spread over the data."""
    from models.data import PackedRows, load_documents  # Grain, which takes its time, and who generates needs not

    rows = PackedRows(load_documents(data, tokenizer, vocab_size=vocab_size), length)
    wanted = min(len(rows), max(1, tokens // length))
    return [rows[i * len(rows) // wanted] for i in range(wanted)]


def _is_packaged(checkpoint: str | Path) -> bool:
    return str(checkpoint) in PACKAGED_MODELS and not Path(checkpoint).exists()


def default_file(checkpoint: str) -> Path:
    """Beside the checkpoint; CalibrationError if that is inside an installed package."""
    if _is_packaged(checkpoint):
        raise CalibrationError(f"{checkpoint} is an installed package, which is left alone: say where by --out=FILE")
    path = Path(checkpoint)
    return path / FILE if path.is_dir() else path.with_name(FILE)


def main(arguments: Sequence[str] | None = None) -> int:
    from models.data import DataError

    parser = argparse.ArgumentParser(prog="python -m models.calibrate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="smollm2, a Hugging Face folder, or a .gguf file")
    parser.add_argument("--data", required=True, help="text: a file, a folder, or kjv or python (models/data.py)")
    parser.add_argument("--out", help=f"file to write; {FILE} beside the checkpoint if not given")
    parser.add_argument("--tokens", type=int, default=8192, help="how much text to run")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row, the longest attention reaches")
    options = parser.parse_args(arguments)
    try:
        out = default_file(options.checkpoint) if options.out is None else Path(options.out)
        model, tokenizer = load_model(options.checkpoint)
        rows = text_rows(options.data, tokenizer, model.config.vocab_size, options.tokens, options.length)
        calibration = measure(model, rows, options.data)
        print(calibration.table())
        print(calibration.save(out))
    except (CalibrationError, CheckpointError, DataError, OSError) as error:
        print(f"models.calibrate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
