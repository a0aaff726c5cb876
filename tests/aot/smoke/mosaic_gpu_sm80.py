# SPDX-License-Identifier: Apache-2.0
"""A matrix product on Ampere: cp.async in, mma.sync, plain stores out."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCK_M, BLOCK_N, BLOCK_K = 128, 128, 64
_TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # no bank conflicts for ldmatrix


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """bf16[m,k] @ bf16[k,n] -> bf16[m,n], accumulated in float32; the sizes are multiples of the blocks."""
    (m, k), (_, n) = a.shape, b.shape
    steps = k // BLOCK_K

    def kernel(a_gmem, b_gmem, out_gmem, a_smem, b_smem, out_smem):
        rows = pl.ds(jax.lax.axis_index("m") * BLOCK_M, BLOCK_M)
        columns = pl.ds(jax.lax.axis_index("n") * BLOCK_N, BLOCK_N)

        def fetch(step, slot):
            depth = pl.ds(step * BLOCK_K, BLOCK_K)
            in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # cp.async does not fill
            plgpu.copy_gmem_to_smem(a_gmem.at[rows, depth], a_smem.at[slot], oob_mode=in_bounds)
            plgpu.copy_gmem_to_smem(b_gmem.at[depth, columns], b_smem.at[slot], oob_mode=in_bounds)

        def multiply(step, acc):
            slot = step % 2
            plgpu.wait_gmem_to_smem(0)
            pl.when(step + 1 < steps)(lambda: fetch(step + 1, 1 - slot))
            a_tile = plgpu.load(a_smem.at[slot], layout=plgpu.Layout.MMA_LHS(a.dtype))
            b_tile = plgpu.load(b_smem.at[slot], layout=plgpu.Layout.MMA_RHS(b.dtype))
            return plgpu.mma(acc, a_tile, b_tile)

        fetch(0, 0)
        zeros = jnp.zeros((BLOCK_M, BLOCK_N), jnp.float32)
        acc = jax.lax.fori_loop(0, steps, multiply, plgpu.layout_cast(zeros, plgpu.Layout.MMA_ACC(a.dtype)))
        # Through shared memory: the accumulator's register layout does not write whole sectors of global memory.
        # A store to shared memory ends in a barrier; the load after it gives each thread 16 adjacent bytes.
        out_smem[...] = acc.astype(out_smem.dtype)
        coalesced = plgpu.Layout.SMEM_GMEM_COPY((BLOCK_M, BLOCK_N), out_smem.dtype, swizzle=128)
        out_gmem[rows, columns] = plgpu.load(out_smem, layout=coalesced)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((m, n), a.dtype),
        grid=(m // BLOCK_M, n // BLOCK_N),
        grid_names=("m", "n"),
        scratch_types=[
            plgpu.SMEM((2, BLOCK_M, BLOCK_K), a.dtype, transforms=_TRANSFORMS),
            plgpu.SMEM((2, BLOCK_K, BLOCK_N), b.dtype, transforms=_TRANSFORMS),
            plgpu.SMEM((BLOCK_M, BLOCK_N), a.dtype, transforms=_TRANSFORMS),
        ],
    )(a, b)
