# SPDX-License-Identifier: Apache-2.0
"""sparse_matmul on Hopper: sparse products of the tensor cores, weights from memory to registers.

A block goes from tile to tile of the output, a warpgroup for each 64 outputs and one that copies x:

    copies      X[k + 1 ...] [R, 128 bytes]         TMA, into a ring of slots in shared memory
    take        W[k + ahead]                        each thread its own 32 bytes and 4 or 8 of metadata, past the L1
    multiply    Z^T [64, R] += W[k] X[k]^T          wgmma.sp: reads the kept half of W, and all of X

A product of 64 outputs reads R rows of x out of shared memory at 128 bytes a clock, which takes as long as the tensor
cores do: weights must not come from there, too. They are stored as threads hold them, so that none is moved.

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
from pallas_kernels.core.mma import cost_option, tile_memory
from pallas_kernels.sparse_matmul import ptx
from pallas_kernels.sparse_matmul.config import TILE, Sm90Config
from pallas_kernels.sparse_matmul.weights import Sparse24Weight

Ref = Any


def outputs(
    x: jax.Array,
    weight: Sparse24Weight,
    per_output: dict[str, jax.Array],
    *,
    activation: str | None,
    out_dtype: Any,
    config: Sm90Config,
    num_sms: int,
) -> jax.Array:
    """[M, N] of x [M, K]. `per_output` has arrays [1, N], padded to whole tiles of 64: "scale", "bias"."""
    (M, K), N, inputs, values = x.shape, weight.shape[1], 128 // x.dtype.itemsize, weight.values
    groups, stages, ahead = config.warpgroups, config.stages, config.ahead
    # Copies leave out some of the first 8 rows, but not of others.
    there = M if M < 8 else M + -M % 8
    x = jnp.pad(x, ((0, there - M), (0, 0)))
    rows, steps = min(config.rows, M + -M % 8), values.shape[1] // ptx.PRODUCTS
    if x.dtype == jnp.int8 and rows > 32:
        rows += -rows % 16  # products of integers have no other widths
    across, down = -(-len(values) // groups), -(-M // rows)
    blocks = min(across * down, num_sms)

    def kernel(x_gmem, values_gmem, metadata_gmem, *refs, slots: Ref, out_smem: Ref, full: Ref, free: Ref):
        option, out_gmem = dict(zip(per_output, refs[:-1], strict=True)), refs[-1]
        block, me = lax.axis_index("block"), lax.axis_index("warpgroup")
        rounds = lax.div(across * down - block + blocks - 1, blocks)

        def place(i: Any) -> tuple[Any, Any]:
            """Of the i-th tile of this block: which rows, which outputs. Those at work at a time are neighbors, whose
            rows of x and weights are in the L2."""
            return plgpu.planar_snake(block + i * blocks, (down, across), 1, 8)

        def copy() -> None:
            @pl.loop(0, rounds * steps)
            def _(number):
                slot, step = lax.rem(number, stages), lax.rem(number, steps)
                row = place(lax.div(number, steps))[0] * rows
                pl.when(number >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                here = x_gmem.at[pl.ds(row, rows), pl.ds(step * inputs, inputs)]
                plgpu.copy_gmem_to_smem(here, slots.at[slot], full.at[slot])

        def sums_of(first: Any, own: Any) -> jax.Array:
            """Of 64 outputs; `first` numbers the steps of all tiles so far."""

            def take(step: Any) -> tuple[jax.Array, jax.Array]:
                return ptx.take(values_gmem, metadata_gmem, own, jnp.minimum(step, steps - 1))

            def one(z: jax.Array, kept: tuple[jax.Array, jax.Array], step: Any) -> jax.Array:
                slot = lax.rem(first + step, stages)
                plgpu.barrier_wait(full.at[slot])
                z = ptx.wait(ptx.multiply(z, kept, slots.at[slot]), kept)
                pl.when(first + step + stages < rounds * steps)(lambda: plgpu.barrier_arrive(free.at[slot]))
                return z

            def some(i: Any, carry: tuple) -> tuple:
                # As many as are ahead: each takes the registers of one whose products are done.
                z, kept = carry
                for j in range(ahead):
                    z = one(z, kept[j], i * ahead + j)
                    kept = (*kept[:j], take((i + 1) * ahead + j), *kept[j + 1 :])
                return z, kept

            kept = tuple(take(jnp.int32(j)) for j in range(ahead))
            z, kept = lax.fori_loop(0, steps // ahead, some, (ptx.zeros(rows, x.dtype), kept))
            for j in range(steps % ahead):
                z = one(z, kept[j], steps // ahead * ahead + j)
            return ptx.as_float32(z)

        def finish(z: jax.Array, row: Any, own: Any) -> None:
            y = activate_parts(with_outputs([z], option, own * TILE, plgpu.Layout.WGMMA), activation)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem.at[me].transpose((1, 0))[...] = y.astype(out_dtype)
            plgpu.commit_smem()
            # Copies leave alone what is not there.
            plgpu.copy_smem_to_gmem(out_smem.at[me], out_gmem.at[pl.ds(row, rows), pl.ds(own * TILE, TILE)])

        @pl.when(me == groups)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            copy()

        @pl.when(me < groups)
        def _():
            plgpu.set_max_registers(config.registers, action="increase")

            @pl.loop(0, rounds)
            def _(i):
                down_at, across_at = place(i)
                number = across_at * groups + me
                # A warpgroup without outputs computes the last ones again: others wait for it to free slots.
                own = jnp.minimum(number, len(values) - 1)
                z = sums_of(i * steps, own)
                pl.when(number == own)(lambda: finish(z, down_at * rows, own))

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    kernel.__name__ = f"sparse_matmul_{x.dtype.name}"
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((there, N), out_dtype),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=groups + 1,
        thread_name="warpgroup",
        scratch_types={
            "slots": ptx.slots(stages, rows, x.dtype),
            "out_smem": tile_memory(groups, rows, TILE, dtype=out_dtype),
            "full": plgpu.Barrier(num_arrivals=1, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **cost_option(
            flops=2 * M * N * K,
            transcendentals=M * N if activation else 0,
            bytes_accessed=weight.nbytes + x.nbytes + M * N * jnp.dtype(out_dtype).itemsize,
        ),
    )(x, values, weight.metadata, *per_output.values())
    return out[:M]
