# SPDX-License-Identifier: Apache-2.0
"""Decoders whose weights are quantized, in files: what compress.py writes and infer.py reads.

    decoder, tokenizer = load_decoder("path/to/folder")     # one of these folders, or whatever load_model takes
    save_compressed("path/to/new_folder", decoder, tokenizer, {"scheme": "mixed_2_4"})

A folder has config.json with `quantization_config`, the tokenizer, and model.safetensors:

    model.embed_tokens.weight, model.norm.weight, lm_head.weight      as in other folders
    model.layers.{i}.{qkv, out, gate_up, down}.*                      quantized_matmul/serialize.py has their names
    model.layers.{i}.{attention_norm, mlp_norm}                       and biases and norms of heads, as in LayerWeights

Each tensor has a checksum (CRC-32) in the header of the file.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from jax.typing import DTypeLike
from tqdm import tqdm

from models.checkpoint import (
    COMPRESSED,
    CheckpointError,
    check_free,
    is_compressed,
    load_model,
    locate,
    open_safetensors,
    whole_folder,
)
from models.decoder import Decoder, Implementation, LayerWeights
from models.hf_config import config_from_hf, config_to_hf
from models.llama import Llama, LlamaConfig
from models.tokenizer import Tokenizer, read_json, write_json
from pallas_kernels import IntWeight, MixedBitWeight
from pallas_kernels.quantized_matmul.serialize import from_tensors, to_tensors

FILE = "model.safetensors"
VERSION = 1
MATRICES = ("qkv", "out", "gate_up", "down")
_NAMES = {"embedding": "model.embed_tokens.weight", "output": "lm_head.weight", "final_norm": "model.norm.weight"}


def load_decoder(
    name_or_path: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    implementation: Implementation = "auto",
    gemm_implementation: Implementation = "auto",
) -> tuple[Decoder, Tokenizer]:
    """A model ready to generate, and its tokenizer: of a folder with quantized weights, or of anything `load_model`
    takes. Arguments are those of `load_model` and `Decoder`.

    Raises:
      CheckpointError: as `load_model`; a tensor of a quantized weight that is missing, damaged or cannot be one.
    """
    path = locate(name_or_path)
    if not (path.is_dir() and is_compressed(path)):
        model, tokenizer = load_model(name_or_path, dtype=dtype, implementation=implementation)
        return Decoder.from_model(model, gemm_implementation=gemm_implementation), tokenizer
    config = _config(path / "config.json")
    empty = jax.eval_shape(lambda: Decoder.from_model(Llama(config, rngs=nnx.Rngs(0), dtype=dtype), fold_norms=False))
    decoder = _filled(empty, _Tensors(path / FILE), jnp.dtype(dtype))
    options: dict[str, Any] = {"implementation": implementation, "gemm_implementation": gemm_implementation}
    return dataclasses.replace(decoder, **options), Tokenizer.from_folder(path)


def save_compressed(
    folder: str | Path,
    decoder: Decoder,
    tokenizer: Tokenizer,
    recipe: Mapping[str, Any],
    *,
    dtype: DTypeLike = jnp.bfloat16,
    overwrite: bool = False,
) -> None:
    """Writes a folder that `load_decoder` reads, whole or not at all.

    Args:
      decoder: as `compress` returns it, all its matrices quantized.
      recipe: how they were made, for who reads config.json; nothing depends on it.
      dtype: of what is not quantized: embedding, output projection, norms and biases.
      overwrite: as of `save_checkpoint`.
    """
    folder = Path(folder).absolute()
    check_free(folder, overwrite)
    quantization = {"quant_method": COMPRESSED, "version": VERSION, **recipe}
    values = config_to_hf(decoder.config) | tokenizer.special_token_ids()
    values |= {"torch_dtype": jnp.dtype(dtype).name, "quantization_config": quantization}
    tensors = {}
    for name, value in _named(decoder).items():
        new = to_tensors(value, name) if _is_quantized(value) else {name: value.astype(dtype)}
        tensors |= {key: np.ascontiguousarray(array) for key, array in new.items()}
    checksums = json.dumps({name: _checksum(array) for name, array in tensors.items()})
    with whole_folder(folder) as new_folder:
        write_json(new_folder / "config.json", values)
        tokenizer.save(new_folder)
        safetensors.numpy.save_file(tensors, new_folder / FILE, metadata={"format": "pt", "crc32": checksums})


def _is_quantized(value: Any) -> bool:
    return isinstance(value, MixedBitWeight | IntWeight)


def _named(decoder: Decoder) -> dict[str, Any]:
    """Everything in a decoder that has values, by its name in the file."""
    parts: dict[str, Any] = {name: getattr(decoder, field) for field, name in _NAMES.items()}
    for number, layer in enumerate(decoder.layers):
        for field in dataclasses.fields(layer):
            parts[_layer_name(number, field.name)] = getattr(layer, field.name)
    return {name: value for name, value in parts.items() if value is not None}


def _layer_name(layer: int, field: str) -> str:
    return f"model.layers.{layer}.{field}"


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(array.reshape(-1).view(np.uint8))


def _config(file: Path) -> LlamaConfig:
    values = read_json(file)
    version = values.pop("quantization_config").get("version")
    if version != VERSION:
        raise CheckpointError(
            f"{file}: quantization_config is of version {version!r}, and this is version {VERSION}; "
            "run python -m models.compress again"
        )
    return config_from_hf(values, str(file))


class _Tensors:
    """The tensors of a file, each checked as it is read."""

    def __init__(self, file: Path):
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file; copy it into the folder")
        self.file, self.open = file, open_safetensors(file)
        self.unread = set(self.open.keys())
        try:
            self.checksums = json.loads(self.open.metadata()["crc32"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: has no checksums; {_AGAIN}") from error

    def read(self, name: str) -> np.ndarray:
        if name not in self.unread:
            raise CheckpointError(f"{self.file}: tensor {name} is missing; {_AGAIN}")
        self.unread.discard(name)
        array = self.open.get_tensor(name)
        if self.checksums.get(name) != _checksum(np.ascontiguousarray(array)):
            raise CheckpointError(f"{self.file}: tensor {name} is damaged: its checksum is another; {_AGAIN}")
        return array

    def plain(self, name: str, like: jax.ShapeDtypeStruct, dtype: np.dtype) -> jax.Array:
        array = self.read(name)
        if array.shape != like.shape or not jnp.issubdtype(array.dtype, jnp.floating):
            found = f"{array.dtype}{list(array.shape)}"
            raise CheckpointError(
                f"{self.file}: tensor {name} is {found} but the configuration means floating point "
                f"{list(like.shape)}; {_AGAIN}"
            )
        return jnp.asarray(array, dtype)

    def weight(self, name: str, like: jax.ShapeDtypeStruct) -> MixedBitWeight | IntWeight:
        mine = {key: self.read(key) for key in sorted(self.unread) if key.startswith(f"{name}.")}
        try:
            weight = from_tensors(mine, name)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self.file}: tensor {error} {_AGAIN}") from error
        if weight.shape != like.shape[::-1]:
            raise CheckpointError(
                f"{self.file}: tensor {name}.shape is {list(weight.shape)} but the configuration means "
                f"{list(like.shape[::-1])}; {_AGAIN}"
            )
        return weight


_AGAIN = "copy it again, or run python -m models.compress again"


def _filled(empty: Decoder, tensors: _Tensors, dtype: np.dtype) -> Decoder:
    """A decoder that holds only shapes, with the values of a file."""
    values: dict[str, Any] = {}
    for name, like in tqdm(_named(empty).items(), desc="loading", unit="weight", disable=None):
        quantized = name.rsplit(".", 1)[1] in MATRICES
        values[name] = tensors.weight(name, like) if quantized else tensors.plain(name, like, dtype)
    if tensors.unread:
        raise CheckpointError(
            f"{tensors.file}: tensor {min(tensors.unread)} is unexpected: the configuration has no such parameter; "
            "use the configuration that belongs to these weights"
        )
    fields = [field.name for field in dataclasses.fields(LayerWeights)]
    layers: Any = tuple(
        LayerWeights(*(values.get(_layer_name(number, field)) for field in fields))  # type: ignore[arg-type]
        for number in range(empty.config.num_layers)
    )
    whole = {field: values.get(name) for field, name in _NAMES.items()}
    return dataclasses.replace(empty, layers=layers, **whole)
