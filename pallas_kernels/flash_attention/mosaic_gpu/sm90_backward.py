# SPDX-License-Identifier: Apache-2.0
"""flash_attention's backward pass for Hopper: five wgmma products a tile, one persistent kernel.

    producer    copies:  K V    Q0 dO0   Q1 dO1 ...                     runs ahead through a ring of `stages` slots
    consumers   for each tile, 64 keys each, what threads do          and tensor cores meanwhile
                P^T  = exp2(S^T - LSE)                                dP^T = V dO^T
                dS^T = P^T * (dP^T - delta)                           dV  += P^T dO
                dS^T -> shared memory, barrier of both                dK  += dS^T Q, dQ = dS K (64 rows or columns each)
                dQ -> integers -> added up in global memory           S^T  = K Q^T of the next tile

A block of two consumers owns 128 keys, walks through the tiles of queries that see them (and through the G query heads
that share them), and keeps dK and dV in registers. Keys are the rows of a tile, so that P^T and dS^T leave the tensor
cores as the left operands of dV and dK. dQ needs a sum over the keys of all blocks.

That sum repeats bit for bit because it is one of integers. Row t of dQ is scaled to 32 bits by a bound that no order of
summation can exceed, and TMA adds it up in memory:

    |dQ[t, h]| / scale  <=  sum_j P[t, j] |dP[t, j] - delta[t]| |K[j, h]|
                        <=  (max_h |dO[t, h]| max_j sum_h |V[j, h]| + |delta[t]|) max |K|

Source: Dao, "FlashAttention-2", 2023, algorithm 2; Shah et al., "FlashAttention-3", 2024, appendix B.2 for the order of
the products. Integers in place of an order of the blocks are ours.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core.mma import tile_memory
from pallas_kernels.flash_attention.config import Sm90Config
from pallas_kernels.flash_attention.mosaic_gpu import ptx, sm80
from pallas_kernels.flash_attention.mosaic_gpu import work as work_lib
from pallas_kernels.flash_attention.mosaic_gpu.plane import (
    At,
    along_columns,
    along_rows,
    cost_estimate,
    deltas,
    prepare,
    row_stats,
    sink_gradient,
    slopes,
    zero_of_step,
)
from pallas_kernels.flash_attention.mosaic_gpu.sm90 import L2_BYTES, ROWS, TILE, Accumulator, R
from pallas_kernels.flash_attention.xla import Gradients
from pallas_kernels.masks import Mask

CONSUMERS = 2
BLOCK_K = CONSUMERS * R
# Registers of a thread of the producer and of the consumers, who hold dK, dV, S and dP.
REGISTERS = 24, 240
# The hardware barrier at which both consumers have written their half of dS.
DS_WRITTEN = 8
# The largest |dQ| as an integer; half of what int32 holds, for P and dS are rounded.
LARGEST = 2.0**30
# Below this bound a row's gradients are not told apart: LARGEST divided by it must be a float32.
SMALLEST = 2.0**-96


class _Shared(NamedTuple):
    """Shared memory and barriers of a block. A slot is `full` when its copy has come, `free` when both have read it."""

    k: Any  # [1, BLOCK_K, H]
    v: Any  # [1, BLOCK_K, H]; at the end of an item dV, then dK leave from it
    q: Any  # [stages, block_q, H]
    dout: Any  # [stages, block_q, H]
    stats: Any  # [stages, 3, block_q]: LSE, delta and the unit of dQ
    ds: Any  # [2, BLOCK_K, block_q]: successive tiles take turns, so that one barrier a tile is enough
    dq: Any  # [consumers, R, 64], int32
    kv_full: Any
    kv_free: Any
    q_full: Any
    dout_full: Any
    free: Any


def block_q(H: int) -> int:
    """Rows of a tile: what the registers hold beside dK and dV."""
    return 128 if H == 64 else 64


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    sink: jax.Array | None,
    mask: Mask | None,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
    *,
    scale: float,
    soft_cap: float | None,
    config: Sm90Config,
    num_sms: int,
) -> Gradients:
    """Gradients from the residuals (q, k, v, out, lse), for head dims up to 128."""
    (B, T, N, H), (_, S, K, Hv) = query.shape, value.shape
    width = 64 if max(H, Hv) <= 64 else 128
    rows_q, stages, G = block_q(width), config.backward_stages, N // K
    delta = deltas(out, lse, dout, dlse)
    plane, schedule, ops = prepare(
        *(query, key, value, bias, None, mask, scale, soft_cap, rows_q, BLOCK_K),
        acc=TILE,
        copies_fill=True,
        transposed=True,
        widths=(width, width),
        dout=dout,
    )
    unit, inverse = _units(key, value, dout, delta, schedule.live)
    ops = ops._replace(stats=row_stats(lse, delta, unit, block_q=rows_q))
    H, tile_type = width, (R, rows_q)
    bytes_of_plane = 8 * plane.T * H * G  # q and dO in 16 bits, dQ in 32
    work = work_lib.plan(schedule, B, N, num_sms, L2_BYTES // bytes_of_plane, group=G)
    leaves, tree = jax.tree.flatten((ops, work))

    def flash_attention_sm90_backward(*refs):
        ops, work = tree.unflatten(refs[: len(leaves)])
        dq_gmem, dk_gmem, dv_gmem, *scratch = refs[len(leaves) :]
        shared = _Shared(*scratch)
        me, walk = lax.axis_index("warpgroup"), work_lib.Walk(work, schedule, N, G, lax.axis_index("sm"))

        def for_each_head(item, do, carry):
            """carry = do(item, carry) for the query heads of an item."""
            if G == 1:
                return do(item, carry)
            return lax.fori_loop(0, G, lambda g, carry: do(walk.item(item.b, item.n + g, item.row), carry), carry)

        def head(n):
            return pl.ds(n * H, H)

        @pl.when(me == CONSUMERS)
        def producer():
            plgpu.set_max_registers(REGISTERS[0], action="decrease")

            def load_keys(item, step):
                keys, group = pl.ds(item.row * BLOCK_K, BLOCK_K), head(item.n // G)
                plgpu.barrier_wait(shared.kv_free)
                plgpu.copy_gmem_to_smem(ops.key.at[item.b, keys, group], shared.k.at[0], shared.kv_full)
                plgpu.copy_gmem_to_smem(ops.value.at[item.b, keys, group], shared.v.at[0], shared.kv_full)
                return for_each_head(item, load_queries, step)

            def load_queries(item, step):
                def load(i, step):
                    slot, col = lax.rem(step, stages), walk.column(item, i)
                    queries = pl.ds(col * rows_q, rows_q)
                    plgpu.barrier_wait(shared.free.at[slot])
                    q, stats, dout = (x.at[slot] for x in (shared.q, shared.stats, shared.dout))
                    q_full, dout_full = shared.q_full.at[slot], shared.dout_full.at[slot]
                    plgpu.copy_gmem_to_smem(ops.query.at[item.b, queries, head(item.n)], q, q_full)
                    plgpu.copy_gmem_to_smem(ops.stats.at[item.b, item.n, col], stats, q_full)
                    plgpu.copy_gmem_to_smem(ops.dout.at[item.b, queries, head(item.n)], dout, dout_full)
                    return step + 1

                return lax.fori_loop(0, item.live, load, step)

            walk.for_each(load_keys, jnp.int32(0))
            # Nothing is left to load; barriers are left as they were found.
            plgpu.barrier_wait(shared.kv_free)
            for slot in range(stages):
                plgpu.barrier_wait(shared.free.at[slot])

        def consumer(me):
            plgpu.set_max_registers(REGISTERS[1], action="increase")
            plgpu.barrier_arrive(shared.kv_free)
            for slot in range(stages):
                plgpu.barrier_arrive(shared.free.at[slot])
            own = pl.ds(me * R, R)
            dq_smem = shared.dq.at[me]

            def issue_scores(s, step):
                """S^T = K Q^T of the tile that a step works on."""
                slot = lax.rem(step, stages)
                plgpu.wgmma(s, shared.k.at[zero_of_step(step), own], shared.q.at[slot].transpose((1, 0)))

            def tile(item, dk, dv, masked, i, carry):
                """x is S^T of this tile; returns that of the next."""
                step, x = carry
                slot, turn, col = lax.rem(step, stages), lax.rem(step, 2), walk.column(item, i)
                zero = zero_of_step(step + col)

                def along_queries(number):
                    y = plgpu.load(shared.stats.at[slot, number], layout=TILE.reduce(0))
                    return along_columns(y, tile_type)

                def slopes_of_tile(dp):
                    """dS^T / scale [R, block_q]; dV += P^T dO on the way."""
                    plgpu.barrier_wait(shared.dout_full.at[slot])
                    plgpu.wgmma(dp, shared.v.at[zero, own], shared.dout.at[slot].transpose((1, 0)))
                    logits, slope = x, None
                    at = At(item.b, item.n, item.row * BLOCK_K + me * R + zero, col * rows_q)
                    if not plane.plain:
                        logits, slope = plane.logits(x, ops, at, masked=False)
                    p = jnp.exp2(logits * plane.unit - along_queries(0))
                    if masked and (visible := plane.visibility(ops, at, tile_type)) is not None:
                        p = jnp.where(visible, p, 0.0)
                    plgpu.wgmma(dv, p.astype(query.dtype), shared.dout.at[slot])
                    ds = slopes(p, plgpu.wgmma_accumulator_load(dp, wait_n=1), along_queries(1), slope)
                    return ds.astype(query.dtype)

                ds = pl.run_scoped(slopes_of_tile, Accumulator(tile_type, jnp.float32))
                plgpu.wgmma(dk, ds, shared.q.at[slot])
                shared.ds.at[turn, own][...] = ds
                ptx.fence_shared_memory()
                ptx.wait_for_reads_of_copies()
                ptx.named_barrier_wait(jnp.int32(DS_WRITTEN), CONSUMERS * 128)
                plgpu.wgmma_wait(1)  # dV is done: the registers of P^T are needed for dQ and S^T
                # dQ is a tile of 64 x 64 for each consumer: its rows of 128, or its columns of 128.
                q_rows = pl.ds(me * R, R) if rows_q == 128 else pl.ds(0, R)
                q_cols = pl.ds(0, 64) if rows_q == 128 else pl.ds(me * 64, 64)

                def gradient_of_queries(dq, s):
                    plgpu.wgmma(dq, shared.ds.at[turn, :, q_rows].transpose((1, 0)), shared.k.at[zero, :, q_cols])
                    # S^T of the next tile, for the tensor cores to do meanwhile; behind the last, its own in vain.
                    more = i + 1 < item.live
                    following = jnp.where(more, step + 1, step)
                    pl.when(more)(lambda: plgpu.barrier_wait(shared.q_full.at[lax.rem(following, stages)]))
                    issue_scores(s, following)
                    dq = plgpu.wgmma_accumulator_load(dq, wait_n=1)
                    unit = plgpu.load(shared.stats.at[slot, 2, q_rows], layout=ROWS)
                    dq_smem[...] = ptx.round_to_int32(dq * along_rows(unit, (R, 64)))
                    plgpu.commit_smem()
                    rows, cols = pl.ds(col * rows_q + q_rows.start, R), pl.ds(item.n * H + q_cols.start, 64)
                    plgpu.copy_smem_to_gmem(dq_smem, dq_gmem.at[item.b, rows, cols], reduction_op="add")
                    return plgpu.wgmma_accumulator_load(s)

                accumulators = Accumulator((R, 64), jnp.float32), Accumulator(tile_type, jnp.float32)
                x = pl.run_scoped(gradient_of_queries, *accumulators)
                plgpu.barrier_arrive(shared.free.at[slot])
                return step + 1, x

            def do(item, step):
                plgpu.barrier_wait(shared.kv_full)

                def tiles(dk, dv):
                    def tiles_of_head(item, step):
                        def first_scores(s):
                            plgpu.barrier_wait(shared.q_full.at[lax.rem(step, stages)])
                            issue_scores(s, step)
                            return s[...]

                        x = pl.run_scoped(first_scores, Accumulator(tile_type, jnp.float32))
                        return walk.sweep(item, functools.partial(tile, item, dk, dv), (step, x))[0]

                    step_after = for_each_head(item, tiles_of_head, step)
                    return dk[...], dv[...], step_after

                dk, dv, step = pl.run_scoped(tiles, *[Accumulator((R, H), jnp.float32)] * 2)
                v = shared.v.at[0, own]
                # Nobody but this consumer reads its rows of V: its gradients leave from there.
                rows, group = pl.ds(item.row * BLOCK_K + me * R, R), head(item.n // G)
                for gradient, gmem in ((dv, dv_gmem), (dk * scale, dk_gmem)):
                    v[...] = gradient.astype(query.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(v, gmem.at[item.b, rows, group])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(shared.kv_free)
                return step

            walk.for_each(do, jnp.int32(0), ahead=False)
            plgpu.wait_smem_to_gmem(0)

        pl.when(me < CONSUMERS)(functools.partial(consumer, me))

    memory = functools.partial(tile_memory, dtype=query.dtype)
    scratch = _Shared(
        k=memory(1, BLOCK_K, H),
        v=memory(1, BLOCK_K, H),
        q=memory(stages, rows_q, H),
        dout=memory(stages, rows_q, H),
        stats=plgpu.SMEM((stages, 3, rows_q), jnp.float32),
        ds=memory(2, BLOCK_K, rows_q),
        dq=_int32_tile_memory(CONSUMERS, R, 64),
        kv_full=plgpu.Barrier(num_arrivals=2),
        kv_free=plgpu.Barrier(num_arrivals=CONSUMERS),
        q_full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        dout_full=plgpu.Barrier(num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
    )
    out_type = [jax.ShapeDtypeStruct(x.shape, query.dtype) for x in (ops.key, ops.value)]
    kernel = work_lib.persistent(
        flash_attention_sm90_backward, out_type, scratch, num_sms, CONSUMERS, **cost_estimate(plane, products=5)
    )

    # The rule that Pallas has for vmap does not know an array that is both input and output.
    @jax.custom_batching.sequential_vmap
    def run(inverse, *leaves):
        integers = jax.new_ref(jnp.zeros((B, ops.query.shape[1], N * H), jnp.int32))
        dk, dv = kernel(*leaves, integers)
        # Made numbers in here: in a loop, XLA lets a kernel write its results straight into the loop's, and forgets
        # that this one is an input as well.
        dq = integers[...].reshape(B, -1, N, H)[:, :T, :, : query.shape[3]].astype(jnp.float32)
        inverse = jnp.swapaxes(inverse, 1, 2)[..., None] * scale
        return (dq * inverse).astype(query.dtype), dk, dv

    dq, dk, dv = run(inverse, *leaves)
    return Gradients(
        dq,
        dk.reshape(B, -1, K, H)[:, :S, :, : key.shape[3]],
        dv.reshape(B, -1, K, H)[:, :S, :, :Hv],
        sm80.bias_gradient(query, key, value, bias, mask, dout, lse, delta, scale=scale, soft_cap=soft_cap),
        sink_gradient(sink, lse, delta),
    )


def _units(key, value, dout, delta: jax.Array, live: Any) -> tuple[jax.Array, jax.Array]:
    """By what a row of dQ / scale is multiplied to be integers, and the inverse of it, [B, N, T].

    Args:
      live: [B|1, N|1, tiles of keys], how many tiles see them: what lies in those that nobody sees, padding say, must
        not coarsen the rest.
    """
    S, K = key.shape[1:3]
    G = delta.shape[1] // K
    seen = jnp.repeat(live > 0, BLOCK_K, axis=2)[:, :, :S]  # [B|1, N|1, S]
    seen = jnp.broadcast_to(seen, (seen.shape[0], K * G, S)).reshape(-1, K, G, S).any(2)

    def largest(x):  # [B, K, S] -> [B, N, 1]
        return jnp.repeat(jnp.max(jnp.where(seen, x, 0), axis=2), G, axis=1)[:, :, None]

    def over_h(reduce, x):  # [B, L, heads, H] -> [B, heads, L]; no squares, which leave the range of float32
        return jnp.swapaxes(reduce(jnp.abs(x.astype(jnp.float32)), axis=3), 1, 2)

    largest_dp = over_h(jnp.max, dout) * largest(over_h(jnp.sum, value))
    bound = (largest_dp + jnp.abs(delta)) * largest(over_h(jnp.max, key))
    bound = jnp.maximum(bound, SMALLEST)  # NaN stays NaN, and makes dQ NaN
    return LARGEST / bound, bound / LARGEST


def _int32_tile_memory(*shape: int) -> Any:
    tiling: Any = plgpu.TilingTransform
    swizzling: Any = plgpu.SwizzleTransform
    return plgpu.SMEM(shape, jnp.int32, transforms=(tiling((8, 32)), swizzling(128)))
