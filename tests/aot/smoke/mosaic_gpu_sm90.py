# SPDX-License-Identifier: Apache-2.0
"""A matrix product on Hopper: TMA in, wgmma, TMA out. Small, and uses what every kernel for it uses."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCK_M, BLOCK_N, BLOCK_K = 128, 128, 64
_TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # the layout wgmma reads


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """bf16[m,k] @ bf16[k,n] -> bf16[m,n], accumulated in float32; the sizes are multiples of the blocks."""
    (m, k), (_, n) = a.shape, b.shape
    steps = k // BLOCK_K

    def kernel(a_gmem, b_gmem, out_gmem, a_smem, b_smem, out_smem, arrived):
        rows = pl.ds(jax.lax.axis_index("m") * BLOCK_M, BLOCK_M)
        columns = pl.ds(jax.lax.axis_index("n") * BLOCK_N, BLOCK_N)

        def fetch(step, slot):
            depth = pl.ds(step * BLOCK_K, BLOCK_K)
            plgpu.copy_gmem_to_smem(a_gmem.at[rows, depth], a_smem.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(b_gmem.at[depth, columns], b_smem.at[slot], arrived.at[slot])

        def multiply(acc):
            fetch(0, 0)

            @pl.loop(0, steps)
            def _(step):
                slot = step % 2
                # The other slot is free: wgmma_wait at the end of the last step saw its readers finish.
                pl.when(step + 1 < steps)(lambda: fetch(step + 1, 1 - slot))
                plgpu.barrier_wait(arrived.at[slot])
                plgpu.wgmma(acc, a_smem.at[slot], b_smem.at[slot])
                plgpu.wgmma_wait(0)

            return acc[...]

        acc = pl.run_scoped(multiply, plgpu.ACC((BLOCK_M, BLOCK_N), jnp.float32))
        # Through shared memory: the accumulator's register layout does not write whole sectors of global memory.
        out_smem[...] = acc.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[rows, columns])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((m, n), a.dtype),
        grid=(m // BLOCK_M, n // BLOCK_N),
        grid_names=("m", "n"),
        scratch_types=[
            plgpu.SMEM((2, BLOCK_M, BLOCK_K), a.dtype, transforms=_TRANSFORMS),
            plgpu.SMEM((2, BLOCK_K, BLOCK_N), b.dtype, transforms=_TRANSFORMS),
            plgpu.SMEM((BLOCK_M, BLOCK_N), a.dtype, transforms=_TRANSFORMS),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
        ],
    )(a, b)
