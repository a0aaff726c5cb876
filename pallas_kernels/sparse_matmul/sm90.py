# SPDX-License-Identifier: Apache-2.0
"""sparse_matmul on Hopper: sparse products of the tensor cores, and dense ones of integers.

A block goes from tile to tile of the output. Each of its warpgroups has one or two times 64 outputs; one more copies:

    copies      X[k + 1 ...] [R, 128 bytes]         TMA, into a ring of slots in shared memory; for all of a cluster
                W[k + 1 ...]                        the same; 32 bytes and 4 or 8 of metadata for each thread
    take        W[k]                                each thread its own, into registers
    multiply    Z^T [64, R] += W[k] X[k]^T          wgmma.sp: reads the kept half of W, and all of X

A product of 64 outputs reads R rows of x out of shared memory at 128 bytes a clock, which takes as long as the tensor
cores do. Weights are stored as threads hold them, so that none is moved on its way. They come by shared memory although
each is read once: loads into registers keep lines of the L1 busy, of which slots leave little, and took a third of the
time. Dense weights are read by products where they lie (operands.py).

Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, section 3.
"""

import functools
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
from pallas_kernels.sparse_matmul.config import CHUNK, TILE, Sm90Config, rows_of
from pallas_kernels.sparse_matmul.operands import Dense, Sparse

Ref = Any


def outputs(
    x: jax.Array,
    weight: Sparse | Dense,
    per_output: dict[str, jax.Array],
    N: int,
    *,
    activation: str | None,
    out_dtype: Any,
    config: Sm90Config,
    num_sms: int,
) -> jax.Array:
    """[M, N] of x [M, K]. `per_output` has arrays [1, N], padded to whole tiles of 64: "scale", "bias"."""
    (M, K), inputs, blocks, steps = x.shape, ptx.elements(x.dtype), weight.blocks, weight.steps
    groups, tiles, stages = config.warpgroups, config.tiles, config.stages
    per_block = groups * tiles  # times 64 outputs
    # Copies leave out some of the first 8 rows, but not of others; inputs and outputs are whole tiles.
    there, padded = M if M < 8 else M + -M % 8, N + -N % TILE
    x = jnp.pad(x, ((0, there - M), (0, -K % inputs)))
    rows = rows_of(config.rows, config.cluster, M, x.dtype)
    across, down = -(-blocks * TILE // config.outputs), -(-M // rows)
    clusters = min(across * down, num_sms // config.cluster)
    # Tiles at work at a time share rows and weights in the L2: about as many bytes of the one as of the other.
    wide = config.rows_at_a_time(rows, x.dtype, clusters)

    def kernel(x_gmem, *refs, slots: Ref, weights: Any, out_smem: Ref, full: Ref, free: Ref):
        weight_gmem, refs, out_gmem = refs[: len(weight.arrays)], refs[len(weight.arrays) : -1], refs[-1]
        option = dict(zip(per_output, refs, strict=True))
        cluster, peer, me = lax.axis_index("cluster"), lax.axis_index("peer"), lax.axis_index("warpgroup")
        rounds = lax.div(across * down - cluster + clusters - 1, clusters)

        def place(i: Any) -> tuple[Any, Any]:
            """Of the i-th tile of this cluster: which rows, which outputs."""
            return plgpu.planar_snake(cluster + i * clusters, (down, across), 0, wide)

        def here_of(slot: Any) -> tuple[Ref, ...]:
            return tuple(ref.at[slot] for ref in weights)

        # Each block of a cluster reads a part, for all.
        every: dict[str, Any] = {"collective_axes": "peer"} if config.cluster > 1 else {}

        def copy() -> None:
            @pl.loop(0, rounds * steps)
            def _(number):
                slot, step = lax.rem(number, stages), lax.rem(number, steps)
                down_at, across_at = place(lax.div(number, steps))
                pl.when(number >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                here = x_gmem.at[pl.ds(down_at * rows, rows), pl.ds(step * inputs, inputs)]
                plgpu.copy_gmem_to_smem(here, slots.at[slot], full.at[slot], **every)
                own = (across_at * config.cluster + peer) * per_block
                weight.copy(weight_gmem, here_of(slot), own, per_block, step, full.at[slot])

        def sums_of(first: Any) -> list[jax.Array]:
            """Of 64 outputs each; `first` numbers the steps of all tiles so far."""

            def free_slot(step: Any) -> None:
                number = first + step
                again = (step >= 0) & (number + stages < rounds * steps)
                pl.when(again)(lambda: plgpu.barrier_arrive(free.at[lax.rem(number, stages)]))

            def one(step: Any, carry: tuple[list[jax.Array], list[Any], Any]) -> tuple[list[jax.Array], list[Any], Any]:
                """Starts the products of a step, and sees those of the step before end: tensor cores are never idle."""
                sums, before, zero = carry
                slot = lax.rem(first + step, stages)
                plgpu.barrier_wait(full.at[slot])
                here, x_here = here_of(slot), slots.at[slot]
                started = [weight.start(z, here, me * tiles + tile, x_here, zero) for tile, z in enumerate(sums)]
                zero = weight.wait(before, tiles)
                free_slot(step - 1)
                return [z for z, _ in started], [read for _, read in started], zero

            carry = [ptx.zeros(rows, x.dtype) for _ in range(tiles)], [weight.nothing()] * tiles, jnp.int32(0)
            # Two at a time: each takes the registers of the one before the other.
            carry = lax.fori_loop(0, steps // 2, lambda i, carry: one(2 * i + 1, one(2 * i, carry)), carry)
            sums, last, _ = one(steps - 1, carry) if steps % 2 else carry
            weight.wait(last, 0)
            free_slot(steps - 1)
            return [ptx.ended(z) for z in sums]

        def finish(z: jax.Array, row: Any, own: Any) -> None:
            z = ptx.as_float32(z)
            for i, at in enumerate(range(0, rows, CHUNK)):
                size = min(CHUNK, rows - at)
                part = lax.slice(z, (0, at), (TILE, at + size))
                y = activate_parts(with_outputs([part], option, own * TILE, plgpu.Layout.WGMMA), activation)
                plgpu.wait_smem_to_gmem(min(i, 1), wait_read_only=True)
                staged = out_smem.at[me, i % 2, pl.ds(0, size)]
                staged.transpose((1, 0))[...] = y.astype(out_dtype)
                plgpu.commit_smem()
                # Copies leave alone what is not there.
                plgpu.copy_smem_to_gmem(staged, out_gmem.at[pl.ds(row + at, size), pl.ds(own * TILE, TILE)])

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
                first = (across_at * config.cluster + peer) * per_block + me * tiles
                for tile, z in enumerate(sums_of(i * steps)):
                    pl.when(first + tile < blocks)(functools.partial(finish, z, down_at * rows, first + tile))

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    kernel.__name__ = f"sparse_matmul_{x.dtype.name}"
    released: Any = plgpu.Barrier(num_arrivals=groups, num_barriers=stages)
    if config.cluster > 1:
        released = plgpu.ClusterBarrier(collective_axes=("peer",), num_arrivals=groups, num_barriers=stages)
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((there, padded), out_dtype),
        grid=(clusters,),
        grid_names=("cluster",),
        cluster=(config.cluster,),
        cluster_names=("peer",),
        num_threads=groups + 1,
        thread_name="warpgroup",
        scratch_types={
            "slots": ptx.slots(stages, rows, x.dtype),
            "weights": weight.memory(stages, per_block),
            "out_smem": tile_memory(groups, 2, min(rows, CHUNK), TILE, dtype=out_dtype),
            "full": plgpu.Barrier(num_arrivals=1 + weight.copies, num_barriers=stages),
            "free": released,
        },
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **cost_option(
            flops=2 * M * N * K,
            transcendentals=M * N if activation else 0,
            bytes_accessed=sum(array.nbytes for array in (x, *weight.arrays)) + M * N * jnp.dtype(out_dtype).itemsize,
        ),
    )(x, *weight.arrays, *per_output.values())
    return out[:M, :N]
