# SPDX-License-Identifier: Apache-2.0
"""A matrix product on a TPU: a pipelined grid, the product accumulated in VMEM."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK_M, BLOCK_N, BLOCK_K = 128, 128, 128


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """bf16[m,k] @ bf16[k,n] -> bf16[m,n], accumulated in float32; the sizes are multiples of the blocks."""
    (m, k), (_, n) = a.shape, b.shape

    def kernel(a_ref, b_ref, out_ref, acc_ref):
        @pl.when(pl.program_id(2) == 0)
        def _():
            acc_ref[...] = jnp.zeros_like(acc_ref)

        acc_ref[...] += jnp.dot(a_ref[...], b_ref[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            out_ref[...] = acc_ref[...].astype(out_ref.dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, n), a.dtype),
        grid=(m // BLOCK_M, n // BLOCK_N, k // BLOCK_K),
        in_specs=[
            pl.BlockSpec((BLOCK_M, BLOCK_K), lambda i, j, step: (i, step)),
            pl.BlockSpec((BLOCK_K, BLOCK_N), lambda i, j, step: (step, j)),
        ],
        out_specs=pl.BlockSpec((BLOCK_M, BLOCK_N), lambda i, j, step: (i, j)),
        scratch_shapes=[pltpu.VMEM((BLOCK_M, BLOCK_N), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        # XLA schedules around the kernel by this; it cannot look inside.
        cost_estimate=pl.CostEstimate(
            flops=2 * m * n * k, bytes_accessed=(m * k + k * n + m * n) * a.dtype.itemsize, transcendentals=0
        ),
    )(a, b)
