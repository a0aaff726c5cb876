# SPDX-License-Identifier: Apache-2.0
"""A vision transformer with few bits: what is pruned, the ranges of activations, and the integers that are stored.

    masks = pruning_masks(params, "2:4")                      which weights stay; None where all do
    fake = calibrated(graphdef, params, images, bits=8)       models/arithmetic.py: for training, and to compare with
    exact = integers(params, fake, "2:4")                     the same from integers: two of four, and dense
    save_compressed_vit(folder, config, params, exact)        what is stored, and `load_compressed_vit` reads it back

Matrices of the blocks are pruned; patches and head are not, and have 8 bits whatever the blocks have. "4:8" keeps two
of four pairs, which is how weights of 4 bits are stored; "2:4" of them is stored as integers of 8.

Source: Yu et al., "Boost Vision Transformer with GPU-Friendly Sparsity and Quantization", 2023 (GPUSQ-ViT).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from jax.typing import DTypeLike

from models import qat
from models.arithmetic import FakeQuantized, Integers, Pair, Sparse, codes_of
from models.checkpoint import CheckpointError, check_free, open_safetensors, whole_folder
from models.qat import Codes, Observer, Range
from models.tokenizer import read_json, write_json
from models.vit import ViT, ViTConfig
from pallas_kernels import Sparse24Weight, prune_2_4, prune_4_8_pairs

Pattern = Literal["2:4", "4:8"]
Params = Mapping[str, Any]
PRUNED = ("query", "key", "value", "out", "up", "down")  # matrices of a block
END_BITS = 8
_PRUNE = {"2:4": prune_2_4, "4:8": prune_4_8_pairs}
_MULTIPLES = {"2:4": 4, "4:8": 8}
_FILE, _VERSION = "model.safetensors", 2


def pruning_masks(params: Params, pattern: Pattern) -> Any:
    """bool, like the parameters: which stay, by magnitude along the inputs; None where all do.

    Raises:
      ValueError: an unknown pattern, or inputs that are not whole groups; names the matrix.
    """
    if pattern not in _PRUNE:
        raise ValueError(f'pruning_masks: pattern must be "2:4" or "4:8", got {pattern!r}')
    pruned = jax.tree.map(lambda x: x, params)
    for name in PRUNED:
        kernel = params["blocks"][name]["kernel"]
        if kernel.shape[-2] % _MULTIPLES[pattern]:
            raise ValueError(f"pruning_masks: {name} has {kernel.shape[-2]} inputs, no multiple of {pattern[-1]}")
        pruned["blocks"][name]["kernel"] = _PRUNE[pattern](kernel, axis=kernel.ndim - 2)
    return masks_of(pruned)


def masks_of(params: Params) -> Any:
    """As `pruning_masks`, of parameters that were pruned: what is not 0."""
    masks = jax.tree.map(lambda _: None, params)
    for name in PRUNED:
        masks["blocks"][name]["kernel"] = params["blocks"][name]["kernel"] != 0
    return masks


def calibrated(
    graphdef: nnx.GraphDef,
    params: Params,
    images: np.ndarray,
    *,
    bits: int,
    observer: Observer = "percentile",
    percentile: float = 99.9,
) -> Pair:
    """Fake quantization whose activations have the ranges that they take on images [B, I, I, C], normalized.

    Raises:
      ValueError: bits that are neither 8 nor 4; activations that are not finite.
    """
    if bits not in (8, 4):
        raise ValueError(f"calibrated: bits must be 8 or 4, got {bits}")
    of_blocks, of_ends = jax.device_get(jax.jit(lambda p, x: nnx.merge(graphdef, p).observed(x))(params, images))

    def scale(name: str, values: np.ndarray, bits: int) -> float:
        if not np.any(values):
            return 0.0
        codes, seen = codes_of(name, bits), Range()
        seen.add(values)
        return seen.limit(observer, percentile=percentile, codes=codes) / codes.highest

    scales = {
        name: jnp.asarray([scale(name, layer, bits) for layer in values], jnp.float32)
        for name, values in of_blocks.items()
    }
    ends = {name: jnp.float32(scale(name, values, END_BITS)) for name, values in of_ends.items()}
    return Pair(FakeQuantized(scales, bits), FakeQuantized(ends, END_BITS))


def sparse(params: Params, dtype: DTypeLike) -> Pair:
    """Of parameters that were pruned to "2:4": floating products with what is kept."""
    kernels = {name: params["blocks"][name]["kernel"].astype(dtype) for name in PRUNED}
    weights = {
        name: jax.tree.map(lambda *parts: jnp.stack(parts), *map(Sparse24Weight.from_dense, kernel))
        for name, kernel in kernels.items()
    }
    return Pair(Sparse(weights))


def integers(params: Params, fake: Pair, pattern: Pattern | None, *, floating_attention: bool = False) -> Pair:
    """The integers of parameters that were trained under fake quantization, and pruned to a pattern if there is one."""
    bits, blocks, ends = fake.blocks.bits, {}, {}
    for name in PRUNED:
        kernel = params["blocks"][name]["kernel"]
        layers = [_integers(layer, bits, pattern) for layer in kernel]
        blocks[name] = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
    for name in ("patches", "head"):
        ends[name] = _integers(params[name]["kernel"], END_BITS, None)
    exact = Pair(_arithmetic(fake.blocks, blocks), _arithmetic(fake.ends, ends))
    return dataclasses.replace(exact, blocks=dataclasses.replace(exact.blocks, floating_attention=floating_attention))


def _integers(kernel: jax.Array, bits: int, pattern: Pattern | None) -> tuple[Any, jax.Array]:
    """The weight of a kernel [K, N] as models/arithmetic.py wants it, and scales [N]."""
    codes = Codes(bits)
    scale = qat.weight_scale(kernel, codes)
    w = qat.quantize(kernel, scale, codes).astype(jnp.int8)
    if pattern is None:
        return w.T, scale[0]
    return Sparse24Weight.from_dense(w, bits=4 if pattern == "4:8" and bits == 4 else None), scale[0]


def _arithmetic(fake: FakeQuantized, made: Mapping[str, tuple[Any, jax.Array]]) -> Integers:
    weights, scales = ({name: pair[i] for name, pair in made.items()} for i in range(2))
    return Integers(scales=fake.scales, bits=fake.bits, weights=weights, weight_scales=scales)


# --- Files ----------------------------------------------------------------------------------------------------


def save_compressed_vit(folder: str | Path, config: ViTConfig, params: Params, exact: Pair) -> int:
    """Writes config.json and model.safetensors, whole or not at all; returns the bytes of both.

    Norms, biases, tokens and positions stay as they are.

    Raises:
      CheckpointError: the folder holds something.
    """
    folder = Path(folder)
    check_free(folder, overwrite=False)
    tensors = {name: np.asarray(x) for name, x in flat_names(params) if name not in _kernels(exact)}
    kinds: dict[str, Any] = {}
    for part, arithmetic in (("blocks", exact.blocks), ("ends", exact.ends)):
        for name, scale in arithmetic.scales.items():
            tensors[f"{part}.activations.{name}"] = np.asarray(scale)
        for name, weight in arithmetic.weights.items():
            tensors[f"{part}.weights.{name}.scale"] = np.asarray(arithmetic.weight_scales[name])
            if isinstance(weight, Sparse24Weight):
                # In plain order, which is the same for all devices and has no padding.
                kinds[name] = {"bits": weight.bits}
                values, places = jax.vmap(Sparse24Weight.to_plain)(weight)
                tensors[f"{part}.weights.{name}.values"] = np.asarray(values)
                tensors[f"{part}.weights.{name}.places"] = _packed_places(np.asarray(places))
            else:
                tensors[f"{part}.weights.{name}.dense"] = _packed(np.asarray(weight), arithmetic.bits)
    description = {
        "model_type": "compressed_vit",
        "version": _VERSION,
        "vit": dataclasses.asdict(config),
        "bits": exact.blocks.bits,
        "sparse": kinds,
    }
    with whole_folder(folder) as new:
        write_json(new / "config.json", description)
        safetensors.numpy.save_file(tensors, new / _FILE)
    return sum((folder / name).stat().st_size for name in ("config.json", _FILE))


def load_compressed_vit(folder: str | Path, *, dtype: DTypeLike = jnp.float32) -> tuple[ViT, Pair]:
    """The model, whose matrices are empty, and the integers that it computes with: model(images, integers).

    Raises:
      CheckpointError: no such folder, another kind of model, tensors that are missing or damaged; names the file.
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    if values.get("model_type") != "compressed_vit" or values.get("version") != _VERSION:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type {values.get('model_type')!r}, version {values.get('version')!r}; "
            f"this reads compressed_vit, version {_VERSION}, which train.py --task=vit exports"
        )
    config = ViTConfig(**values["vit"])
    file = open_safetensors(folder / _FILE)
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    try:
        exact = Pair(_read(tensors, "blocks", values, values["bits"]), _read(tensors, "ends", values, END_BITS))
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{folder / _FILE} is damaged or incomplete: {error}; export it again") from error
    model = nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype))
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    kernels = _kernels(exact)
    filled = {
        name: jnp.zeros((config.num_layers, 0, 0) if name.startswith("blocks") else (0, 0), dtype)
        if name in kernels
        else jnp.asarray(tensors[name], dtype)
        for name, _ in flat_names(params)
    }
    nnx.replace_by_pure_dict(state, _nested(filled, params))
    return nnx.merge(graphdef, state), exact


def _read(tensors: Mapping[str, Any], part: str, values: Mapping[str, Any], bits: int) -> Integers:
    prefix = f"{part}.activations."
    scales = {name.removeprefix(prefix): jnp.asarray(x) for name, x in tensors.items() if name.startswith(prefix)}
    weights: dict[str, Any] = {}
    weight_scales: dict[str, jax.Array] = {}
    for name in PRUNED if part == "blocks" else ("patches", "head"):
        own = f"{part}.weights.{name}"
        weight_scales[name] = jnp.asarray(tensors[f"{own}.scale"])
        if kind := values["sparse"].get(name):
            kept = tensors[f"{own}.values"]
            places = _unpacked_places(tensors[f"{own}.places"])[:, : kept.shape[1]]
            layers = [
                Sparse24Weight.from_plain(*map(jnp.asarray, one), bits=kind["bits"])
                for one in zip(kept, places, strict=True)
            ]
            weights[name] = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
        else:
            weights[name] = jnp.asarray(_unpacked(tensors[f"{own}.dense"], bits))
    return Integers(scales=scales, bits=bits, weights=weights, weight_scales=weight_scales)


def _packed_places(places: np.ndarray) -> np.ndarray:
    """uint8 [L, kept / 4, N] of places [L, kept, N]: of two groups, two of four places each."""
    four = np.pad(places, ((0, 0), (0, -places.shape[1] % 4), (0, 0))).reshape(len(places), -1, 4, places.shape[2])
    return np.bitwise_or.reduce(four << np.arange(0, 8, 2, dtype=np.uint8)[:, None], axis=2)


def _unpacked_places(stored: np.ndarray) -> np.ndarray:
    four = stored[:, :, None] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    return four.reshape(len(stored), -1, stored.shape[-1])


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """int8 [..., K], or if the codes have 4 bits two in a byte: [..., K / 2], the first in its lower half."""
    return codes if bits == 8 else (codes[..., ::2] & 15) | (codes[..., 1::2] << 4)


def _unpacked(stored: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return stored
    return np.stack([(stored << 4) >> 4, stored >> 4], axis=-1).reshape(*stored.shape[:-1], -1)


def _kernels(exact: Pair) -> set[str]:
    """Names of the parameters that integers replace."""
    return {f"blocks.{name}.kernel" for name in exact.blocks.weights} | {
        f"{name}.kernel" for name in exact.ends.weights
    }


def flat_names(params: Params) -> list[tuple[str, Any]]:
    """Arrays of a nested dict, and their names, joined by dots."""
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    return [(".".join(str(part.key) for part in path), x) for path, x in paths]


def _nested(flat: Mapping[str, Any], like: Params) -> Any:
    return jax.tree.unflatten(jax.tree.structure(like), list(flat.values()))
