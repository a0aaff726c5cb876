# SPDX-License-Identifier: Apache-2.0
"""Shape and dtype checks in axis letters, and the error that an implementation's refusal becomes."""

import math
import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp


class UnsupportedError(ValueError):
    """A call that the named implementation cannot run; the text says why, which call, and what to try."""


class Axes(dict[str, int]):
    """Axis letters bound so far in one call, each with the argument that bound it.

    >>> axes = Axes("flash_attention")
    >>> axes.bind("query", (2, 128, 8, 64), "B T N H")
    >>> axes.bind("key", (2, 256, 8, 32), "B S K H")
    Traceback (most recent call last):
      ...
    ValueError: flash_attention: key must have shape [B, S, K, H] with B=2, H=64, got (2, 256, 8, 32).
      axes so far: B=2 (query), T=128 (query), N=8 (query), H=64 (query)
    """

    def __init__(self, op: str):
        super().__init__()
        self.op = op
        self.origin: dict[str, str] = {}

    def bind(self, name: str, shape: tuple[int, ...], letters: str) -> None:
        """Matches `shape` with the letters, binding new ones; a conflict is a ValueError that shows both."""
        wanted = letters.split()
        fixed = [x for x in wanted if x in self]
        sizes = {**dict(zip(wanted, shape, strict=False)), **self}
        if len(shape) != len(wanted) or any(sizes[x] != n for x, n in zip(wanted, shape, strict=True)):
            known = ", ".join(f"{x}={self[x]}" for x in fixed)
            rule = f"[{', '.join(wanted)}]" + (f" with {known}" if known else "")
            self.fail(name, rule, shape)
        for letter, size in zip(wanted, shape, strict=True):
            if letter not in self:
                self[letter], self.origin[letter] = size, name

    def bind_broadcast(self, name: str, shape: tuple[int, ...], letters: str) -> None:
        """Like `bind` for an array broadcast from the right: fewer axes and axes of size 1 are allowed."""
        wanted = letters.split()
        tail = wanted[len(wanted) - len(shape) :]
        if len(shape) > len(wanted) or any(n not in (1, self[x]) for x, n in zip(tail, shape, strict=True)):
            sizes = ", ".join(f"{x}={self[x]}" for x in wanted)
            self.fail(name, f"broadcastable to [{', '.join(wanted)}] = [{sizes}]", shape)

    def check_not_empty(self) -> None:
        """ValueError if an axis bound so far has size 0."""
        if empty := [letter for letter, size in self.items() if size == 0]:
            listed = ", ".join(f"{letter}=0 ({self.origin[letter]})" for letter in empty)
            raise ValueError(f"{self.op}: {listed}; every axis needs a size > 0.")

    def fail(self, name: str, rule: str, shape: tuple[int, ...]) -> None:
        verb = "be" if rule.startswith("broadcastable") else "have shape"
        bound = ", ".join(f"{x}={n} ({self.origin[x]})" for x, n in self.items()) or "none"
        raise ValueError(f"{self.op}: {name} must {verb} {rule}, got {tuple(shape)}.\n  axes so far: {bound}")


def check_dtype(op: str, name: str, dtype, allowed: Iterable[str]) -> None:
    """TypeError unless `dtype` is one of the allowed names."""
    allowed = tuple(allowed)
    if jnp.dtype(dtype).name not in allowed:
        raise TypeError(f"{op}: {name} must be one of {', '.join(allowed)}, got {jnp.dtype(dtype).name}.")


def check_same_dtype(op: str, dtypes: Mapping[str, Any]) -> None:
    """TypeError unless all the named arrays have one dtype."""
    names = {name: jnp.dtype(dtype).name for name, dtype in dtypes.items()}
    if len(set(names.values())) > 1:
        listed = ", ".join(f"{k} {v}" for k, v in names.items())
        raise TypeError(f"{op}: {', '.join(names)} must have one dtype, got {listed}; cast them with .astype(...).")


def check_number(op: str, name: str, value: Any, hint: str = "") -> float:
    """TypeError unless `value` is a finite Python number; arrays would have to be traced, and kernels fold these in."""
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise TypeError(f"{op}: {name} must be a finite Python number, got {value!r}{hint}.")
    return float(value)


def check_floating(op: str, name: str, array: Any, hint: str = "") -> None:
    """TypeError unless `array` is of floating point."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{op}: {name} must be floating point, got {array.dtype}{hint}.")


_SHORT = {"float": "f", "bfloat": "bf", "uint": "u", "int": "s"}


def short_dtype(dtype) -> str:
    """The field's short name: bf16, f32, s8, u4, bool, f8_e4m3fn.

    >>> short_dtype("bfloat16"), short_dtype("int8"), short_dtype("float8_e4m3fn")
    ('bf16', 's8', 'f8_e4m3fn')
    """
    name = jnp.dtype(dtype).name
    match = re.match(r"(bfloat|float|uint|int)(\d.*)", name)
    return _SHORT[match[1]] + match[2] if match else name
