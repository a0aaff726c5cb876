# SPDX-License-Identifier: Apache-2.0
"""quantized_matmul by XLA: any call, any device; and the gradient of every implementation.

Outputs are taken a block at a time. Its weights are decoded from their words to the dtype of x, multiplied, and
forgotten, so that no more than a block of them is ever there in more bits than they are stored in:

    for each block of outputs n:     w[n, :] = decode(words[n, :])     z[:, n] = x w[n, :]^T
    gradient:                        w[n, :] = decode(words[n, :])     dx += dz[:, n] w[n, :]

Weights with one scale for each output stay integers, which bfloat16 holds exactly, and z is scaled; with
`activation_bits=8` x is made of integers too, and their products are summed in int32. float16 could not hold small
weights and is multiplied as float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.core.activations import ACTIVATIONS
from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.core.varying import vary_like
from pallas_kernels.quantized_matmul.packing import ROWS, round_up
from pallas_kernels.quantized_matmul.reference import quantize_rows
from pallas_kernels.quantized_matmul.weights import IntWeight, Weight

BLOCK_WEIGHTS = 2**22  # 8 MB in bfloat16: they stay in the caches of a large GPU, and a step is long enough


def supports(call: Call, device: Device) -> Refusal | None:
    return None


def forward(
    x: jax.Array, weight: Weight, bias: jax.Array | None, *, activation: str | None, config: None = None
) -> jax.Array:
    """[M, N] (N / 2 for swiglu) in the dtype of x, of x [M, K]."""
    return ACTIVATIONS[activation](_affine(x, weight, bias)).astype(x.dtype)


def backward(
    x: jax.Array, weight: Weight, bias: jax.Array | None, dout: jax.Array, *, activation: str | None
) -> tuple[jax.Array, jax.Array | None]:
    """Gradients of x and bias, for that of the output. The rounding of x by activation_bits has gradient 1."""
    dz = dout.astype(jnp.promote_types(x.dtype, jnp.float32))
    if activation is not None:
        (dz,) = jax.vjp(ACTIVATIONS[activation], _affine(x, weight, bias))[1](dz)
    dbias = None if bias is None else jnp.sum(dz, 0).astype(bias.dtype)
    return _transposed(dz, weight, _operand(x.dtype)).astype(x.dtype), dbias


def _affine(x: jax.Array, weight: Weight, bias: jax.Array | None) -> jax.Array:
    """x w + bias, [M, N] in float32 (float64)."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    N = round_up(weight.shape[1], ROWS)
    integers = isinstance(weight, IntWeight) and weight.activation_bits == 8
    factor, x_scale = quantize_rows(x) if integers else (x.astype(_operand(x.dtype)), None)

    def block(start, count: int, fresh, z: jax.Array) -> jax.Array:
        w, scale = _operands(weight, start, count, factor.dtype)
        # The weight is the tall operand: CPUs then sum over K in vectors, and rows of z are written in one piece.
        part = _product(w, factor, 1, jnp.int32 if integers else dtype).astype(dtype)
        part = part if scale is None else part * scale.astype(dtype)
        return lax.dynamic_update_slice_in_dim(z, part, start, 0)

    z = _over_blocks(weight, block, vary_like(jnp.zeros((N, len(x)), dtype), (x, weight)))[: weight.shape[1]].T
    z = z if x_scale is None else z * x_scale.astype(dtype)
    return z if bias is None else z + bias.astype(dtype)


def _transposed(dz: jax.Array, weight: Weight, operand) -> jax.Array:
    """dz w^T, [M, K] in the dtype of dz; factors are multiplied in `operand`."""
    K, N = weight.shape
    dz = jnp.pad(dz, ((0, 0), (0, -N % ROWS)))

    def block(start, count: int, fresh, dx: jax.Array) -> jax.Array:
        w, scale = _operands(weight, start, count, operand)
        part = jnp.where(fresh, lax.dynamic_slice_in_dim(dz, start, count, 1), 0)
        part = part if scale is None else part * scale.T.astype(dz.dtype)
        return dx + _product(part.astype(operand), w, 0, dz.dtype)

    return _over_blocks(weight, block, vary_like(jnp.zeros((len(dz), K), dz.dtype), (dz, weight)))


def _operand(dtype) -> jnp.dtype:
    return jnp.dtype(dtype) if dtype == jnp.bfloat16 else jnp.promote_types(dtype, jnp.float32)


def _operands(weight: Weight, start, count: int, dtype) -> tuple[jax.Array, jax.Array | None]:
    """Weights [count, K] in `dtype`, and what their products are multiplied by, [count, 1] or None."""
    if isinstance(weight, IntWeight) and weight.group_size is None:
        return weight.integers(start, count).astype(dtype), weight.scales(start, count)
    return weight.decode(dtype, start, count), None


def _over_blocks(weight: Weight, block: Callable, carry: jax.Array) -> jax.Array:
    """carry = block(start, count, fresh, carry) over all outputs. The last block begins early enough to be whole: which
    of its outputs no other block has had is `fresh`, bool [count]."""
    K, N = weight.shape[0], round_up(weight.shape[1], ROWS)
    count = max(ROWS, BLOCK_WEIGHTS // K // ROWS * ROWS)
    if count >= N:
        return block(0, N, True, carry)

    def step(i, carry):
        start = jnp.minimum(i * count, N - count)
        return block(start, count, start + jnp.arange(count) >= i * count, carry)

    return lax.fori_loop(0, -(-N // count), step, carry)


def _product(a: jax.Array, b: jax.Array, b_axis: int, dtype) -> jax.Array:
    """Sum over the last axis of a and an axis of b; the axes that are left, in order."""
    return lax.dot_general(a, b, (((1,), (b_axis,)), ((), ())), preferred_element_type=dtype)
