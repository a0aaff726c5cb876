# SPDX-License-Identifier: Apache-2.0
"""Weights as named arrays, for files of safetensors, and back, with every array looked at.

layer.main.words  layer.main.stats  layer.main.steps      layer.tail.*   layer.tail_index   layer.outliers.*
layer.words  layer.scale  layer.zero                layer.format = [bits, group_size, activation_bits], 0 for None
layer.shape = [K, N]
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul import packing
from pallas_kernels.quantized_matmul.weights import IntWeight, MixedBitWeight, Outliers, Plane, Weight


def to_tensors(weight: Weight, prefix: str) -> dict[str, jax.Array]:
    """The arrays of a weight by name, each name beginning with `prefix` and a dot.

    >>> from pallas_kernels import quantize
    >>> sorted(to_tensors(quantize(jnp.ones((32, 16)), "int8"), "up"))
    ['up.format', 'up.scale', 'up.shape', 'up.words']
    """
    tensors = weight.tensors() | {"shape": jnp.asarray(weight.shape, jnp.int32)}
    if isinstance(weight, IntWeight):
        numbers = weight.bits, weight.group_size or 0, weight.activation_bits or 0
        tensors["format"] = jnp.asarray(numbers, jnp.int32)
    return {f"{prefix}.{name}": array for name, array in tensors.items()}


def from_tensors(tensors: Mapping[str, Any], prefix: str) -> Weight:
    """The weight that `to_tensors` made these of; tensors of other prefixes are left alone.

    Raises:
      ValueError, TypeError: a tensor is missing, or its shape, dtype or values cannot be those of a weight; its name
        is in the message.
    """
    found = _Tensors(tensors, prefix)
    K, N = (int(x) for x in found.integers("shape", 2, "K, N"))
    if K < 1 or N < 1:
        raise ValueError(f"{prefix}.shape must be [K, N], both above 0, got [{K}, {N}].")
    weight = _integers(found, (K, N)) if f"{prefix}.format" in tensors else _mixed(found, (K, N))
    weight.check(f"{prefix}.")
    _check_integers(weight, prefix) if isinstance(weight, IntWeight) else _check_mixed(weight, prefix)
    return weight


class _Tensors:
    def __init__(self, tensors: Mapping[str, Any], prefix: str):
        self.tensors, self.prefix = tensors, prefix

    def __call__(self, name: str) -> jax.Array:
        full = f"{self.prefix}.{name}"
        if full not in self.tensors:
            raise ValueError(f"{full} is missing.")
        return jnp.asarray(self.tensors[full])

    def integers(self, name: str, count: int, what: str) -> np.ndarray:
        array = np.asarray(self(name))
        if array.shape != (count,) or array.dtype != np.int32:
            raise ValueError(f"{self.prefix}.{name} must be int32 [{what}], got {array.dtype} {array.shape}.")
        return array


def _integers(found: _Tensors, shape: tuple[int, int]) -> IntWeight:
    bits, group_size, activation_bits = (int(x) for x in found.integers("format", 3, "bits, group, activation"))
    if bits not in packing.BITS or group_size < 0 or activation_bits not in (0, 8):
        raise ValueError(
            f"{found.prefix}.format must be [2, 4 or 8; a group size or 0; 0 or 8], "
            f"got [{bits}, {group_size}, {activation_bits}]."
        )
    zero = found("zero") if bits == 2 else None
    return IntWeight(found("words"), found("scale"), zero, shape, bits, group_size or None, activation_bits or None)


def _mixed(found: _Tensors, shape: tuple[int, int]) -> MixedBitWeight:
    main, tail = (Plane(*(found(f"{p}.{name}") for name in ("words", "stats", "steps"))) for p in ("main", "tail"))
    outliers = None
    if f"{found.prefix}.outliers.values" in found.tensors:
        outliers = Outliers(*(found(f"outliers.{name}") for name in ("values", "columns", "pointers")))
    return MixedBitWeight(main, tail, found("tail_index"), shape, outliers)


def _check_integers(weight: IntWeight, prefix: str) -> None:
    N = weight.shape[1]
    _check_positive(np.asarray(weight.scale)[:, :N], f"{prefix}.scale")
    if np.asarray(weight.scale)[:, N:].any():
        raise ValueError(f"{prefix}.scale must be 0 in the rows of padding.")
    if weight.zero is not None and (largest := int(np.max(weight.zero))) > 3:
        raise ValueError(f"{prefix}.zero must be below 4, got {largest}.")


def _check_mixed(weight: MixedBitWeight, prefix: str) -> None:
    index, S = np.asarray(weight.tail_index), weight.strips
    if ((index < 0) | (index >= S)).any():
        raise ValueError(f"{prefix}.tail_index must be from 0 to {S - 1}, got {index.min()} to {index.max()}.")
    count = int(np.sum(weight.four_bit_strips()))
    if (np.diff(index[:count]) <= 0).any() or index[count:].any():
        raise ValueError(f"{prefix}.tail_index must ascend and end in zeros, got {index.tolist()}.")
    for name, plane, strips in (("main", weight.main, S), ("tail", weight.tail, count)):
        _check_plane(plane, strips, weight.shape[1], f"{prefix}.{name}")
    if weight.outliers is not None:
        _check_outliers(weight.outliers, weight.shape[0], f"{prefix}.outliers")


def _check_plane(plane: Plane, strips: int, N: int, name: str) -> None:
    scale_codes, zeros = (np.asarray(part) for part in packing.unpack_stats(plane.stats))
    real = np.zeros(scale_codes.shape, bool)
    real[:N, :strips] = True
    if (wrong := np.argwhere((scale_codes > 0) != real)).size:
        n, s = wrong[0]
        rule = "a scale code of 1 to 15" if real[n, s] else "scale code 0, for padding"
        raise ValueError(f"{name}.stats must have {rule} at output {n}, strip {s}, got {scale_codes[n, s]}.")
    if (largest := int(zeros.max(initial=0))) > 3:
        raise ValueError(f"{name}.stats must have zeros below 4, got {largest}.")
    _check_positive(np.asarray(packing.from_memory(plane.steps))[:, :strips], f"{name}.steps")


def _check_outliers(outliers: Outliers, K: int, name: str) -> None:
    pointers, columns = np.asarray(outliers.pointers), np.asarray(outliers.columns).astype(np.int64)
    if pointers[0] != 0 or pointers[-1] != len(columns) or (np.diff(pointers) < 0).any():
        raise ValueError(f"{name}.pointers must ascend from 0 to {len(columns)}, the number of entries.")
    first_of_row = np.isin(np.arange(1, len(columns)), pointers)
    if (columns < 0).any() or (columns >= K).any() or ((np.diff(columns) <= 0) & ~first_of_row).any():
        raise ValueError(f"{name}.columns must be from 0 to {K - 1} and ascend in each row.")
    if not np.isfinite(np.asarray(outliers.values).astype(np.float32)).all():
        raise ValueError(f"{name}.values must be finite.")


def _check_positive(array: np.ndarray, name: str) -> None:
    wide = array.astype(np.float32)
    if not ((wide > 0) & np.isfinite(wide)).all():
        bad = wide[~((wide > 0) & np.isfinite(wide))]
        raise ValueError(f"{name} must be finite and above 0, got {bad[0]} and {len(bad) - 1} more that are not.")
