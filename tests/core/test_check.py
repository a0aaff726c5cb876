# SPDX-License-Identifier: Apache-2.0
import pytest

from pallas_kernels.core.check import Axes, check_dtype, check_same_dtype, short_dtype


def test_letters_are_bound_once_and_shown_in_errors():
    axes = Axes("op")
    axes.bind("x", (3, 5), "m k")
    axes.bind("w", (5, 7), "k n")
    assert dict(axes) == {"m": 3, "k": 5, "n": 7}
    with pytest.raises(ValueError, match="op: b must have shape \\[n\\] with n=7, got \\(5,\\)") as caught:
        axes.bind("b", (5,), "n")
    assert str(caught.value).endswith("axes so far: m=3 (x), k=5 (x), n=7 (w)")


def test_one_letter_twice_in_one_shape_must_agree():
    with pytest.raises(ValueError, match="square must have shape"):
        Axes("op").bind("square", (3, 4), "n n")


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 7), (1, 7), (3, 1)])
def test_broadcastable_shapes_pass(shape):
    axes = Axes("op")
    axes.bind("x", (3, 7), "m n")
    axes.bind_broadcast("bias", shape, "m n")


@pytest.mark.parametrize("shape", [(3,), (7, 3), (1, 3, 7), (2, 7)])
def test_other_shapes_do_not(shape):
    axes = Axes("op")
    axes.bind("x", (3, 7), "m n")
    with pytest.raises(ValueError, match="bias must be broadcastable to \\[m, n\\] = \\[m=3, n=7\\]"):
        axes.bind_broadcast("bias", shape, "m n")


def test_dtypes():
    check_dtype("op", "x", "bfloat16", ["bfloat16", "float32"])
    with pytest.raises(TypeError, match="op: x must be one of bfloat16, got float32"):
        check_dtype("op", "x", "float32", ["bfloat16"])
    with pytest.raises(TypeError, match="x, w must have one dtype, got x float32, w bfloat16"):
        check_same_dtype("op", {"x": "float32", "w": "bfloat16"})
    assert [short_dtype(d) for d in ("float32", "bfloat16", "int8", "uint4", "bool", "float8_e5m2")] == [
        "f32", "bf16", "s8", "u4", "bool", "f8_e5m2",
    ]  # fmt: skip
