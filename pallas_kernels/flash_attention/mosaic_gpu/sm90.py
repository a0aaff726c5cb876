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

An asynchronous softmax (core/softmax.py) has one constant c in place of the running maximum: no reduction across
threads in the loop, nothing to wait for before exp, no accumulator to rescale. Its kernel says which rows are out of
bounds, and a second launch, of the ordinary kernel, works on the tiles that hold such rows, in place.

The backward pass is in sm90_backward.py; wide heads take that of sm80.py, whose instructions Hopper has too.

Source: Shah et al., "FlashAttention-3", 2024, sections 3.1 and 3.2.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.core.mma import tile_memory
from pallas_kernels.core.softmax import UnifiedMax
from pallas_kernels.flash_attention.config import Sm90Config
from pallas_kernels.flash_attention.mosaic_gpu import ptx, sm80
from pallas_kernels.flash_attention.mosaic_gpu import work as work_lib
from pallas_kernels.flash_attention.mosaic_gpu.plane import (
    LOG2E,
    At,
    Operands,
    Plane,
    along_rows,
    cost_estimate,
    pad,
    prepare,
    zero_of_step,
)
from pallas_kernels.flash_attention.tiles import Schedule
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
    bad: Any  # [consumers, R], of an asynchronous softmax
    q_full: Any
    q_free: Any
    k_full: Any
    k_free: Any
    v_full: Any
    v_free: Any


SCRATCH = len(_Shared._fields)


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
    launch = _launch(query, key, value, bias, sink, mask, scale, soft_cap, config, num_sms)
    return launch.unpadded(*launch.run(), Hv=value.shape[3])


def forward_asynchronously(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    sink: jax.Array | None,
    mask: Mask | None,
    unified_max: UnifiedMax,
    *,
    scale: float,
    soft_cap: float | None,
    config: Sm90Config,
    num_sms: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `forward`, and how many rows of each batch element were out of bounds and computed again, int32 [B]."""
    if config.lazy_rescale:
        raise ValueError("lazy_rescale=True is for an online softmax: with unified_max there is no maximum to raise.")
    launch = _launch(query, key, value, bias, sink, mask, scale, soft_cap, config, num_sms)
    out, lse, bad = launch.run(unified_max)
    bad = bad[:, :, : launch.plane.T] > 0  # rows beyond T are zeros, wherever phi is
    out, lse = launch.again(bad, out, lse)
    return *launch.unpadded(out, lse, Hv=value.shape[3]), jnp.sum(bad, axis=(1, 2), dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class _Launch:
    """A forward pass that is ready to run, with either softmax, over all of its work or some."""

    plane: Plane
    schedule: Schedule
    ops: Operands
    work: work_lib.Work
    config: Sm90Config
    num_sms: int

    @property
    def block_q(self) -> int:
        return R * self.config.consumers

    @property
    def out_type(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Output [B, T', N * Hv], and LSE [B, N, rows of tiles * block_q]."""
        plane, rows = self.plane, self.schedule.live.shape[-1]
        return (
            jax.ShapeDtypeStruct((plane.B, self.ops.query.shape[1], plane.N * plane.Hv), plane.dtype),
            jax.ShapeDtypeStruct((plane.B, plane.N, rows * self.block_q), jnp.float32),
        )

    def unpadded(self, out: jax.Array, lse: jax.Array, Hv: int) -> tuple[jax.Array, jax.Array]:
        plane = self.plane
        return out.reshape(plane.B, -1, plane.N, plane.Hv)[:, : plane.T, :, :Hv], lse[:, :, : plane.T]

    def run(self, unified_max: UnifiedMax | None = None) -> Sequence[jax.Array]:
        """Output and LSE, and of an asynchronous softmax which rows are out of bounds, as the LSE 1 or 0."""
        if unified_max is None:
            leaves, tree = jax.tree.flatten((self.ops, self.work, None))
            return _kernel(self, tree, None, self.out_type)(*leaves)
        leaves, tree = jax.tree.flatten((self.ops, self.work, unified_max.per_head(self.plane.N)))
        bounds = unified_max.low, unified_max.high
        return _kernel(self, tree, bounds, (*self.out_type, self.out_type[1]))(*leaves)

    def again(self, bad: jax.Array, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Output and LSE where the tiles that hold a bad row, [B, N, T], come from an online softmax."""
        tiles = pad(bad, {2: lse.shape[2]}).reshape(*bad.shape[:2], -1, self.block_q).any(-1)
        leaves, tree = jax.tree.flatten((self.ops, work_lib.some_of(self.work, tiles), None))

        # In place: reading and writing all outputs once more would cost more than the technique gains.
        @jax.custom_batching.custom_vmap
        def run(tiles, out, lse, *leaves):
            refs = jax.new_ref(out), jax.new_ref(lse)
            # In a loop, XLA joins a kernel with the slices that it reads, and the array of the loop that it writes, and
            # forgets that it works in place. It does not look beyond a barrier.
            _kernel(self, tree, None, ())(*lax.optimization_barrier(leaves), *refs)
            return lax.optimization_barrier((refs[0][...], refs[1][...]))

        # The rule that Pallas has for vmap does not know an array that is both input and output.
        @jax.custom_batching.sequential_vmap
        def run_in_a_loop(tiles, out, lse, *leaves):
            new_out, new_lse = _kernel(self, tree, None, self.out_type)(*leaves)
            rows = jnp.repeat(tiles, self.block_q, axis=2)
            of_out = jnp.repeat(jnp.swapaxes(rows, 1, 2)[:, : out.shape[1]], self.plane.Hv, axis=2)
            return jnp.where(of_out, new_out, out), jnp.where(rows, new_lse, lse)

        @run.def_vmap
        def rule(axis_size, batched, *arguments):
            in_axes = [0 if is_batched else None for is_batched in batched]
            return jax.vmap(run_in_a_loop, in_axes, axis_size=axis_size)(*arguments), (True, True)

        return run(tiles, out, lse, *leaves)


def _launch(query, key, value, bias, sink, mask, scale, soft_cap, config: Sm90Config, num_sms: int) -> _Launch:
    """Arguments as of `forward`."""
    (B, _, N, _), block_q = query.shape, R * config.consumers
    inputs = query, key, value, bias, sink, mask, scale, soft_cap
    plane, schedule, ops = prepare(*inputs, block_q, config.block_k, acc=TILE, copies_fill=True)
    config.check_smem(plane.H, plane.Hv)
    bytes_of_plane = 2 * plane.S * (plane.H + plane.Hv) * plane.K // N  # heads of a group share keys and values
    work = work_lib.plan(schedule, B, N, num_sms, L2_BYTES // bytes_of_plane)
    return _Launch(plane, schedule, ops, work, config, num_sms)


def _kernel(
    launch: _Launch, tree: Any, bounds: tuple[float, float] | None, out_type: Sequence[jax.ShapeDtypeStruct]
) -> Callable:
    """The kernel. Its arguments are the leaves of `tree`: operands, work, and phi of an asynchronous softmax, [N]; and,
    if there is no `out_type`, where output and LSE go.

    Args:
      bounds: how far logits may be below and above phi; None means an online softmax.
    """
    plane, schedule, config, num_sms = launch.plane, launch.schedule, launch.config, launch.num_sms
    consumers, stages, block_k, block_q = config.consumers, config.stages, config.block_k, launch.block_q
    q_stages, out_in_q = config.q_stages, plane.Hv == plane.H
    N, H, Hv, unit = plane.N, plane.H, plane.Hv, plane.unit
    masks = work_lib.some_mixed(schedule)
    guard = masks or plane.has_bias  # whether a row may see nothing but -inf
    asynchronous = bounds is not None
    low, high = bounds or (0.0, 0.0)

    def flash_attention_sm90(*refs):
        inputs, refs = refs[: tree.num_leaves], refs[tree.num_leaves :]
        ops, work, phi_gmem = tree.unflatten(inputs)
        (out_gmem, lse_gmem, *bad_gmem), scratch = refs[:-SCRATCH], refs[-SCRATCH:]
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

            def softmax(x, m, l, center, item, i, masked, first=False):
                """Probabilities of products x [R, C], m and l of each row, and what `rescaled` has to know of m.

                m is the maximum, or |x - c| at most, and l the sum. All is in base 2. What would be reduced across
                threads is kept in 8 columns, to be reduced at the end.
                """
                visible = None
                if masked or not plane.plain:
                    col = walk.column(item, i)
                    first_row = item.row * block_q + me * R + zero_of_step(col + i)
                    at = At(item.b, item.n, first_row, col * block_k)
                    x, _ = plane.logits(x, ops, at, masked and not asynchronous)
                    visible = plane.visibility(ops, at, x.shape) if masked and asynchronous else None
                if not asynchronous:
                    return online(x, m, l, first)
                if plane.has_bias:
                    seen = x != -jnp.inf
                    visible = seen if visible is None else visible & seen
                return *around(center, x, visible, m, l), ()

            def around(center, x, visible, m, l):
                x = x * unit - center
                distance, p = jnp.abs(x), jnp.exp2(x)
                if visible is not None:
                    distance, p = jnp.where(visible, distance, 0.0), jnp.where(visible, p, 0.0)
                return p, jnp.maximum(m, in_8_columns(jnp.maximum, distance)), l + in_8_columns(jnp.add, p)

            def online(x, m, l, first):
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
                l = l * along_rows(alpha, (R, 8)) + in_8_columns(jnp.add, p)
                return p, m_new, l, (alpha,) if raised is None else (alpha, raised)

            def rescaled(o, alpha=None, raised=None):
                """Earlier sums of values, now that m has grown."""
                if alpha is None:
                    return o
                if raised is None:
                    return o * along_rows(alpha, o.shape)
                return lax.cond(raised != 0, lambda: o * along_rows(alpha, o.shape), lambda: o)

            def do(item, carry):
                items, step = carry
                b, n, row, live, *_ = item
                # Any constant gives the same softmax. Halfway between the bounds, one maximum of |x - c| sees to both.
                center = (phi_gmem[n] + (low + high) / 2) * LOG2E if asynchronous else 0.0
                q_slot = lax.rem(items, q_stages)
                q = shared.q.at[q_slot, pl.ds(me * R, R)]
                if out_in_q and q_stages == 1:
                    free_queries_before(items)
                l = plgpu.layout_cast(jnp.zeros((R, 8), jnp.float32), TILE)
                m = plgpu.layout_cast(jnp.full((R,), -jnp.inf, jnp.float32), ROWS) if not asynchronous else l
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
                p, m, l, _ = softmax(x, m, l, center, item, 0, masks, first=True)
                p = p.astype(plane.dtype)

                def tile(masked, i, carry):
                    o, m, l, p = carry
                    slot, previous = lax.rem(step + i, stages), lax.rem(step + i - 1, stages)
                    plgpu.barrier_wait(shared.k_full.at[slot])
                    wait_turn()

                    def products(refs):
                        o_ref, m_ref, l_ref, p_ref, *growth_refs = refs

                        def scores(s):
                            # S = Q K^T of this tile, and behind it O += P V of the one before.
                            plgpu.wgmma(s, q, shared.k.at[slot].transpose((1, 0)))
                            plgpu.barrier_wait(shared.v_full.at[previous])
                            plgpu.wgmma(o_ref, p, shared.v.at[previous])
                            pass_turn()
                            return plgpu.wgmma_accumulator_load(s, wait_n=1)  # S is there, P V goes on

                        x = pl.run_scoped(scores, Accumulator((R, block_k), jnp.float32))
                        plgpu.barrier_arrive(shared.k_free.at[slot])
                        p_ref[...], m_ref[...], l_ref[...], growth = softmax(x, m, l, center, item, i, masked)
                        for ref, number in zip(growth_refs, growth, strict=True):
                            ref[...] = number

                    # Probabilities are rounded once P V is done: it reads the registers of the ones before until then.
                    growth = () if asynchronous else (m, lax.rem(i, 2)) if config.lazy_rescale else (m,)
                    o, m, l, p, *growth = pl.run_state(products)((Accumulator.init(o), m, l, x_zero, *growth))
                    plgpu.barrier_arrive(shared.v_free.at[previous])
                    return rescaled(o, *growth), m, l, p.astype(plane.dtype)

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
                if asynchronous:
                    bad = jnp.where(jnp.max(m, axis=1) >= (high - low) / 2 * LOG2E, 1.0, 0.0)
                    m = jnp.where(l == 0, -jnp.inf, center)
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
                out_smem[...] = (o * along_rows(1 / l, o.shape)).astype(plane.dtype)
                shared.lse[me] = jnp.where(empty, -jnp.inf, m * LN2 + jnp.log(l))
                if asynchronous:
                    shared.bad[me] = bad
                plgpu.commit_smem()
                r = pl.ds(row * block_q + me * R, R)
                plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[b, r, pl.ds(n * Hv, Hv)])
                plgpu.copy_smem_to_gmem(shared.lse.at[me], lse_gmem.at[b, n, r])
                for gmem in bad_gmem:
                    plgpu.copy_smem_to_gmem(shared.bad.at[me], gmem.at[b, n, r])
                return items + 1, step + live

            items, _ = walk.for_each(do, (jnp.int32(0), jnp.int32(0)))
            if out_in_q:
                free_queries_before(items)
            # Takes the turn that is left over: a hardware barrier must not end a kernel half full.
            pl.when(me == 0)(wait_turn)
            plgpu.wait_smem_to_gmem(0)

    def in_8_columns(operation, x):
        return functools.reduce(operation, [x[:, c : c + 8] for c in range(0, block_k, 8)])

    memory, stand_in = functools.partial(tile_memory, dtype=plane.dtype), plgpu.SMEM((8,), jnp.int32)
    rows_of_consumers = plgpu.SMEM((consumers, R), jnp.float32)
    scratch = _Shared(
        q=memory(q_stages, block_q, H),
        k=memory(stages, block_k, H),
        v=memory(stages, block_k, Hv, depth=block_k),
        out=stand_in if out_in_q else memory(consumers, R, Hv),
        lse=rows_of_consumers,
        bad=rows_of_consumers if asynchronous else stand_in,
        q_full=plgpu.Barrier(num_barriers=q_stages),
        q_free=plgpu.Barrier(num_arrivals=consumers, num_barriers=q_stages),
        k_full=plgpu.Barrier(num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        v_full=plgpu.Barrier(num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
    )
    return work_lib.persistent(
        flash_attention_sm90, out_type, scratch, num_sms, consumers, **cost_estimate(plane, products=2)
    )
