# SPDX-License-Identifier: Apache-2.0
"""decode_attention for TPUs: the cache goes to the chip once, in blocks as large as the cost of a step asks for.

A grid step takes a chunk of C keys of one sequence, with all K heads as they lie in memory, and all queries of the
sequence, R = T * N rows. One product gives the logits of every query with every head of keys; those of other heads are
hidden like keys that are out of sight, and weigh nothing in the second product:

    keys [C * K, H]             k0h0 k0h1 k1h0 k1h1 ...
    S [R, C * K] = Q K^T   h0     x    .    x    .          a dot is hidden: p = 0
                           h1     .    x    .    x
    acc [R, Hv] += P V

That is K times the products that are needed, on a matrix unit that has to load each 128 x 128 tile of keys anyway, and
needs no rearranging: a head's own keys are every K-th row, which a block of whole tiles does not have.

    grid   (b, split, step)    a step beyond the last chunk of a split stays where it is: it copies and computes nothing

The pipeline of Pallas copies the next chunk while this one is computed. In a paged cache a chunk is several pages, each
an operand of its own, whose index is read in the page table.

Splits leave acc, the maximum and the sum of exponentials of each row, which `_merge` adds up in order.

Source: Dao et al., "Flash-Decoding for long-context inference", 2023; Hong et al., "FlashDecoding++", 2023, section 3.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.core.softmax import UnifiedMax
from pallas_kernels.core.tpu import LANES, VMEM_BYTES, dot, round_up
from pallas_kernels.core.varying import vary_like
from pallas_kernels.decode_attention.cache import Cache
from pallas_kernels.decode_attention.config import MosaicTpuConfig, mosaic_tpu_heuristic

# Entries of lengths and page tables, in int32: half of the scalar memory.
SCALAR_WORDS = 2**17
# Rows that the vector unit takes at a time: a tile of bfloat16.
BLOCK_ROWS = 16


def supports(call: Call, device: Device) -> Refusal | None:
    if device.platform != "tpu":
        return Refusal(f"its kernels are for TPUs, and this is {device.platform}")
    if not device.arch:
        return Refusal(f"its kernels are compiled for TPU v4 and later, and this is {device.kind}")
    s, dtype = call.sizes, call.arguments[0].dtype
    if dtype not in ("float32", "bfloat16"):
        return Refusal(f"TPUs compute in float32 and bfloat16, not in {dtype}")
    if (words := s["B"] * (1 + s.get("pages", 0))) > SCALAR_WORDS:
        return Refusal(f"lengths and page table have {words} entries, and scalar memory has room for {SCALAR_WORDS}")
    if s["H"] == 1 or call.option("S") * s["K"] == 1 or s.get("page", 2) * s["K"] == 1:
        return Refusal("a product over one number, a head of H=1 or one row of keys, is none for the matrix unit")
    needed = mosaic_tpu_heuristic(call, device).vmem_bytes(call)
    if needed > VMEM_BYTES:
        mib = f"{needed / 2**20:.0f} MiB of on-chip memory, and it plans with {VMEM_BYTES // 2**20}"
        return Refusal(
            f"T * N = {s['T'] * s['N']} queries and K={s['K']} key heads of H={s['H']}, Hv={s['Hv']} need {mib}"
        )
    return None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is known while tracing."""

    B: int
    T: int
    N: int
    K: int
    H: int
    Hv: int
    R: int  # rows of queries, T * N of them real: row t * N + n
    keys: int  # of one copy
    copies: int  # of a chunk
    page: int | None
    S: int
    splits: int
    soft_cap: float | None
    window: int | None

    @property
    def C(self) -> int:
        """Keys of a chunk."""
        return self.keys * self.copies

    @property
    def chunks(self) -> int:
        """Of a split."""
        return -(-self.S // (self.C * self.splits))

    def live(self, length, split) -> tuple[Any, Any]:
        """The chunks of a split that some query sees: the first, and the end."""
        oldest = 0 if self.window is None else lax.div(jnp.maximum(length - self.T + 1 - self.window, 0), self.C)
        end = jnp.minimum((split + 1) * self.chunks, lax.div(jnp.minimum(length, self.S) + self.C - 1, self.C))
        return jnp.maximum(split * self.chunks, oldest), end

    def chunk(self, length, split, step) -> Any:
        """The chunk of a step. One that is not live names the live chunk nearest to it, which is on the chip already or
        will be needed next."""
        first, end = self.live(length, split)
        newest = jnp.maximum(lax.div(jnp.minimum(length, self.S) + self.C - 1, self.C) - 1, 0)
        oldest = self.live(length, 0)[0]
        return jnp.clip(jnp.minimum(first + step, end - 1), jnp.minimum(oldest, newest), newest)


class _Rows(NamedTuple):
    """Numbers of query rows, [R, 1] each. The same tuple holds their BlockSpecs and, inside a kernel, references."""

    head: Any  # int32, the key head that a row reads; -1 in padding
    t: Any  # int32
    unit: Any  # float32, what one unit of q.k is worth as a logit
    phi: Any  # float32, or None


def forward(
    query: jax.Array,
    cache: Cache,
    sink: jax.Array | None,
    unified_max: UnifiedMax | None,
    *,
    scale: float,
    soft_cap: float | None,
    window: int | None,
    num_splits: int | None,
    config: MosaicTpuConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `xla.forward`."""
    (B, T, N, H), (K, Hv) = query.shape, cache.value.shape[2:]
    page = None if cache.page_table is None else cache.key.shape[1]
    keys, copies = config.copies(cache.S, page, K, cache.key.dtype)
    splits = num_splits or config.num_splits
    R = round_up(T * N, BLOCK_ROWS)
    plan = _Plan(B, T, N, K, H, Hv, R, keys, copies, page, cache.S, splits, soft_cap, window)
    head = jnp.arange(N) // (N // K)
    unit = jnp.full(N, scale) if cache.key_scale is None else scale * cache.key_scale.astype(jnp.float32)[head]
    rows = _Rows(
        head=_of_rows(plan, jnp.tile(head, T), -1),
        t=_of_rows(plan, jnp.repeat(jnp.arange(T), N)),
        unit=_of_rows(plan, jnp.tile(unit.astype(jnp.float32), T)),
        phi=None if unified_max is None else _of_rows(plan, jnp.tile(unified_max.per_head(N), T)),
    )
    queries = jnp.pad(query.reshape(B, T * N, H), ((0, 0), (0, R - T * N), (0, 0)))
    lengths = cache.lengths.astype(jnp.int32)
    acc, m, l, bad = _splits(plan, queries, cache, lengths, rows, unified_max)
    if unified_max is not None:
        # Sequences without a row out of bounds have no keys the second time.
        again = jnp.where(jnp.any(bad, axis=(1, 2)), lengths, 0)
        online = rows._replace(phi=None)
        acc, m, l = lax.cond(
            jnp.any(bad),
            lambda: _choose(jnp.any(bad, axis=1), _splits(plan, queries, cache, again, online, None)[:3], (acc, m, l)),
            lambda: (acc, m, l),
        )
    out, lse = _merge(plan, acc, m, l, sink, cache.value_scale)
    recomputed = jnp.sum(jnp.any(bad, axis=1), axis=1, dtype=jnp.int32)
    return out.reshape(B, T, N, Hv).astype(query.dtype), jnp.swapaxes(lse.reshape(B, T, N), 1, 2), recomputed


def _of_rows(plan: _Plan, x: jax.Array, padding: int = 0) -> jax.Array:
    """[T * N] as [R, 1]."""
    return jnp.pad(x, (0, plan.R - len(x)), constant_values=padding)[:, None]


def _choose(rows: jax.Array, yes: tuple, no: tuple) -> tuple:
    """Of [B, splits, T * N, ...] the rows [B, T * N] of `yes`, and the others of `no`."""
    return tuple(jnp.where(rows[:, None, :, *[None] * (a.ndim - 3)], a, b) for a, b in zip(yes, no, strict=True))


def _merge(
    plan: _Plan, acc: jax.Array, m: jax.Array, l: jax.Array, sink: jax.Array | None, value_scale: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T * N, Hv] and LSE [B, T * N] in float32; splits are added up in order."""
    most = jnp.max(m, axis=1)
    logit = jnp.full_like(most, -jnp.inf) if sink is None else jnp.tile(sink.astype(jnp.float32), plan.T)[None]
    most = jnp.maximum(most, logit)
    shift = jnp.where(jnp.isneginf(most), 0, most)
    total, out = jnp.exp(logit - shift), jnp.zeros_like(acc[:, 0])
    for split in range(plan.splits):
        weight = jnp.exp(m[:, split] - shift)
        total, out = total + l[:, split] * weight, out + acc[:, split] * weight[..., None]
    empty = total == 0
    out = out / jnp.where(empty, 1, total)[..., None]
    if value_scale is not None:
        out = out * jnp.tile(jnp.repeat(value_scale.astype(jnp.float32), plan.N // plan.K), plan.T)[:, None]
    return out, jnp.where(empty, -jnp.inf, shift + jnp.log(jnp.where(empty, 1, total)))


def _splits(
    plan: _Plan, queries: jax.Array, cache: Cache, lengths: jax.Array, rows: _Rows, bounds: UnifiedMax | None
) -> tuple[jax.Array, ...]:
    """What each split adds up: acc [B, splits, T * N, Hv], m and l [B, splits, T * N], and whether a logit was out of
    bounds, likewise.

    Args:
      queries: [B, R, H].
      lengths: int32 [B].
      bounds: of an asynchronous softmax; None asks for the online one.
    """
    B, R, H, Hv, splits, columns = plan.B, plan.R, plan.H, plan.Hv, plan.splits, plan.C * plan.K
    # Rows of keys in the order that they have in memory: XLA changes the shape, and moves nothing, where K heads fill
    # whole tiles.
    key, value = (x.reshape(x.shape[0], -1, x.shape[3]) for x in (cache.key, cache.value))
    heads = jnp.tile(jnp.arange(plan.K, dtype=jnp.int32), plan.C)[None]
    table = () if cache.page_table is None else (cache.page_table.astype(jnp.int32).reshape(-1),)
    # Steps that the longest split takes: the grid is as long as the device finds it to be.
    first, end = plan.live(lengths[:, None], jnp.arange(splits, dtype=jnp.int32))
    steps = jnp.maximum(jnp.max(end - first), 1)
    scalars = (lengths, *table)
    operands = (queries, rows, heads, (key,) * plan.copies, (value,) * plan.copies)
    scalars, operands = vary_like((scalars, operands), (scalars, operands))

    def once(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda b, split, step, *_: (0,) * len(shape))

    def pieces(width: int) -> tuple[pl.BlockSpec, ...]:
        return tuple(
            pl.BlockSpec((None, plan.keys * plan.K, width), functools.partial(_piece, plan, cache.key.shape[0], i))
            for i in range(plan.copies)
        )

    def of_split(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, R, width), lambda b, split, step, *_: (b, split, 0, 0))

    axis_type = jax.typeof(operands[0]).manual_axis_type
    item = jnp.dtype(cache.key.dtype).itemsize
    acc, statistics = pl.pallas_call(
        functools.partial(_kernel, plan, bounds, len(scalars)),
        out_shape=[
            jax.ShapeDtypeStruct((B, splits, R, width), jnp.float32, manual_axis_type=axis_type)
            for width in (Hv, LANES)
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, splits, steps),
            in_specs=[
                pl.BlockSpec((None, R, H), lambda b, split, step, *_: (b, 0, 0)),
                jax.tree.map(lambda _: once(R, 1), rows),
                once(1, columns),
                pieces(H),
                pieces(Hv),
            ],
            out_specs=[of_split(Hv), of_split(LANES)],
            scratch_shapes=[
                *[pltpu.VMEM((R, LANES), jnp.float32)] * 3,  # m, l, out of bounds
                pltpu.VMEM((R, columns), jnp.float32),  # S
                pltpu.VMEM((R, columns), queries.dtype),  # P
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        # Every sequence full.
        cost_estimate=pl.CostEstimate(
            flops=2 * B * R * plan.S * plan.K * (H + Hv),
            transcendentals=B * R * plan.S * plan.K,
            bytes_accessed=B * plan.S * plan.K * (H + Hv) * item + 4 * B * splits * R * (Hv + LANES),
        ),
        name="decode_attention",
    )(*scalars, *operands)
    real = slice(plan.T * plan.N)
    m, l, bad = (statistics[:, :, real, lane] for lane in range(3))
    return acc[:, :, real], m, l, bad > 0


def _piece(plan: _Plan, rows: int, i: int, b, split, step, lengths, *table) -> tuple:
    """Where copy number i of a step's chunk lies, in blocks of [rows, page * K or S * K, width]."""
    length = jnp.minimum(lengths[b], plan.S)
    piece = plan.chunk(lengths[b], split, step) * plan.copies + i
    if plan.page is None:
        return b, piece, 0
    # Beyond a sequence's last page stay at what this operand had in the chunk before.
    last = jnp.maximum(lax.div(length + plan.keys - 1, plan.keys) - 1, 0)
    piece = jnp.where(piece > last, jnp.where(piece >= plan.copies, piece - plan.copies, last), piece)
    of_page = plan.page // plan.keys
    pages = plan.S // plan.page
    number = jnp.clip(table[0][b * pages + lax.div(piece, of_page)], 0, rows - 1)
    return number, lax.rem(piece, of_page), 0


def _kernel(plan: _Plan, bounds: UnifiedMax | None, scalars: int, *refs) -> None:
    lengths_ref = refs[0]
    q_ref, rows, heads_ref, k_refs, v_refs, acc_ref, statistics_ref, *scratch = refs[scalars:]
    m_ref, l_ref, bad_ref, s_ref, p_ref = scratch
    split, step = pl.program_id(1), pl.program_id(2)
    length = lengths_ref[pl.program_id(0)]
    first, end = plan.live(length, split)
    first_key = (first + step) * plan.C
    dtype, columns = q_ref.dtype, plan.C * plan.K

    @pl.when(step == 0)
    def _start():
        m_ref[...] = jnp.full_like(m_ref, -jnp.inf) if bounds is None else jnp.broadcast_to(rows.phi[...], m_ref.shape)
        l_ref[...] = jnp.zeros_like(l_ref)
        bad_ref[...] = jnp.zeros_like(bad_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def whole(pieces) -> jax.Array:
        """A chunk in the query's dtype: a quantized cache is exact in it, and its scales wait for the sums."""
        return jnp.concatenate([ref[...].astype(dtype) for ref in pieces], axis=0)

    def visible(r: Any, masked: bool) -> jax.Array:
        """Which columns the rows at r see, [block, C * K]: column c is head c % K of key first_key + c // K."""
        seen = rows.head[r, :] == heads_ref[...]
        if masked:
            c = lax.broadcasted_iota(jnp.int32, (BLOCK_ROWS, columns), 1)
            after = rows.t[r, :] + (length - plan.T + 1 - first_key)  # keys of the chunk up to the query's own
            seen = seen & (c < after * plan.K)
            if plan.window is not None:
                seen = seen & (c >= (after - plan.window) * plan.K)
        return seen

    def chunk(masked: bool) -> None:
        s_ref[...] = dot(q_ref[...], whole(k_refs), (1, 1))
        values = whole(v_refs)
        if masked:  # what lies behind the last key may be anything, and 0 times it must be 0
            c = lax.broadcasted_iota(jnp.int32, values.shape, 0)
            values = jnp.where(c < (length - first_key) * plan.K, values, jnp.zeros_like(values))

        def update(n, carry):
            r = pl.ds(pl.multiple_of(n * BLOCK_ROWS, BLOCK_ROWS), BLOCK_ROWS)
            x, seen = s_ref[r, :] * rows.unit[r, :], visible(r, masked)
            if plan.soft_cap is not None:
                x = plan.soft_cap * jnp.tanh(x / plan.soft_cap)
            m = m_ref[r, :]
            if bounds is None:
                x = jnp.where(seen, x, -jnp.inf)
                m_new = jnp.maximum(m, x.max(-1, keepdims=True))
                shift = jnp.where(m_new == -jnp.inf, 0.0, m_new)  # a query that has seen no key yet
                rescale = jnp.exp(m - shift)
                p = jnp.exp(x - shift[:, :1])
                m_ref[r, :] = m_new
                l_ref[r, :] = l_ref[r, :] * rescale + p.sum(-1, keepdims=True)
                acc_ref[r, :] = acc_ref[r, :] * rescale[:, :1]
            else:
                x = x - m[:, :1]  # m is phi: no chunk waits for another's maximum, nothing is rescaled
                p = jnp.where(seen, jnp.exp(x), 0.0)
                out_of_bounds = jnp.where(seen & bounds.out_of_bounds(x), 1.0, 0.0)
                bad_ref[r, :] = jnp.maximum(bad_ref[r, :], out_of_bounds.max(-1, keepdims=True))
                l_ref[r, :] = l_ref[r, :] + p.sum(-1, keepdims=True)
            p_ref[r, :] = p.astype(dtype)
            return carry

        lax.fori_loop(0, plan.R // BLOCK_ROWS, update, None)
        acc_ref[...] += dot(p_ref[...], values, (1, 0))

    # Compiled twice: chunks that every query sees whole have no code for masks but that of heads.
    live, full = first + step < end, first_key + plan.C <= length - plan.T + 1
    if plan.window is not None:
        full = full & (first_key >= length - plan.window)
    pl.when(live & full)(functools.partial(chunk, False))
    pl.when(live & jnp.logical_not(full))(functools.partial(chunk, True))

    @pl.when(step == pl.num_programs(2) - 1)
    def _finish():
        # One register row of each query: m, l and whether it is out of bounds, in its first three lanes.
        lane = lax.broadcasted_iota(jnp.int32, statistics_ref.shape, 1)
        statistics_ref[...] = jnp.where(lane == 0, m_ref[...], jnp.where(lane == 1, l_ref[...], bad_ref[...]))
