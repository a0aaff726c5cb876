# SPDX-License-Identifier: Apache-2.0
"""What the driver must know of an operation, one entry each."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from benchmarks.baselines import Arguments
from pallas_kernels.flash_attention import reference as flash_attention_reference
from pallas_kernels.flash_attention import shapes as flash_attention_shapes


@dataclasses.dataclass(frozen=True)
class Operation:
    """One public function.

    Attributes:
      function: takes the arguments of a shape by name, and `implementation=`.
      shapes: name -> shape with make(dtype, key), flops(direction), mask_name and large.
      differentiable: the arguments that "forward_backward" takes gradients of.
      specification: (arguments) -> what it must be; for shapes that are not large.
      naive: (arguments) -> what the naive way makes of it in the arguments' precision.
      memory_bound: whether to rotate the arguments so that none is found in the cache.
    """

    function: Callable
    shapes: Mapping[str, Any]
    differentiable: tuple[str, ...]
    specification: Callable[[Arguments], jax.Array]
    naive: Callable[[Arguments], jax.Array]
    memory_bound: bool = False


def _attention_specification(arguments: Arguments) -> jax.Array:
    out, _ = flash_attention_reference.attention(**{"scale": arguments["query"].shape[-1] ** -0.5, **arguments})
    return out


def _attention_naive(arguments: Arguments) -> jax.Array:
    names = ("query", "key", "value", "bias", "sink", "mask")
    scale = arguments.get("scale", arguments["query"].shape[-1] ** -0.5)
    naive: Any = flash_attention_reference.naive
    out, _ = naive(*(arguments.get(name) for name in names), scale, arguments.get("soft_cap"))
    return out


OPERATIONS: dict[str, Operation] = {
    "flash_attention": Operation(
        function=pallas_kernels.flash_attention,
        shapes=flash_attention_shapes.SHAPES,
        differentiable=("query", "key", "value"),
        specification=_attention_specification,
        naive=_attention_naive,
    ),
}


def is_array(leaf: Any) -> bool:
    """Whether a leaf of the arguments is data; numbers, flags and None are part of the program."""
    return isinstance(leaf, jax.Array)


def split(arguments: Arguments) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Arguments]]:
    """The arrays of a call, and the function that puts others in their place."""
    leaves, structure = jax.tree.flatten(arguments)
    arrays = [leaf for leaf in leaves if is_array(leaf)]

    def join(arrays: list[jax.Array]) -> Arguments:
        replacements = iter(arrays)
        return structure.unflatten([next(replacements) if is_array(leaf) else leaf for leaf in leaves])

    return arrays, join


def directed(
    function: Callable[[Arguments], jax.Array], arguments: Arguments, direction: str, differentiable: tuple[str, ...]
) -> tuple[Callable[..., Any], list[jax.Array]]:
    """A call as a function of arrays alone, and these arrays.

    Args:
      direction: "forward" returns the output; "forward_backward" the output and the gradients of the arguments in
        `differentiable` for a random cotangent.
    """
    arrays, join = split(arguments)
    if direction == "forward":
        return lambda *arrays: function(join(list(arrays))), arrays
    if direction != "forward_backward":
        raise ValueError(f'direction must be "forward" or "forward_backward", got {direction!r}')

    shape = jax.eval_shape(lambda *arrays: function(join(list(arrays))), *arrays).shape
    # Eighths between -2 and 2: the same numbers in every precision.
    cotangent = jax.random.randint(jax.random.key(1), shape, -16, 17, jnp.int32).astype(jnp.bfloat16) / 8

    def both(cotangent: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        arguments = join(list(arrays))
        inputs = tuple(arguments[name] for name in differentiable)
        out, pullback = jax.vjp(
            lambda *inputs: function({**arguments, **dict(zip(differentiable, inputs, strict=True))}), *inputs
        )
        return out, pullback(cotangent.astype(out.dtype))

    return both, [cotangent, *arrays]
