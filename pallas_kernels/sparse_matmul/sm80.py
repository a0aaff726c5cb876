# SPDX-License-Identifier: Apache-2.0
"""sparse_matmul on Ampere and Ada: sparse products of a warp, mma.sp. It runs on Hopper, too, slower than sm90.py.

A block has one or two times 64 outputs, 16 of each a warp, and R rows of x; it walks along the inputs:

    copies      X[k + 1 ...] [R, 128 bytes]         cp.async, into a ring of slots in shared memory; for all warps
    take        W[k + 1]                            each thread its own 32 bytes and metadata, from memory to registers
    multiply    Z^T [64, R] += W[k] X[k]^T          mma.sp: of x 8 rows at a time, by ldmatrix

Weights are stored as threads of a warp hold them, and each is read by one thread of a block: they need no shared
memory, and the next are on their way while products run. Blocks that share weights run one after the other, and find
them in the L2.

Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, section 3.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core.activations import activate_parts
from pallas_kernels.core.epilogue import with_outputs
from pallas_kernels.core.mma import Ring, copies_of_device, cost_option, store
from pallas_kernels.sparse_matmul import mma_sp, ptx
from pallas_kernels.sparse_matmul.config import TILE, Sm80Config
from pallas_kernels.sparse_matmul.weights import Sparse24Weight

Ref = Any


def outputs(
    x: jax.Array,
    weight: Sparse24Weight,
    per_output: dict[str, jax.Array],
    N: int,
    *,
    activation: str | None,
    out_dtype: Any,
    config: Sm80Config,
) -> jax.Array:
    """[M, N] of x [M, K]. `per_output` has arrays [1, N], padded to whole blocks: "scale", "bias"."""
    (M, K), inputs, rows, tiles = x.shape, ptx.elements(x.dtype), config.rows, config.tiles
    x = jnp.pad(x, ((0, -M % rows), (0, -K % inputs)))
    values, metadata, words = weight.values, weight.metadata, ptx.meta_words(x.dtype)
    blocks, steps = len(values), values.shape[1] // ptx.PRODUCTS
    across, down, copies = -(-blocks // tiles), len(x) // rows, copies_of_device()

    def kernel(x_gmem, values_gmem, metadata_gmem, *refs, slots: Ref, full: Any = None):
        option, out_gmem = dict(zip(per_output, refs, strict=False)), refs[-1]
        block = lax.axis_index("block")
        row, output = lax.rem(block, down) * rows, lax.div(block, down) * tiles

        def x_of(step: Any) -> Ref:
            return x_gmem.at[pl.ds(row, rows), pl.ds(step * inputs, inputs)]

        ring = Ring(copies, config.stages, [(x_of, slots)], full)

        def take(step: Any) -> list[mma_sp.Kept]:
            """Of each tile; the last step's once more where there is none."""
            step = jnp.minimum(step, steps - 1)
            # Outputs that are not there are computed from the last ones, and cut off afterwards.
            own = [jnp.minimum(output + tile, blocks - 1) for tile in range(tiles)]
            return [mma_sp.take(values_gmem.at[i], metadata_gmem.at[i], step, words) for i in own]

        def one(step: Any, carry: tuple[list[jax.Array], list[mma_sp.Kept]]) -> tuple[list, list]:
            sums, kept = carry
            ring.start(step + config.stages - 1, steps)
            ahead = take(step + 1)
            (here,) = ring.wait(step, config.stages - 1, step + config.stages - 1 < steps)
            return [mma_sp.multiply(z, own, here) for z, own in zip(sums, kept, strict=True)], ahead

        for i in range(config.stages - 1):
            ring.start(jnp.int32(i), steps)
        zero = plgpu.layout_cast(jnp.zeros((TILE, rows), ptx.sum_type(x.dtype)), mma_sp.SUMS)
        sums, _ = lax.fori_loop(0, steps, one, ([zero] * tiles, take(jnp.int32(0))))
        for tile, z in enumerate(sums):
            parts = with_outputs([z.astype(jnp.float32)], option, (output + tile) * TILE, mma_sp.SUMS)
            y = activate_parts(parts, activation).astype(out_dtype)
            store(out_gmem.at[pl.ds((output + tile) * TILE, TILE), pl.ds(row, rows)], y)

    kernel.__name__ = f"sparse_matmul_{x.dtype.name}"
    padded = across * tiles * TILE, len(x)
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(padded, out_dtype),
        grid=(across * down,),
        grid_names=("block",),
        scratch_types={
            "slots": ptx.slots(config.stages, rows, x.dtype),
            **({"full": full} if (full := copies.barrier(1, config.stages)) is not None else {}),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **cost_option(
            flops=2 * M * N * K,
            transcendentals=M * N if activation else 0,
            bytes_accessed=x.nbytes + values.nbytes + metadata.nbytes + M * N * jnp.dtype(out_dtype).itemsize,
        ),
    )(x, values, metadata, *per_output.values())
    # Ampere has no copies out of shared memory that would turn Z^T around: XLA does.
    return out[:N, :M].T
