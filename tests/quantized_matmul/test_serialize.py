# SPDX-License-Identifier: Apache-2.0
"""Weights survive a file, and a file that cannot be a weight is refused by the name of the tensor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax

from pallas_kernels.quantized_matmul.serialize import from_tensors, to_tensors
from pallas_kernels.quantized_matmul.shapes import SHAPES, Shape


@pytest.mark.parametrize("name", ["mixed_5", "two_bits_3", "outliers_8", "int8_rows_8", "int4_3", "int2_17"])
def test_a_file_gives_back_the_weight(name, tmp_path):
    weight = SHAPES[name].make("float32", jax.random.key(0))["weight"]
    other = {"norm": jnp.ones(3)}
    safetensors.flax.save_file(to_tensors(weight, "layers.0.up") | other, tmp_path / "weights.safetensors")
    again = from_tensors(safetensors.flax.load_file(tmp_path / "weights.safetensors"), "layers.0.up")
    assert jax.tree.structure(again) == jax.tree.structure(weight)  # shape, bits, groups
    for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(weight), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


@pytest.fixture(scope="module")
def tensors():
    """Of a weight with two 4-bit strips of 7, an eighth of a chunk of padding and outliers."""
    weight = Shape(1, 20, 100, four_bit_strips=2, outliers=2).make("float32", jax.random.key(3))["weight"]
    return {name: np.array(array) for name, array in to_tensors(weight, "up").items()}


def cut(array):
    return array[:-1]


def put(index, value):
    def change(array):
        changed = array.copy()
        changed[index] = value
        return changed

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("main.words", cut, r"up.main.words of a weight \[K=100, N=20\] must have shape \(2, 256\), got \(1, 256\)."),
        ("main.words", lambda x: x.view(np.int32), "up.main.words must be uint32, got int32."),
        ("tail.steps", lambda x: x.astype(np.float32), "up.tail.steps must be bfloat16, got float32."),
        ("tail.stats", cut, r"up.tail.stats of a weight .* must have shape \(2, 64\)"),
        (
            "main.stats",
            put((1, 4 * 3), 0),
            "up.main.stats must have a scale code of 1 to 15 at output 19, strip 0, got 0.",
        ),
        (
            "main.stats",
            put((1, 4 * 4), 1),
            "up.main.stats must have scale code 0, for padding at output 20, strip 0, got 1",
        ),
        ("tail.stats", put((0, 3), 2), "up.tail.stats must have scale code 0, for padding at output 0, strip 3, got 2"),
        ("main.stats", lambda x: x | 1 << 10, "up.main.stats must have zeros below 4, got"),
        ("main.steps", put((0, 0), np.nan), "up.main.steps must be finite and above 0, got nan and 0 more"),
        ("tail.steps", put((0, 0), -1), "up.tail.steps must be finite and above 0, got -1.0"),
        ("tail_index", put(1, 7), "up.tail_index must be from 0 to 6, got 0 to 7."),
        ("tail_index", put(0, -1), "up.tail_index must be from 0 to 6, got -1 to"),
        ("tail_index", put(slice(0, 2), [5, 3]), r"up.tail_index must ascend and end in zeros, got \[5, 3, 0"),
        ("tail_index", lambda x: x.astype(np.int64).astype(np.uint32), "up.tail_index must be int32, got uint32."),
        ("shape", put(1, 40), r"up.main.words of a weight \[K=100, N=40\] must have shape \(3, 256\), got \(2, 256\)."),
        ("shape", put(0, 0), r"up.shape must be \[K, N\], both above 0, got \[0, 20\]."),
        ("outliers.columns", put(0, 100), "up.outliers.columns must be from 0 to 99 and ascend in each row."),
        ("outliers.columns", put(slice(0, 2), [5, 5]), "up.outliers.columns must be from 0 to 99 and ascend"),
        ("outliers.pointers", put(1, 50), "up.outliers.pointers must ascend from 0 to 40, the number of entries."),
        ("outliers.values", put(0, np.inf), "up.outliers.values must be finite."),
    ],
)
def test_a_changed_tensor_is_refused(tensors, name, change, message):
    from_tensors(tensors, "up")
    with pytest.raises((ValueError, TypeError), match=message):
        from_tensors(tensors | {f"up.{name}": change(tensors[f"up.{name}"])}, "up")


@pytest.mark.parametrize("name", ["shape", "main.words", "tail_index", "outliers.columns"])
def test_a_missing_tensor_is_named(tensors, name):
    rest = {key: array for key, array in tensors.items() if key != f"up.{name}"}
    with pytest.raises(ValueError, match=f"up.{name} is missing."):
        from_tensors(rest, "up")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("format", put(0, 3), r"int.format must be \[2, 4 or 8; a group size or 0; 0 or 8\], got \[3, 64, 0\]."),
        ("format", put(1, 32), r"int.scale of a weight \[K=100, N=16\] must have shape \(4, 16\), got \(2, 16\)."),
        ("zero", put((0, 0), 4), "int.zero must be below 4, got 4."),
        ("scale", put((1, 3), 0), "int.scale must be finite and above 0, got 0.0"),
    ],
)
def test_a_changed_integer_weight_is_refused(name, change, message):
    weight = SHAPES["int2_17"].make("float32", jax.random.key(3))["weight"]
    tensors = {key: np.array(array) for key, array in to_tensors(weight, "int").items()}
    with pytest.raises(ValueError, match=message):
        from_tensors(tensors | {f"int.{name}": change(tensors[f"int.{name}"])}, "int")
