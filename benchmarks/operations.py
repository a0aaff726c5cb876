# SPDX-License-Identifier: Apache-2.0
"""What the driver must know of an operation, one entry each."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels import masks
from pallas_kernels.core import device as device_lib
from pallas_kernels.core.arrays import arrays_of, with_arrays
from pallas_kernels.decode_attention import reference as decode_attention_reference
from pallas_kernels.decode_attention import shapes as decode_attention_shapes
from pallas_kernels.flash_attention import api as flash_attention_api
from pallas_kernels.flash_attention import config as flash_attention_config
from pallas_kernels.flash_attention import reference as flash_attention_reference
from pallas_kernels.flash_attention import shapes as flash_attention_shapes
from pallas_kernels.flat_gemm import api as flat_gemm_api
from pallas_kernels.flat_gemm import config as flat_gemm_config
from pallas_kernels.flat_gemm import reference as flat_gemm_reference
from pallas_kernels.flat_gemm import shapes as flat_gemm_shapes
from pallas_kernels.quantized_matmul import reference as quantized_matmul_reference
from pallas_kernels.quantized_matmul import shapes as quantized_matmul_shapes
from pallas_kernels.sparse_matmul import reference as sparse_matmul_reference
from pallas_kernels.sparse_matmul import shapes as sparse_matmul_shapes

Arguments = dict[str, Any]
# Where something lies in an array: an index that NumPy takes.
Index = Any
EVERYTHING: Index = ...


@dataclasses.dataclass(frozen=True)
class Sample:
    """A smaller call whose results are a part of a large one's: small enough for the specification.

    Attributes:
      name: for messages.
      arguments: of the smaller call.
      output: where its output lies in that of the large call.
      gradients: where its gradients lie in those of the large call, one for each differentiable argument; None for
        one that the rest of the large call takes part in.
    """

    name: str
    arguments: Arguments
    output: Index
    gradients: tuple[Index | None, ...]


@dataclasses.dataclass(frozen=True)
class Operation:
    """One public function.

    Attributes:
      function: takes the arguments of a shape by name, and `implementation=`.
      shapes: name -> shape with make(dtype, key), flops(direction, mask), mask_name and large.
      differentiable: the arguments that "forward_backward" takes gradients of; () if it has none.
      specification: (arguments) -> what it must be.
      naive: (arguments) -> what the naive way makes of it in the arguments' precision.
      samples: (arguments) -> the parts of a large call that are held to the specification.
      config: (arguments, implementation, variant) -> the configuration that makes an implementation's kernels for that
        architecture, or of that route, run here; None if all have one set of kernels.
      memory_bound: whether to rotate the arguments so that none is found in the cache.
    """

    function: Callable
    shapes: Mapping[str, Any]
    differentiable: tuple[str, ...]
    specification: Callable[[Arguments], jax.Array]
    naive: Callable[[Arguments], jax.Array]
    samples: Callable[[Arguments], list[Sample]]
    config: Callable[[Arguments, str, str], Any] | None = None
    memory_bound: bool = False


def attention_samples(arguments: Arguments, rows: int = 32) -> list[Sample]:
    """Two cuts through an attention call, each exact where it looks.

    All rows and keys of one batch element and one group of heads: output and all gradients. And some rows, the first
    and the last among them, of every head: output and gradient of the query. Together they meet every program that a
    kernel can be cut into along batch, heads and rows.
    """
    query, key = arguments["query"], arguments["key"]
    (B, T, N, _), (S, K) = query.shape, key.shape[1:3]
    mask: masks.Mask | None = arguments.get("mask")
    # The last of the batch: a kernel that walks over it has done all the others before.
    b, k, group = B - 1, K // 2, N // K
    batch, heads, kv_heads = slice(b, b + 1), slice(k * group, (k + 1) * group), slice(k, k + 1)
    one: Arguments = {
        **arguments,
        "query": query[batch, :, heads],
        "key": key[batch, :, kv_heads],
        "value": arguments["value"][batch, :, kv_heads],
    }
    chosen = np.random.default_rng(0).choice(T, min(rows, T), replace=False)
    chosen = np.unique([0, *chosen, T - 1]).astype(np.int32)
    some: Arguments = {**arguments, "query": query[:, chosen]}
    if mask is not None:
        one["mask"] = masks.Dense(_cut(mask.as_array(T, S), batch, heads))
        some["mask"] = masks.Dense(jnp.asarray(mask.allowed(chosen, np.arange(S, dtype=np.int32), T, S)))
    if (bias := arguments.get("bias")) is not None:
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
        one["bias"] = _cut(bias, batch, heads)
        some["bias"] = bias if bias.shape[2] == 1 else bias[:, :, chosen]
    if (sink := arguments.get("sink")) is not None:
        one["sink"] = sink[heads]
    return [
        Sample(
            f"batch {b}, heads {heads.start} to {heads.stop - 1}",
            one,
            np.s_[batch, :, heads],
            (np.s_[batch, :, heads], np.s_[batch, :, kv_heads], np.s_[batch, :, kv_heads]),
        ),
        Sample(f"{len(chosen)} rows", some, np.s_[:, chosen], (np.s_[:, chosen], None, None)),
    ]


def decode_samples(arguments: Arguments) -> list[Sample]:
    """The first and the last sequence, a group of heads of each."""
    query, paged = arguments["query"], arguments.get("page_table") is not None
    B, N, K = len(query), query.shape[-2], arguments["key"].shape[2]
    samples = []
    for b, k in {(0, K - 1), (B - 1, 0)}:
        batch, head, heads = slice(b, b + 1), slice(k, k + 1), slice(k * (N // K), (k + 1) * (N // K))
        one = {**arguments, "query": query[batch, ..., heads, :], "lengths": arguments["lengths"][batch]}
        for name in ("key", "value"):
            one[name] = arguments[name][slice(None) if paged else batch, :, head]
        if paged:
            one["page_table"] = arguments["page_table"][batch]
        cuts = {"sink": heads, "key_scale": head, "value_scale": head}
        one |= {name: arguments[name][cut] for name, cut in cuts.items() if name in arguments}
        samples.append(Sample(f"sequence {b}, key head {k}", one, np.s_[batch, ..., heads, :], ()))
    return samples


def gemm_samples(arguments: Arguments, columns: int = 96) -> list[Sample]:
    """Two cuts through a product, each exact where it looks.

    Some columns of the weight, the first and the last among them: output of every row, and gradient of these columns.
    And the first and the last row: output and gradient of x, in which all columns take part.
    """
    x, w = arguments["x"], arguments["w"]
    leading: Index = (slice(None),) * (x.ndim - 1)
    axis = 0 if arguments["transpose_w"] else 1
    N, halves = w.shape[axis], 2 if arguments["activation"] == "swiglu" else 1
    O = N // halves
    chosen = np.random.default_rng(0).choice(O, min(columns, O), replace=False)
    chosen = np.unique([0, *chosen, O - 1]).astype(np.int32)
    # Gate and up of the same output.
    of_weight = np.concatenate([chosen + half * O for half in range(halves)])
    cuts: dict[str, Index] = {
        "w": np.s_[of_weight] if axis == 0 else np.s_[:, of_weight],
        "bias": np.s_[of_weight],
        "residual": (*leading, chosen),
    }
    some = arguments | {name: arguments[name][cut] for name, cut in cuts.items() if name in arguments}
    rows = np.unique([0, x.shape[-2] - 1])
    ends: Index = (*leading[:-1], rows)
    two = arguments | {name: arguments[name][ends] for name in ("x", "residual") if name in arguments}
    return [
        Sample(f"{len(chosen)} columns", some, (*leading, chosen), (None, cuts["w"])),
        Sample(f"rows {', '.join(map(str, rows))}", two, ends, (ends, None)),
    ]


def whole(arguments: Arguments) -> list[Sample]:
    """All of a call whose specification takes no more memory than a weight in float32."""
    return [Sample("", arguments, EVERYTHING, ())]


def gemm_config(arguments: Arguments, implementation: str, route: str) -> flat_gemm_config.Config:
    """See `Operation.config`; ValueError if the implementation has no such route."""
    if implementation != "mosaic_gpu":
        raise ValueError(f'{implementation!r} has no route {route!r}; "mosaic_gpu" has, "A" and "B".')
    return flat_gemm_config.for_route(flat_gemm_api.describe(**arguments), device_lib.current(), route)


def attention_config(arguments: Arguments, implementation: str, arch: str) -> flash_attention_config.Config:
    """See `Operation.config`; ValueError if the implementation has no kernels for that architecture."""
    call = flash_attention_api.describe(**{**arguments, "mask": masks.as_mask(arguments.get("mask"))})
    return flash_attention_config.for_arch(call, device_lib.current(), implementation, arch)


def _cut(array: jax.Array, batch: slice, heads: slice) -> jax.Array:
    """[B|1, N|1, ...] at a part of batch and heads."""
    return array[batch if array.shape[0] > 1 else slice(None), heads if array.shape[1] > 1 else slice(None)]


OPERATIONS: dict[str, Operation] = {
    "flash_attention": Operation(
        function=pallas_kernels.flash_attention,
        shapes=flash_attention_shapes.SHAPES,
        differentiable=("query", "key", "value"),
        specification=lambda arguments: flash_attention_reference.specified(arguments)[0],
        naive=lambda arguments: flash_attention_reference.naively(arguments)[0],
        samples=attention_samples,
        config=attention_config,
    ),
    "decode_attention": Operation(
        function=pallas_kernels.decode_attention,
        shapes=decode_attention_shapes.SHAPES,
        differentiable=(),
        specification=lambda arguments: decode_attention_reference.specified(arguments)[0],
        naive=lambda arguments: decode_attention_reference.naively(arguments)[0],
        samples=decode_samples,
        memory_bound=True,
    ),
    "flat_gemm": Operation(
        function=pallas_kernels.flat_gemm,
        shapes=flat_gemm_shapes.SHAPES,
        differentiable=("x", "w"),
        specification=flat_gemm_reference.specified,
        naive=flat_gemm_reference.naively,
        samples=gemm_samples,
        config=gemm_config,
        memory_bound=True,
    ),
    "quantized_matmul": Operation(
        function=pallas_kernels.quantized_matmul,
        shapes=quantized_matmul_shapes.SHAPES,
        differentiable=(),
        specification=quantized_matmul_reference.specified,
        naive=quantized_matmul_reference.naively,
        samples=whole,
        memory_bound=True,
    ),
    "sparse_matmul": Operation(
        function=pallas_kernels.sparse_matmul,
        shapes=sparse_matmul_shapes.SHAPES,
        differentiable=(),
        specification=sparse_matmul_reference.specified,
        naive=sparse_matmul_reference.naively,
        samples=whole,
        memory_bound=True,
    ),
}


def cotangent_like(shape: tuple[int, ...]) -> jax.Array:
    """The cotangent that every way to run a call is given: eighths between -2 and 2, exact in every precision."""
    return jax.random.randint(jax.random.key(1), shape, -16, 17, jnp.int32).astype(jnp.bfloat16) / 8


def directed(
    function: Callable[[Arguments], jax.Array],
    arguments: Arguments,
    direction: str,
    differentiable: tuple[str, ...],
    cotangent: jax.Array | None = None,
) -> tuple[Callable[..., Any], list[jax.Array]]:
    """A call as a function of arrays alone, and these arrays.

    Args:
      direction: "forward" returns the output; "forward_backward" the output and the gradients of the arguments in
        `differentiable`.
      cotangent: of the output; None is `cotangent_like` it.
    """
    arrays = arrays_of(arguments)
    if direction == "forward":
        return lambda *arrays: function(with_arrays(arguments, arrays)), arrays
    if direction != "forward_backward":
        raise ValueError(f'direction must be "forward" or "forward_backward", got {direction!r}')
    if cotangent is None:
        cotangent = cotangent_like(output_of(function, arguments).shape)

    def both(cotangent: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        given = with_arrays(arguments, arrays)
        inputs = tuple(given[name] for name in differentiable)
        out, pullback = jax.vjp(
            lambda *inputs: function({**given, **dict(zip(differentiable, inputs, strict=True))}), *inputs
        )
        return out, pullback(cotangent.astype(out.dtype))

    return both, [cotangent, *arrays]


def output_of(function: Callable[[Arguments], jax.Array], arguments: Arguments) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the output of a call, without running it."""
    return jax.eval_shape(lambda *arrays: function(with_arrays(arguments, arrays)), *arrays_of(arguments))
