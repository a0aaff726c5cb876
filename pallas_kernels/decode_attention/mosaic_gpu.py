# SPDX-License-Identifier: Apache-2.0
"""decode_attention for NVIDIA GPUs from Ampere on: the cache is read once, by as many blocks as there is room for.

Keys of a sequence are cut in splits, and a block of one warpgroup takes one split of one key/value head. What it
computes is turned around, so that keys and values are the wide operands of the tensor cores (64 rows of them) and the
few queries, R = T * G rows padded to a multiple of 16, are the narrow ones:

    copies    K0 V0   K1 V1   K2 V2 ...                         run ahead through a ring of `stages` slots
    each      S^T [C, R]  = K [C, H] Q^T                        C keys of a chunk; a warp reads its own 16 rows of K
    chunk     P^T         = exp2(S^T - m)                       m: the maximum of the split so far, or phi
              O^T [Hv, R] = O^T exp2(m_before - m) + V^T P      P goes through shared memory, 1 KB

Slots hold the cache's own dtype. 8-bit keys are widened in registers, values by way of one 16-bit tile.
With an asynchronous softmax nothing depends on a maximum: warps do not wait for each other's, and O^T is not rescaled.
A split in which a logit is out of bounds does its keys again, with the online softmax.
Splits leave O^T, m and the sum of exponentials, and are added up in order. On Hopper they are a cluster, and each adds
up a part of the output out of the shared memory of all; elsewhere, or if they are many, a second kernel does: `_merge`.

Source: Dao et al., "Flash-Decoding for long-context inference", 2023; Hong et al., "FlashDecoding++", 2023, section 3.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import cluster
from pallas_kernels.core.device import MMA_ARCHS, Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.core.mma import (
    Ring,
    copies_of_device,
    cost_option,
    product,
    store,
    swizzle_bytes,
    tile_memory,
    widen,
)
from pallas_kernels.core.softmax import UnifiedMax
from pallas_kernels.decode_attention.cache import Cache
from pallas_kernels.decode_attention.config import MosaicGpuConfig

LOG2E = math.log2(math.e)
Ref = Any


def supports(call: Call, device: Device) -> Refusal | None:
    if device.platform != "gpu" or device.arch not in MMA_ARCHS:
        return Refusal(f"it is for NVIDIA GPUs of Ampere, Ada and Hopper, and this is {device}")
    s, dtype = call.sizes, call.arguments[0].dtype
    if dtype not in ("bfloat16", "float16"):
        return Refusal(f"its tensor-core products take bfloat16 and float16, not {dtype}; cast the inputs")
    cache = call.arguments[1].dtype
    if cache.startswith("float8") and device.arch not in ("sm89", "sm90"):
        return Refusal(
            f"{device.arch} has no instruction that converts {cache}; Ada and Hopper have, and int8 needs none"
        )
    if dtype == "float16" and call.option("unified_max") is not None:
        return Refusal("an asynchronous softmax has weights beyond the range of float16; use bfloat16")
    rows = s["T"] * s["N"] // s["K"]
    if rows > 64:
        return Refusal(f"T * N / K = {rows} rows share a key, and it has room for 64; flash_attention takes more")
    if s["H"] % 16 or s["Hv"] % 64 or max(s["H"], s["Hv"]) > 256:
        return Refusal(f"head dims H={s['H']}, Hv={s['Hv']}; it takes multiples of 16 and of 64, up to 256")
    if cache != dtype and s["H"] % 32:
        return Refusal(f"head dim H={s['H']} of a cache of {cache}; of 8 bits it takes multiples of 32")
    if (page := s.get("page")) and (page % 8 or (page < 64 and 64 % page) or (page > 64 and page % 64)):
        return Refusal(f"pages of {page} keys; it takes 8, 16, 32 and multiples of 64")
    if page and device.arch != "sm90" and any(page // 8 * (2 * h // swizzle_bytes(h)) % 4 for h in (s["H"], s["Hv"])):
        return Refusal(f"pages of {page} keys; four warps of {device.arch} copy them together, which takes 32 or more")
    multiple = 8 if device.arch == "sm90" or page else 64  # what copies of a ragged tail leave alone
    if call.option("S") % multiple:
        return Refusal(f"a cache of S={call.option('S')} keys; it takes multiples of {multiple} on {device.arch}")
    return None


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
    config: MosaicGpuConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `xla.forward`."""
    B, T, N, H = query.shape
    K = cache.value.shape[2]
    G, C = N // K, config.block_k
    splits = num_splits or config.num_splits
    R = _padded_rows(T * G, H)
    # Row t * G + g of a key head is query t of its head g.
    rows = jnp.swapaxes(query.reshape(B, T, K, G, H), 1, 2).reshape(B, K, T * G, H)
    phi = bounds = None
    if unified_max is not None:
        phi = _per_row(unified_max.per_head(N), T, K, R) * LOG2E
        bounds = unified_max.low * LOG2E, unified_max.high * LOG2E
    parts = _splits(
        rows,
        cache,
        None if sink is None else _per_row(sink, T, K, R) * LOG2E,
        phi,
        bounds,
        T=T,
        G=G,
        R=R,
        base=LOG2E * scale,
        soft_cap=soft_cap,
        window=window,
        splits=splits,
        chunks=None if num_splits is None else -(-cache.S // (C * splits)),
        config=config,
    )
    recomputed = jnp.zeros(B, jnp.int32)
    if unified_max is not None:
        *parts, out_of_bounds = parts
        bad = jnp.any(out_of_bounds > 0, axis=2)
        recomputed = jnp.sum(bad[..., : T * G], axis=(1, 2), dtype=jnp.int32)
    if len(parts) == 3:
        acc, m, l = parts
        parts = _merge(acc, m, l, sink, cache.value_scale, T=T, G=G, dtype=query.dtype)
    out, lse = parts
    out = jnp.swapaxes(out[:, :, : T * G].reshape(B, K, T, G, -1), 1, 2).reshape(B, T, N, -1)
    return out, jnp.swapaxes(lse[..., : T * G].reshape(B, K, T, G), 2, 3).reshape(B, N, T), recomputed


def _padded_rows(rows: int, H: int) -> int:
    """Multiples of 16 make whole swizzled tiles of weights; cp.async gives each of 4 warps the same number of tiles of
    8 queries."""
    tiles = 2 * H // swizzle_bytes(H)
    multiple = 16 if copies_of_device().fill else max(16, 32 // math.gcd(4, tiles))
    return rows + -rows % multiple


def _per_row(per_head: jax.Array, T: int, K: int, R: int) -> jax.Array:
    """Numbers of heads [N] as rows of key heads [K, R]."""
    rows = jnp.tile(per_head.astype(jnp.float32).reshape(K, 1, -1), (1, T, 1)).reshape(K, -1)
    return jnp.pad(rows, ((0, 0), (0, R - rows.shape[1])))


def _merge(
    acc: jax.Array,
    m: jax.Array,
    l: jax.Array,
    sink: jax.Array | None,
    value_scale: jax.Array | None,
    *,
    T: int,
    G: int,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, K, T * G, Hv] and LSE [B, K, T * G], a block for each row, of splits in order.

    Args:
      acc: O^T of splits [B, K, splits, Hv, R].
      m, l: in base 2 the maximum and the sum of exponentials [B, K, splits, R].
    """
    B, K, splits, Hv, _ = acc.shape
    layout: Any = plgpu.Layout.MMA_ACC(dtype).reduce(1)  # takes any multiple of 64
    options = {name: x for name, x in (("sink", sink), ("value_scale", value_scale)) if x is not None}

    def kernel(acc_gmem, m_gmem, l_gmem, *refs):
        option, (out_gmem, lse_gmem) = dict(zip(options, refs, strict=False)), refs[len(options) :]
        block = lax.axis_index("block")
        b, head, row = block // (K * T * G), block // (T * G) % K, lax.rem(block, T * G)
        logit_of_sink = option["sink"][head * G + lax.rem(row, G)] * LOG2E if "sink" in option else -jnp.inf

        def for_each_split(do: Any, carry: Any) -> Any:
            """carry = do(split, whether it is one, carry); what several splits load is in flight together."""
            at_once = min(16, splits)

            def some(i, carry):
                for s in range(at_once):
                    split = i * at_once + s
                    carry = do(jnp.minimum(split, splits - 1), split < splits, carry)
                return carry

            return lax.fori_loop(0, -(-splits // at_once), some, carry)

        most = for_each_split(lambda s, _, most: jnp.maximum(most, m_gmem[b, head, s, row]), jnp.float32(logit_of_sink))
        shift = jnp.where(most == -jnp.inf, 0.0, most)

        def add(split, there, carry):
            total, out = carry
            weight = jnp.where(there, jnp.exp2(m_gmem[b, head, split, row] - shift), 0.0)
            x = plgpu.load(acc_gmem.at[b, head, split, :, row], layout=layout, optimized=False)
            return total + l_gmem[b, head, split, row] * weight, out + x * weight

        nothing = plgpu.layout_cast(jnp.zeros((Hv,), jnp.float32), layout)
        total, out = for_each_split(add, (jnp.exp2(logit_of_sink - shift), nothing))
        worth = 1 / jnp.where(total == 0, 1.0, total)
        if "value_scale" in option:
            worth = worth * option["value_scale"][head]
        store(out_gmem.at[b, head, row], (out * worth).astype(dtype))
        lse_gmem[b, head, row] = jnp.where(total == 0, -jnp.inf, (shift + jnp.log2(total)) / LOG2E)

    kernel.__name__ = "decode_attention_merge"
    shape = B, K, T * G
    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((*shape, Hv), dtype), jax.ShapeDtypeStruct(shape, jnp.float32)),
        grid=(B * K * T * G,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **cost_option(flops=2 * acc.size, transcendentals=m.size, bytes_accessed=4 * acc.size),
    )(acc, m, l, *(x.astype(jnp.float32) for x in options.values()))


def _splits(
    rows: jax.Array,
    cache: Cache,
    sink: jax.Array | None,
    phi: jax.Array | None,
    bounds: tuple[float, float] | None,
    *,
    T: int,
    G: int,
    R: int,
    base: float,
    soft_cap: float | None,
    window: int | None,
    splits: int,
    chunks: int | None,
    config: MosaicGpuConfig,
) -> list[jax.Array]:
    """Attention of splits of `chunks` chunks; None shares those that a sequence has out evenly.

    Args:
      rows: queries [B, K, T * G, H], of which the kernel makes R.
      sink: in base 2, [K, R].
      phi: of an asynchronous softmax, in base 2, [K, R]; `bounds` likewise. None asks for the online one.

    Returns:
      Output [B, K, T * G or more, Hv] and LSE [B, K, R]; or, if the splits of a head are not one cluster, O^T, m and l
      as `_merge` wants them. Then, of an asynchronous softmax, which rows were out of bounds, [B, K, splits, R].
    """
    B, K, _, H = rows.shape
    Hv = cache.value.shape[3]
    C, stages, dtype, copies = config.block_k, config.stages, rows.dtype, copies_of_device()
    narrow = cache.value.dtype != dtype  # of 8 bits
    whole = copies.fill and splits <= config.cluster  # the splits of a head are one cluster, or there is one
    # Copies of Hopper fill rows that are not there by 0, if a tile of 8 begins where they do.
    filled = copies.fill and (T * G < 8 or T * G % 8 == 0)
    if not filled:
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, R - T * G), (0, 0)))
    paged = cache.page_table is not None
    page = cache.key.shape[1] if paged else C
    pieces = max(1, C // page)  # copies of a chunk
    columns = plgpu.Layout.MMA_ACC(dtype).reduce(0)  # one number a query
    acc_layout, left, right = plgpu.Layout.MMA_ACC(dtype), plgpu.Layout.MMA_LHS(dtype), plgpu.Layout.MMA_RHS(dtype)
    arrays = [x.reshape(*x.shape[:2], -1) for x in (cache.key, cache.value)]
    operands = [rows, cache.lengths.astype(jnp.int32), *arrays]
    options = {"table": cache.page_table, "key_scale": cache.key_scale, "phi": phi}
    options |= {"sink": sink, "value_scale": cache.value_scale} if whole else {}
    given = {name: x for name, x in options.items() if x is not None}
    operands += [x.astype(jnp.int32 if name == "table" else jnp.float32) for name, x in given.items()]

    def zeros(*shape: int) -> jax.Array:
        return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), acc_layout)

    def along_keys(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
        """One number a query, [R], the same for each row of a tile."""
        return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (1,)), acc_layout)

    def kernel(
        *refs,
        q,
        k,
        v,
        p,
        wide: Any = None,
        arrived: Any = None,
        q_arrived: Any = None,
        acc_smem: Any = None,
        m_smem: Any = None,
        l_smem: Any = None,
        out_smem: Any = None,
    ):
        rows_gmem, lengths_gmem, key_gmem, value_gmem, *more = refs[: len(operands)]
        outputs = list(refs[len(operands) :])
        bad_gmem = None if phi is None else outputs.pop()
        option = dict(zip(given, more, strict=True))
        table = option.get("table")
        block, split = lax.axis_index("block"), lax.axis_index("split")
        b, head = block // K, lax.rem(block, K)
        length = lengths_gmem[b]
        # Chunks that some query of this split sees.
        oldest = jnp.int32(0) if window is None else jnp.maximum(length - T + 1 - window, 0) // C
        count = lax.div(length + C - 1, C)
        if chunks is None:
            begin, each = oldest, lax.div(count - oldest + splits - 1, splits)
        else:
            begin, each = jnp.int32(0), chunks
        first = jnp.maximum(begin + split * each, oldest)
        end = jnp.minimum(begin + (split + 1) * each, count)
        live = jnp.maximum(end - first, 0)

        def rows_of(gmem: Ref, width: int, piece: int, step: Any) -> Ref:
            """Where a piece of a step's keys or values lies."""
            key = (first + step) * C + piece * page
            row, at = b, key
            if table is not None:
                number = jnp.minimum(key // page, table.shape[1] - 1)
                row, at = jnp.clip(table[b, number], 0, gmem.shape[0] - 1), lax.rem(key, page)
            return gmem.at[row, pl.ds(at, min(page, C)), pl.ds(head * width, width)]

        parts = [
            (functools.partial(rows_of, gmem, width, piece), slots.at[:, pl.ds(piece * page, min(page, C))])
            for gmem, slots, width in ((key_gmem, k, H), (value_gmem, v, Hv))
            for piece in range(pieces)
        ]
        ring = Ring(copies, stages, parts, arrived)

        def start() -> None:
            for step in range(stages - 1):
                ring.start(step, live)

        # Row 0, in words that do not tell that no R rows may follow.
        row = lax.div(split, splits) * 8
        copies.start(rows_gmem.at[b, head, pl.ds(row, R)], q, q_arrived)
        start()
        copies.wait(q_arrived, 0, live < 0)
        # 16 queries stay in registers, [64, R] of them a slice of H.
        held = [
            plgpu.load(q.at[:, pl.ds(d, min(64, H - d))].transpose((1, 0)), layout=right)
            for d in range(0, H, 64)
            if R == 16
        ]
        unit = base * option["key_scale"][head] if "key_scale" in option else base
        constant = None
        if phi is not None:
            constant = plgpu.load(option["phi"].at[head], layout=acc_layout.reduce(0), optimized=False)

        def logits(slot: Any) -> jax.Array:
            """S^T = K Q^T in base 2."""
            x = zeros(C, R)
            for i, queries in enumerate(held):
                keys = plgpu.load(k.at[slot, :, pl.ds(64 * i, queries.shape[0])], layout=left)
                x = plgpu.mma(x, widen(keys, dtype), queries)
            if not held:
                x = product(x, k.at[slot], q)
            if soft_cap is None:
                return x * unit
            # tanh(y) = 1 - 2 / (1 + exp(2 y)); the hardware's own tanh has 11 bits only.
            return soft_cap * LOG2E * (1 - 2 / (1 + jnp.exp2(x * (2 * unit / soft_cap))))

        def visible(first_key: Any) -> jax.Array:
            """Which keys of a chunk which queries see."""
            number = plgpu.broadcasted_iota(jnp.int32, (C,), 0, layout=acc_layout.reduce(1)) + first_key
            number = plgpu.layout_cast(lax.broadcast_in_dim(number, (C, R), (0,)), acc_layout)
            query = plgpu.broadcasted_iota(jnp.int32, (R,), 0, layout=acc_layout.reduce(0)) // G
            position = along_keys(query + (length - T), (C, R))
            seen = (number <= position) & (number < length)
            return seen if window is None else seen & (number > position - window)

        def widen_values(slot: Any) -> None:
            """ldmatrix transposes only 16-bit numbers. 8 adjacent a thread, read or written, meet no bank twice."""
            for key in range(0, C, 64):
                keys = pl.ds(key, 64)
                layout = plgpu.Layout.SMEM_GMEM_COPY((64, Hv), dtype, swizzle=swizzle_bytes(Hv))
                wide.at[keys][...] = widen(plgpu.load(v.at[slot, keys], layout=layout), dtype)

        def values_of(slot: Any, first_key: Any) -> jax.Array:
            """V^T. What lies behind the last key may be anything, and 0 times it must be 0."""
            x = plgpu.load((wide if narrow else v.at[slot]).transpose((1, 0)), layout=left)
            column = plgpu.broadcasted_iota(jnp.int32, (Hv, C), 1, layout=left)
            return lax.cond(
                first_key + C > length,
                lambda: jnp.where(column + first_key < length, x, jnp.zeros_like(x)),
                lambda: x,
            )

        def chunk(asynchronous: bool, step: Any, carry: tuple) -> tuple:
            acc, m, l, bad = carry
            ring.start(step + stages - 1, live)
            slot, first_key = lax.rem(step, stages), (first + step) * C
            ring.wait(step, len(parts) * (stages - 1), step + stages - 1 < live)
            if narrow:
                widen_values(slot)
            x, seen = logits(slot), visible(first_key)
            if asynchronous:
                assert bounds is not None
                x = x - along_keys(m, (C, R))  # m is phi
                bad = jnp.where(seen & ((x <= bounds[0]) | (x >= bounds[1])), 1.0, bad)
                weights = jnp.where(seen, jnp.exp2(x), 0.0)
            else:
                x = jnp.where(seen, x, -jnp.inf)
                m_before, m = m, jnp.maximum(m, jnp.max(x, axis=0))
                shift = jnp.where(m == -jnp.inf, 0.0, m)  # a query that has seen no key yet
                alpha = jnp.exp2(m_before - shift)
                weights = jnp.exp2(x - along_keys(shift, (C, R)))
                l, acc = l * along_keys(alpha, (C, R)), acc * along_keys(alpha, (Hv, R))
            p[...] = weights.astype(dtype)
            acc = plgpu.mma(acc, values_of(slot, first_key), plgpu.load(p, layout=right))
            return acc, m, l + weights, bad  # l and bad of each key of a chunk apart, put together at the end

        def attend(m: jax.Array | None) -> tuple:
            """O^T, m, l and which rows are out of bounds, of this split; `m` is phi, or None for the online softmax."""
            nothing = plgpu.layout_cast(jnp.full((R,), -jnp.inf, jnp.float32), acc_layout.reduce(0))
            carry = zeros(Hv, R), nothing if m is None else m, zeros(C, R), zeros(C, R)
            acc, m, l, bad = lax.fori_loop(0, live, functools.partial(chunk, m is not None), carry)
            return acc, m, jnp.sum(l, axis=0), jnp.max(bad, axis=0)

        acc, m, l, bad = attend(constant)
        if bad_gmem is not None:
            store(bad_gmem.at[b, head, split], bad)

            zero, one = (plgpu.layout_cast(jnp.full((R,), x, jnp.float32), columns) for x in (0.0, 1.0))

            def again() -> tuple:
                start()
                return *attend(None)[:3], zero

            # Queries that only fill the tile may be out of bounds, too, and do no harm.
            acc, own, l, kept = lax.cond(jnp.max(bad) > 0, again, lambda: (acc, zero, l, one))
            # What has seen no key has no maximum, not phi: a sink may be far below.
            m = jnp.where(l == 0, -jnp.inf, jnp.where(kept > 0, m, own))
        if not whole:
            for gmem, x in zip(outputs, (acc, m, l), strict=True):
                store(gmem.at[b, head, split], x)
            return

        # A split of the cluster adds up tiles [64 of Hv, 8 queries] out of the shared memory of all.
        acc_smem[...], m_smem[...], l_smem[...] = acc, m, l
        if splits > 1:
            cluster.sync()
        out_gmem, lse_gmem = outputs

        def of_split(peer: int, smem: Ref, layout: Any) -> jax.Array:
            if splits == 1:
                return plgpu.load(smem, layout=layout, optimized=False)
            return cluster.load(smem, peer, layout)

        def add_up(h: Any, r: Any) -> None:
            queries = pl.ds(r, 8)
            ms = [of_split(i, m_smem.at[queries], columns) for i in range(splits)]
            most = functools.reduce(jnp.maximum, ms)
            logit_of_sink = None
            if "sink" in option:
                logit_of_sink = plgpu.load(option["sink"].at[head, queries], layout=columns, optimized=False)
                most = jnp.maximum(most, logit_of_sink)
            shift = jnp.where(most == -jnp.inf, 0.0, most)
            out = zeros(64, 8)
            total = jnp.zeros_like(shift) if logit_of_sink is None else jnp.exp2(logit_of_sink - shift)
            for i, m in enumerate(ms):
                weight = jnp.exp2(m - shift)
                total = total + weight * of_split(i, l_smem.at[queries], columns)
                x = of_split(i, acc_smem.at[pl.ds(h, 64), queries], acc_layout)
                out = out + x * along_keys(weight, (64, 8))
            worth = 1 / jnp.where(total == 0, 1.0, total)
            if "value_scale" in option:
                worth = worth * option["value_scale"][head]
            out_smem.transpose((1, 0))[...] = (out * along_keys(worth, (64, 8))).astype(dtype)
            used = min(8, T * G)
            copies.send(out_smem.at[pl.ds(0, used)], out_gmem.at[b, head, pl.ds(r, used), pl.ds(h, 64)])
            lse = jnp.where(total == 0, -jnp.inf, (shift + jnp.log2(total)) / LOG2E)
            pl.when(h == 0)(lambda: store(lse_gmem.at[b, head, queries], lse))

        tiles_of_rows = -(-T * G // 8)
        tiles = Hv // 64 * tiles_of_rows
        for i in range(-(-tiles // splits)):
            tile = split + i * splits
            h, r = tile // tiles_of_rows * 64, lax.rem(tile, tiles_of_rows) * 8
            pl.when(tile < tiles)(functools.partial(add_up, h, r))
        if splits > 1:
            cluster.sync()

    kernel.__name__ = "decode_attention"
    sums = jax.ShapeDtypeStruct((B, K, splits, R), jnp.float32)
    scratch = {
        "q": tile_memory(R, H, dtype=dtype),
        "k": tile_memory(stages, C, H, dtype=cache.key.dtype),
        "v": tile_memory(stages, C, Hv, dtype=cache.value.dtype),
        "wide": tile_memory(C, Hv, dtype=dtype) if narrow else None,
        "p": tile_memory(C, R, dtype=dtype),
        "arrived": copies.barrier(2 * pieces, stages),
        "q_arrived": copies.barrier(1),
    }
    if whole:
        scratch |= {"acc_smem": plgpu.SMEM((Hv, R), jnp.float32), "out_smem": plgpu.SMEM((8, 64), dtype)}
        scratch |= {"m_smem": plgpu.SMEM((R,), jnp.float32), "l_smem": plgpu.SMEM((R,), jnp.float32)}
        written = T * G if T * G < 8 else T * G + -(T * G) % 8  # in tiles of 8, or one that is smaller
        results = [jax.ShapeDtypeStruct((B, K, written, Hv), dtype), jax.ShapeDtypeStruct((B, K, R), jnp.float32)]
    else:
        results = [jax.ShapeDtypeStruct((B, K, splits, Hv, R), jnp.float32), sums, sums]
    grid = {"grid": (B * K, splits), "grid_names": ("block", "split")}
    if whole:
        grid = {"grid": (B * K,), "grid_names": ("block",), "cluster": (splits,), "cluster_names": ("split",)}
    return plgpu.kernel(
        kernel,
        out_type=(*results, *[sums] * (phi is not None)),
        **grid,
        scratch_types={name: memory for name, memory in scratch.items() if memory is not None},
        compiler_params=plgpu.CompilerParams(approx_math=True),
        # Every sequence full.
        **cost_option(
            flops=2 * B * K * R * cache.S * (H + Hv),
            transcendentals=B * K * R * cache.S,
            bytes_accessed=B * K * cache.S * (H + Hv) * cache.key.dtype.itemsize,
        ),
    )(*operands)
