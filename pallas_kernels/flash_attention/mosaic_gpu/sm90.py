# SPDX-License-Identifier: Apache-2.0
"""flash_attention for Hopper: wgmma products, TMA copies, one persistent kernel of specialized warpgroups.

    producer    copies:   Q      K0 V0   K1 V1   K2 V2 ...            runs ahead through rings of `stages` slots
    consumer 0  products: QK0 |        QK1 PV0 |         QK2 PV1 |
                softmax:       softmax0         softmax1          ...
    consumer 1  products:       QK0 |        QK1 PV0 |         ...    the consumers take turns: ping-pong
                softmax:             softmax0         softmax1

A consumer is a warpgroup of 128 threads and owns R = 64 query rows. The product QK of tile n is issued before PV of
tile n - 1, and consumers issue their products in turns, so that the softmax of one runs under the products of the
others. Tiles come in the order of `tiles.schedule`: mixed ones in a loop that masks, full ones in a loop that has no
masking code, empty ones never. Rows of tiles are dealt to multiprocessors by `work.plan`.

The backward pass is in sm90_backward.py; wide heads take that of sm80.py, whose instructions Hopper has too.

Source: Shah et al., "FlashAttention-3", 2024, sections 3.1 and 3.2.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.core.mma import tile_memory
from pallas_kernels.flash_attention.config import Sm90Config
from pallas_kernels.flash_attention.mosaic_gpu import ptx, sm80
from pallas_kernels.flash_attention.mosaic_gpu import work as work_lib
from pallas_kernels.flash_attention.mosaic_gpu.plane import (
    LOG2E,
    At,
    along_rows,
    cost_estimate,
    prepare,
    zero_of_step,
)
from pallas_kernels.masks import Mask

R = 64  # rows of a wgmma, and so of a consumer
TILE, ROWS = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
Accumulator: Any = plgpu.WGMMAAccumulatorRef
LN2 = math.log(2)
# Hardware barriers 0 to 4 belong to Mosaic: the block's, and one for each warpgroup.
TURN = 8
# Registers of a thread: setmaxnreg moves what the producer does not need to the consumers. 64 K in all.
REGISTERS = {2: (40, 232), 3: (32, 160)}
# Keys and values worked on at a time: most of one of the two halves of the L2 cache.
L2_BYTES = 2**24
# A row's maximum is raised only when it grows by more than this factor, as a power of 2: probabilities then reach
# 2^8, which float32 sums and 16-bit operands hold as precisely as 1.
LAZY = 8.0


def supports(call: Call, device: Device) -> Refusal | None:
    if device.platform != "gpu" or device.arch != "sm90":
        return Refusal(f"it is for NVIDIA Hopper GPUs, and this is {device}")
    return sm80.supports(call, device)


class _Shared(NamedTuple):
    """Shared memory and barriers of a block. A slot is `full` when its copy has come, `free` when all have read it."""

    q: Any  # [q_stages, consumers * R, H]
    k: Any  # [stages, block_k, H]
    v: Any  # [stages, block_k, Hv]
    out: Any  # [consumers, R, Hv], or a stand-in where outputs leave from q, for which Hv has to be H
    lse: Any  # [consumers, R]
    q_full: Any
    q_free: Any
    k_full: Any
    k_free: Any
    v_full: Any
    v_free: Any


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    sink: jax.Array | None,
    mask: Mask | None,
    *,
    scale: float,
    soft_cap: float | None,
    config: Sm90Config,
    num_sms: int,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, Hv] in the input dtype and LSE [B, N, T] in float32."""
    B, T, N, _ = query.shape
    consumers, stages, block_k = config.consumers, config.stages, config.block_k
    block_q = R * consumers
    inputs = query, key, value, bias, sink, mask, scale, soft_cap
    plane, schedule, ops = prepare(*inputs, block_q, block_k, acc=TILE, copies_fill=True)
    config.check_smem(plane.H, plane.Hv)
    q_stages, out_in_q = config.q_stages, plane.Hv == plane.H
    bytes_of_plane = 2 * plane.S * (plane.H + plane.Hv) * plane.K // N  # heads of a group share keys and values
    work = work_lib.plan(schedule, B, N, num_sms, L2_BYTES // bytes_of_plane)
    rows = schedule.live.shape[-1]
    masks = work_lib.some_mixed(schedule)
    guard = masks or bias is not None  # whether a row may see nothing but -inf
    leaves, tree = jax.tree.flatten((ops, work))
    H, Hv, unit = plane.H, plane.Hv, plane.unit

    def flash_attention_sm90(*refs):
        ops, work = tree.unflatten(refs[: len(leaves)])
        out_gmem, lse_gmem, *scratch = refs[len(leaves) :]
        shared = _Shared(*scratch)
        me, walk = lax.axis_index("warpgroup"), work_lib.Walk(work, schedule, N, 1, lax.axis_index("sm"))

        def pass_turn():
            ptx.named_barrier_arrive(TURN + lax.rem(me + 1, consumers), 256)

        def wait_turn():
            ptx.named_barrier_wait(TURN + me, 256)

        @pl.when(me == consumers)
        def producer():
            plgpu.set_max_registers(REGISTERS[consumers][0], action="decrease")

            def do(item, carry):
                items, step = carry
                b, n, row, slot = item.b, item.n, item.row, lax.rem(items, q_stages)
                group = n // (N // plane.K)
                plgpu.barrier_wait(shared.q_free.at[slot])
                queries = ops.query.at[b, pl.ds(row * block_q, block_q), pl.ds(n * H, H)]
                plgpu.copy_gmem_to_smem(queries, shared.q.at[slot], shared.q_full.at[slot])

                def load(i, step):
                    slot, keys = lax.rem(step, stages), pl.ds(walk.column(item, i) * block_k, block_k)
                    plgpu.barrier_wait(shared.k_free.at[slot])
                    k = ops.key.at[b, keys, pl.ds(group * H, H)]
                    plgpu.copy_gmem_to_smem(k, shared.k.at[slot], shared.k_full.at[slot])
                    plgpu.barrier_wait(shared.v_free.at[slot])
                    v = ops.value.at[b, keys, pl.ds(group * Hv, Hv)]
                    plgpu.copy_gmem_to_smem(v, shared.v.at[slot], shared.v_full.at[slot])
                    return step + 1

                return items + 1, lax.fori_loop(0, item.live, load, step)

            walk.for_each(do, (jnp.int32(0), jnp.int32(0)))
            # Nothing is left to load; barriers are left as they were found.
            for slot in range(q_stages):
                plgpu.barrier_wait(shared.q_free.at[slot])
            for slot in range(stages):
                plgpu.barrier_wait(shared.k_free.at[slot])
                plgpu.barrier_wait(shared.v_free.at[slot])

        @pl.when(me < consumers)
        def consumer():
            plgpu.set_max_registers(REGISTERS[consumers][1], action="increase")
            # Everything is free at first, and the turn is the first consumer's. Where outputs leave from the queries'
            # memory, the last slot is let go of by the first item, as if there had been one before.
            for slot in range(q_stages - out_in_q):
                plgpu.barrier_arrive(shared.q_free.at[slot])
            for slot in range(stages):
                plgpu.barrier_arrive(shared.k_free.at[slot])
                plgpu.barrier_arrive(shared.v_free.at[slot])
            pl.when(me == consumers - 1)(pass_turn)

            def free_queries_before(items):
                """Of the item before: once the copies of its outputs have read them."""
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(shared.q_free.at[lax.rem(items + q_stages - 1, q_stages)])

            def softmax(x, m, l, item, i, masked, first=False):
                """Online softmax of products x [R, C]: probabilities, maximum and sum of each row, and by what to
                multiply earlier sums. m is in base 2. l is kept in 8 columns, summed up at the end."""
                if masked or not plane.plain:
                    col = walk.column(item, i)
                    first_row = item.row * block_q + me * R + zero_of_step(col + i)
                    at = At(item.b, item.n, first_row, col * block_k)
                    x, _ = plane.logits(x, ops, at, masked)
                m_tile = jnp.max(x, axis=1) * unit
                if config.lazy_rescale and not first:
                    raised = ptx.warp_any_positive(m_tile - m - LAZY)
                    m_new = lax.cond(raised != 0, lambda: jnp.maximum(m, m_tile), lambda: m)
                else:
                    raised, m_new = None, jnp.maximum(m, m_tile)
                # While a row has seen no visible key its maximum is -inf; 0 in its place keeps exp(-inf - m) = 0.
                shift = jnp.where(m_new == -jnp.inf, 0.0, m_new) if guard else m_new
                alpha = jnp.exp2(m - shift)
                p = jnp.exp2(x * unit - along_rows(shift, x.shape))
                l = l * along_rows(alpha, (R, 8)) + functools.reduce(
                    jnp.add, [p[:, c : c + 8] for c in range(0, block_k, 8)]
                )
                return p, m_new, l, alpha, raised

            def do(item, carry):
                items, step = carry
                b, n, row, live, *_ = item
                q_slot = lax.rem(items, q_stages)
                q = shared.q.at[q_slot, pl.ds(me * R, R)]
                if out_in_q and q_stages == 1:
                    free_queries_before(items)
                m = plgpu.layout_cast(jnp.full((R,), -jnp.inf, jnp.float32), ROWS)
                l = plgpu.layout_cast(jnp.zeros((R, 8), jnp.float32), TILE)
                o = plgpu.layout_cast(jnp.zeros((R, Hv), jnp.float32), TILE)
                x_zero = plgpu.layout_cast(jnp.zeros((R, block_k), jnp.float32), TILE)
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(shared.q_full.at[q_slot])
                plgpu.barrier_wait(shared.k_full.at[slot])
                wait_turn()

                def first_scores(s):
                    plgpu.wgmma(s, q, shared.k.at[slot].transpose((1, 0)))
                    pass_turn()
                    if out_in_q and q_stages > 1:
                        free_queries_before(items)
                    return s[...]

                x = pl.run_scoped(first_scores, Accumulator((R, block_k), jnp.float32))
                plgpu.barrier_arrive(shared.k_free.at[slot])
                p, m, l, _, _ = softmax(x, m, l, item, 0, masks, first=True)
                p = p.astype(query.dtype)

                def tile(masked, i, carry):
                    o, m, l, p = carry
                    slot, previous = lax.rem(step + i, stages), lax.rem(step + i - 1, stages)
                    plgpu.barrier_wait(shared.k_full.at[slot])
                    wait_turn()

                    def products(refs):
                        o_ref, m_ref, l_ref, p_ref, alpha_ref, raised_ref = refs

                        def scores(s):
                            # S = Q K^T of this tile, and behind it O += P V of the one before.
                            plgpu.wgmma(s, q, shared.k.at[slot].transpose((1, 0)))
                            plgpu.barrier_wait(shared.v_full.at[previous])
                            plgpu.wgmma(o_ref, p, shared.v.at[previous])
                            pass_turn()
                            return plgpu.wgmma_accumulator_load(s, wait_n=1)  # S is there, P V goes on

                        x = pl.run_scoped(scores, Accumulator((R, block_k), jnp.float32))
                        plgpu.barrier_arrive(shared.k_free.at[slot])
                        p_ref[...], m_ref[...], l_ref[...], alpha_ref[...], raised = softmax(x, m, l, item, i, masked)
                        if raised is not None:
                            raised_ref[...] = raised

                    # Probabilities are rounded once P V is done: it reads the registers of the ones before until then.
                    state = (Accumulator.init(o), m, l, x_zero, m, lax.rem(i, 2))
                    o, m, l, p, alpha, raised = pl.run_state(products)(state)
                    plgpu.barrier_arrive(shared.v_free.at[previous])
                    if config.lazy_rescale:
                        o = lax.cond(raised != 0, lambda: o * along_rows(alpha, o.shape), lambda: o)
                    else:
                        o = o * along_rows(alpha, o.shape)
                    return o, m, l, p.astype(query.dtype)

                o, m, l, p = walk.sweep(item, tile, (o, m, l, p), first=1)
                if not out_in_q:
                    plgpu.barrier_arrive(shared.q_free.at[q_slot])
                slot = lax.rem(step + live - 1, stages)
                plgpu.barrier_wait(shared.v_full.at[slot])
                wait_turn()

                def last_product(o_ref):
                    plgpu.wgmma(o_ref, p, shared.v.at[slot])
                    pass_turn()

                o = pl.run_state(last_product)(Accumulator.init(o))
                plgpu.barrier_arrive(shared.v_free.at[slot])
                l = jnp.sum(l, axis=1)
                if ops.sink is not None:
                    # The sink is one more logit without a value.
                    sink = ops.sink[n].astype(jnp.float32) * LOG2E
                    m_new = jnp.maximum(m, sink)
                    shift = jnp.where(m_new == -jnp.inf, 0.0, m_new)
                    alpha = jnp.exp2(m - shift)
                    l, m, o = l * alpha + jnp.exp2(sink - shift), m_new, o * along_rows(alpha, o.shape)
                empty = l == 0
                l = jnp.where(empty, 1.0, l)
                out_smem = q if out_in_q else shared.out.at[me]
                if not out_in_q:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem[...] = (o * along_rows(1 / l, o.shape)).astype(query.dtype)
                shared.lse[me] = jnp.where(empty, -jnp.inf, m * LN2 + jnp.log(l))
                plgpu.commit_smem()
                r = pl.ds(row * block_q + me * R, R)
                plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[b, r, pl.ds(n * Hv, Hv)])
                plgpu.copy_smem_to_gmem(shared.lse.at[me], lse_gmem.at[b, n, r])
                return items + 1, step + live

            items, _ = walk.for_each(do, (jnp.int32(0), jnp.int32(0)))
            if out_in_q:
                free_queries_before(items)
            # Takes the turn that is left over: a hardware barrier must not end a kernel half full.
            pl.when(me == 0)(wait_turn)
            plgpu.wait_smem_to_gmem(0)

    memory = functools.partial(tile_memory, dtype=query.dtype)
    scratch = _Shared(
        q=memory(q_stages, block_q, H),
        k=memory(stages, block_k, H),
        v=memory(stages, block_k, Hv, depth=block_k),
        out=plgpu.SMEM((8,), jnp.int32) if out_in_q else memory(consumers, R, Hv),
        lse=plgpu.SMEM((consumers, R), jnp.float32),
        q_full=plgpu.Barrier(num_barriers=q_stages),
        q_free=plgpu.Barrier(num_arrivals=consumers, num_barriers=q_stages),
        k_full=plgpu.Barrier(num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        v_full=plgpu.Barrier(num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
    )
    out_type = (
        jax.ShapeDtypeStruct((B, ops.query.shape[1], N * Hv), query.dtype),
        jax.ShapeDtypeStruct((B, N, rows * block_q), jnp.float32),
    )
    kernel = work_lib.persistent(
        flash_attention_sm90, out_type, scratch, num_sms, consumers, **cost_estimate(plane, products=2)
    )
    out, lse = kernel(*leaves)
    return out.reshape(B, -1, N, Hv)[:, :T, :, : value.shape[3]], lse[:, :, :T]
