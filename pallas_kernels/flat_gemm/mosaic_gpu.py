# SPDX-License-Identifier: Apache-2.0
"""flat_gemm for NVIDIA GPUs from Ampere on: the weight is read once, and reading it is all the time there is.

A block takes a strip of output features and walks along K. Tiles of the weight run ahead through a ring in shared
memory, so that enough bytes are in flight; the rows of x, which all blocks read, come along with them out of L2.

    copies     W0 X0   W1 X1   W2 X2 ...          a ring of `stages` slots
    route A    z[m, n] += w[n, k] x[m, k]         in registers, an element of the tile each; summed over k at the end
    route B    Z^T [n, M] += W [n, k] X^T [k, M]  the weight is the wide operand (64 rows), M is padded to 8, not to 64

Route B runs on wgmma on Hopper, whose copies fill missing rows by 0, and on mma.sync on Ampere. An extension of the
paper, for Hopper's clusters: where strips are fewer than multiprocessors, `num_splits` blocks share one, each a part of
K, and the first adds up what the others leave in their shared memory.

With `rms_norm_eps` a block, which sees every row of x anyway, also adds up its squares; z is scaled in the end.

Source: Hong et al., "FlashDecoding++", 2023, sections 4 and 5.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import cluster
from pallas_kernels.core.activations import activate_parts, parts_of
from pallas_kernels.core.device import MMA_ARCHS, Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.core.mma import Ring, copies_of_device, cost_option, store, swizzle_bytes, tile_memory
from pallas_kernels.flat_gemm.config import MatrixConfig, VectorConfig, outputs
from pallas_kernels.flat_gemm.routes import MOST_ROWS, MOST_VECTOR_ROWS

Ref = Any
WIDE = 64  # rows of the wide operand of a product


def supports(call: Call, device: Device) -> Refusal | None:
    if device.platform != "gpu" or device.arch not in MMA_ARCHS:
        return Refusal(f"it is for NVIDIA GPUs of Ampere, Ada and Hopper, and this is {device}")
    s, dtype, hopper = call.sizes, call.arguments[0].dtype, device.arch == "sm90"
    if dtype not in ("bfloat16", "float16"):
        return Refusal(f"its tensor-core products take bfloat16 and float16, not {dtype}; cast the inputs")
    if s["M"] > (most := MOST_ROWS if hopper else 64):
        return Refusal(f"M={s['M']} rows; it takes {most}, and for more the library's product is as fast")
    if call.option("rms_norm_eps") is not None and s["M"] > 64:
        return Refusal(f"M={s['M']} rows to normalize; it has registers for 64")
    multiple = 64 if hopper else 128  # what copies of a ragged tail leave alone
    if s["K"] % multiple or outputs(call) % multiple:
        return Refusal(f"K={s['K']} and O={outputs(call)} features; it takes multiples of {multiple} on {device.arch}")
    return None


def forward(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    *,
    activation: str | None,
    transpose_w: bool,
    rms_norm_eps: float | None,
    config: VectorConfig | MatrixConfig,
) -> jax.Array:
    """[M, O] in the dtype of x, of x [M, K] and w [K, N] ([N, K])."""
    (M, K), hopper = x.shape, copies_of_device().fill
    if not hopper and K % config.block_k:
        raise ValueError(f"flat_gemm: on Ampere K={K} must be a multiple of block_k, got {config}.")
    if not hopper and isinstance(config, MatrixConfig) and config.num_splits > 1:
        raise ValueError(f"flat_gemm: num_splits takes the clusters of Hopper, got {config}.")
    if isinstance(config, VectorConfig):
        if not transpose_w:
            raise ValueError(f"flat_gemm: route A takes a weight [N, K] (transpose_w=True), got [K, N] and {config}.")
        if M > MOST_VECTOR_ROWS:
            raise ValueError(f"flat_gemm: route A takes {MOST_VECTOR_ROWS} rows, got M={M} and {config}.")
        route: type[_Route] = _Vectors
    else:
        route = _Wgmma if hopper else _Mma
        # Four warps copy as many tiles of 8 rows and 64 inputs each by cp.async.
        multiple = 8 if hopper else max(8, 4 * 8 * 64 // config.block_k)
        if not (hopper and M < 8):
            more = ((0, -M % multiple), (0, 0))
            x, residual = jnp.pad(x, more), None if residual is None else jnp.pad(residual, more)
    parts = parts_of(activation)
    if bias is not None:
        bias = bias.reshape(parts, -1)
        bias = jnp.pad(bias, ((0, 0), (0, -bias.shape[1] % config.block_n)))
    at = route(len(x), config.block_n, config.block_k, parts, x.dtype, transpose_w, rms_norm_eps)
    splits = config.num_splits if isinstance(config, MatrixConfig) else 1
    return _strips(at, x, w, bias, residual, activation=activation, stages=config.stages, num_splits=splits)[:M]


# --- What a block adds up ------------------------------------------------------------------------------------


class _Route(NamedTuple):
    """How a block multiplies. n features and k inputs of a tile of the weight [parts, n, k] ([parts, k, n]); what comes
    out are, for each part, tiles in float32 that `view` finds the place of."""

    M: int
    n: int
    k: int
    parts: int
    dtype: Any
    transpose_w: bool
    rms_norm_eps: float | None

    @property
    def layout(self) -> Any:
        """Of a tile."""
        raise NotImplementedError

    def tiles(self, ring: Ring, live: Any, w: Ref, x: Callable[[Any], Ref]) -> tuple[list[list[jax.Array]], Any]:
        """Sums over `live` steps of the ring, of slots w and of the rows x(step), [M, k]; and what `squares` adds up if
        they are normalized."""
        raise NotImplementedError

    @property
    def squares_layout(self) -> tuple[Any, bool]:
        """How squares of a tile of x are held, and whether as [k, M]: 8 adjacent inputs a thread, if there are swizzled
        tiles for all four warps; else as the narrow operand of mma.sync, in each warp."""
        if self.padded // 8 * (self.k // 64) % 4:
            return plgpu.Layout.MMA_RHS(self.dtype), True
        return plgpu.Layout.SMEM_GMEM_COPY((self.padded, self.k), self.dtype, swizzle=swizzle_bytes(self.k)), False

    def squares(self, total: jax.Array | None, x: Ref) -> jax.Array | None:
        """Squares of a tile of x [M, k], added to those before."""
        if self.rms_norm_eps is None:
            return None
        layout, turned = self.squares_layout
        if total is None:
            shape = (self.k, self.padded) if turned else (self.padded, self.k)
            return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
        row = plgpu.load(x.transpose((1, 0)) if turned else x, layout=layout).astype(jnp.float32)
        return total + row * row

    def scale(self, squares: Any, K: int, i: int) -> jax.Array:
        """1 / sqrt(mean of squares + eps) of the rows, to multiply tile i with; `squares` [M] along columns."""
        scale = lax.rsqrt(squares / K + self.rms_norm_eps)
        return plgpu.layout_cast(lax.broadcast_in_dim(scale, (WIDE, self.padded), (1,)), self.layout)

    def view(self, rows: Ref, i: int) -> Ref:
        """Where tile i lies in shared memory [M, n]."""
        return rows.at[:, pl.ds(WIDE * i, WIDE)].transpose((1, 0))

    def bias(self, bias: Ref, first: Any, i: int) -> jax.Array:
        """Of tile i, from global memory [O]."""
        column = plgpu.load(bias.at[pl.ds(first + WIDE * i, WIDE)], layout=self.layout.reduce(1), optimized=False)
        return plgpu.layout_cast(lax.broadcast_in_dim(column, (WIDE, self.padded), (0,)), self.layout)

    @property
    def padded(self) -> int:
        return self.M + -self.M % 8

    def strip(self, w: Ref, part: int, start: int, i: int, depth: int) -> Ref:
        """Inputs start .. start + depth of tile i's features, [64, depth]."""
        k, n = pl.ds(start, depth), pl.ds(WIDE * i, WIDE)
        return w.at[part, n, k] if self.transpose_w else w.at[part, k, n].transpose((1, 0))


class _Vectors(_Route):
    """Route A: z[m, n] += w[n, k] x[m, k] for each element of a tile by itself, no tensor cores, no padding."""

    @property
    def tile_layout(self) -> Any:
        """Of a tile of the weight [n, k]: 8 adjacent inputs a thread."""
        return plgpu.Layout.SMEM_GMEM_COPY((self.n, self.k), self.dtype, swizzle=swizzle_bytes(self.k))

    @property
    def layout(self) -> Any:
        return self.tile_layout.reduce(1)

    def tiles(self, ring: Ring, live: Any, w: Ref, x: Callable[[Any], Ref]) -> tuple[list[list[jax.Array]], Any]:
        shape, layout = (self.n, self.k), self.tile_layout

        def step(i: Any, carry: tuple) -> tuple:
            sums, squares = carry
            ring.start(i + ring.stages - 1, live)
            ring.wait(i, len(ring.parts) * (ring.stages - 1), i + ring.stages - 1 < live)
            slot = lax.rem(i, ring.stages)
            wide = [plgpu.load(w.at[slot, p], layout=layout).astype(jnp.float32) for p in range(self.parts)]
            for m in range(self.M):
                row = plgpu.load(x(i).at[m], layout=layout.reduce(0), optimized=False).astype(jnp.float32)
                if squares:
                    squares[m] = squares[m] + row * row
                row = lax.broadcast_in_dim(row, shape, (1,))
                for p in range(self.parts):
                    sums[p][m] = sums[p][m] + wide[p] * row
            return sums, squares

        zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
        none = plgpu.layout_cast(jnp.zeros((self.k,), jnp.float32), layout.reduce(0))
        squares = [] if self.rms_norm_eps is None else [none] * self.M
        sums, squares = lax.fori_loop(0, live, step, ([[zero] * self.M for _ in range(self.parts)], squares))
        wide = [plgpu.layout_cast(lax.broadcast_in_dim(row, shape, (1,)), layout) for row in squares]
        return [[jnp.sum(z, axis=1) for z in part] for part in sums], [jnp.sum(z, axis=1) for z in wide]

    def scale(self, squares: Any, K: int, i: int) -> jax.Array:
        return lax.rsqrt(squares[i] / K + self.rms_norm_eps)

    def view(self, rows: Ref, i: int) -> Ref:
        return rows.at[i]

    def bias(self, bias: Ref, first: Any, i: int) -> jax.Array:
        return plgpu.load(bias.at[pl.ds(first, self.n)], layout=self.layout, optimized=False)


class _Mma(_Route):
    """Route B by mma.sync, operands in registers."""

    @property
    def layout(self) -> Any:
        return plgpu.Layout.MMA_ACC(self.dtype)

    def tiles(self, ring: Ring, live: Any, w: Ref, x: Callable[[Any], Ref]) -> tuple[list[list[jax.Array]], Any]:
        left, right = plgpu.Layout.MMA_LHS(self.dtype), plgpu.Layout.MMA_RHS(self.dtype)

        def step(i: Any, carry: tuple) -> tuple:
            sums, squares = carry
            ring.start(i + ring.stages - 1, live)
            ring.wait(i, len(ring.parts) * (ring.stages - 1), i + ring.stages - 1 < live)
            slot = lax.rem(i, ring.stages)
            for start in range(0, self.k, 64):  # the width of a swizzled tile; all of k would fill the registers
                narrow = plgpu.load(x(i).at[:, pl.ds(start, 64)].transpose((1, 0)), layout=right)
                for part in range(self.parts):
                    for j in range(self.n // WIDE):
                        wide = plgpu.load(self.strip(w.at[slot], part, start, j, 64), layout=left)
                        sums[part][j] = plgpu.mma(sums[part][j], wide, narrow)
            return sums, None if squares is None else self.squares(squares, x(i))

        zero = plgpu.layout_cast(jnp.zeros((WIDE, self.padded), jnp.float32), self.layout)
        sums = [[zero] * (self.n // WIDE) for _ in range(self.parts)]
        return lax.fori_loop(0, live, step, (sums, self.squares(None, None)))


class _Wgmma(_Route):
    """Route B by wgmma, both operands in shared memory."""

    @property
    def layout(self) -> Any:
        return plgpu.Layout.WGMMA

    def tiles(self, ring: Ring, live: Any, w: Ref, x: Callable[[Any], Ref]) -> tuple[list[list[jax.Array]], Any]:
        per_part = self.n // WIDE

        def multiply(*sums: Ref) -> tuple[list[jax.Array], Any]:
            def step(i, squares):
                ring.wait(i, len(ring.parts) * (ring.stages - 1), i + ring.stages - 1 < live)
                slot = lax.rem(i, ring.stages)
                for t, z in enumerate(sums):
                    strip = self.strip(w.at[slot], t // per_part, 0, t % per_part, self.k)
                    plgpu.wgmma(z, strip, x(i).transpose((1, 0)))
                squares = None if squares is None else self.squares(squares, x(i))
                # The products of the step before are done with their slot; those of this one go on.
                plgpu.wgmma_wait(len(sums))
                ring.start(i + ring.stages - 1, live)
                return squares

            squares = lax.fori_loop(0, live, step, self.squares(None, None))
            plgpu.wgmma_wait(0)
            return [z[...] for z in sums], squares

        accumulator: Any = plgpu
        accumulators = [accumulator.ACC((WIDE, self.padded), jnp.float32)] * (self.parts * per_part)
        z, squares = pl.run_scoped(multiply, *accumulators)
        return [z[p * per_part : (p + 1) * per_part] for p in range(self.parts)], squares


# --- The kernel ----------------------------------------------------------------------------------------------


def _strips(
    at: _Route,
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    *,
    activation: str | None,
    stages: int,
    num_splits: int,
) -> jax.Array:
    """The kernel of all routes, [M, O]. bias [parts, O] is padded to whole strips of n features."""
    (M, K), N = x.shape, w.shape[0] if at.transpose_w else w.shape[1]
    O, dtype, copies = N // at.parts, x.dtype, copies_of_device()
    strips, steps_of_split = -(-O // at.n), -(-K // (at.k * num_splits))
    hopper, vectors = copies.fill, isinstance(at, _Vectors)
    # Ampere has no copies out of shared memory that would turn Z^T around: XLA does, and adds the residual.
    turned = not hopper and not vectors
    options = {"bias": bias, "residual": None if turned else residual}
    given = {name: a for name, a in options.items() if a is not None}

    def kernel(
        x_gmem,
        w_gmem,
        *refs,
        ws,
        xs: Any = None,
        out_smem: Any = None,
        partial: Any = None,
        residual_smem: Any = None,
        squares_smem: Any = None,
        arrived: Any = None,
        added: Any = None,
    ):
        option, out_gmem = dict(zip(given, refs, strict=False)), refs[-1]
        strip = lax.axis_index("strip")
        n, zero = strip * at.n, lax.div(strip, strips)
        split = lax.axis_index("split") if num_splits > 1 else zero
        # From row 0, in words that do not tell that fewer rows than a tile may follow.
        rows = pl.ds(zero * 8, at.padded) if hopper and not vectors else slice(None)
        first = split * steps_of_split
        live = jnp.clip(-(-K // at.k) - first, 0, steps_of_split)

        def weight(part: int, step: Any) -> Ref:
            features, inputs = pl.ds(part * O + n, at.n), pl.ds((first + step) * at.k, at.k)
            return w_gmem.at[features, inputs] if at.transpose_w else w_gmem.at[inputs, features]

        loads: list = [(functools.partial(weight, part), ws.at[:, part]) for part in range(at.parts)]

        def rows_of(step: Any) -> Ref:
            return x_gmem.at[rows, pl.ds((first + step) * at.k, at.k)]

        if xs is not None:
            loads.append((rows_of, xs))
        ring = Ring(copies, stages, loads, arrived)
        for step in range(stages - 1):
            ring.start(step, live)
        if residual_smem is not None:
            copies.start(option["residual"].at[rows, pl.ds(n, at.n)], residual_smem, added)
        tiles, squares = at.tiles(ring, live, ws, rows_of if xs is None else lambda step: xs.at[lax.rem(step, stages)])
        columns = at.layout.reduce(0) if squares_smem is not None else None
        if squares_smem is not None:
            squares_smem[...] = jnp.sum(squares, axis=0 if at.squares_layout[1] else 1)
            squares = plgpu.load(squares_smem, layout=columns, optimized=False)

        def finish(tiles: list[list[jax.Array]], squares: Any) -> None:
            if residual_smem is not None:
                copies.wait(added, 0, live < 0)
            for i, z in enumerate(zip(*tiles, strict=True)):
                if at.rms_norm_eps is not None:
                    z = [y * at.scale(squares, K, i) for y in z]
                if bias is not None:
                    z = [y + at.bias(option["bias"].at[p], n, i).astype(jnp.float32) for p, y in enumerate(z)]
                y = activate_parts(list(z), activation)
                if turned:
                    store(out_gmem.at[pl.ds(n + WIDE * i, WIDE)], y)
                    continue
                if residual is not None:
                    added_to = at.view(residual_smem, i) if hopper else option["residual"].at[i, pl.ds(n, at.n)]
                    y = y + plgpu.load(added_to, layout=at.layout, optimized=False).astype(jnp.float32)
                if hopper:
                    at.view(out_smem, i)[...] = y.astype(dtype)
                else:
                    store(out_gmem.at[i, pl.ds(n, at.n)], y.astype(dtype))
            if hopper:
                copies.send(out_smem, out_gmem.at[rows, pl.ds(n, at.n)])

        if num_splits == 1:
            finish(tiles, squares)
        else:
            # Blocks of a cluster leave what they have; the first adds it up, in order.
            for i, tile in enumerate(tiles):
                for j, z in enumerate(tile):
                    partial[i, j] = z
            cluster.sync()

            def add(total: tuple, i: int) -> tuple:
                tiles, squares = total
                tiles = [
                    [z + cluster.load(partial.at[p, j], i, at.layout) for j, z in enumerate(tile)]
                    for p, tile in enumerate(tiles)
                ]
                return tiles, None if columns is None else squares + cluster.load(squares_smem, i, columns)

            pl.when(split == 0)(lambda: finish(*functools.reduce(add, range(1, num_splits), (tiles, squares))))
            cluster.sync()  # no block is gone while others read from it

    kernel.__name__ = f"flat_gemm_{type(at).__name__.strip('_').lower()}"
    padded = M if vectors else at.padded

    def rows_memory(*shape: int) -> Any:
        return plgpu.SMEM(shape, dtype) if vectors else tile_memory(*shape, dtype=dtype)

    tile = (at.n, at.k) if at.transpose_w else (at.k, at.n)
    scratch = {
        "ws": tile_memory(stages, at.parts, *tile, dtype=dtype),
        "xs": None if vectors and not hopper else rows_memory(stages, padded, at.k),
        "out_smem": rows_memory(padded, at.n) if hopper else None,
        "arrived": copies.barrier(at.parts + 1, stages),
    }
    if residual is not None and hopper:
        scratch |= {"residual_smem": rows_memory(padded, at.n), "added": copies.barrier(1)}
    if at.rms_norm_eps is not None and not vectors:
        scratch["squares_smem"] = plgpu.SMEM((padded,), jnp.float32)
    if num_splits > 1:
        scratch["partial"] = plgpu.SMEM((at.parts, at.n // WIDE, WIDE, at.padded), jnp.float32)
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((O, M), jnp.float32) if turned else jax.ShapeDtypeStruct((M, O), dtype),
        grid=(strips,),
        grid_names=("strip",),
        **({"cluster": (num_splits,), "cluster_names": ("split",)} if num_splits > 1 else {}),
        scratch_types={name: memory for name, memory in scratch.items() if memory is not None},
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **cost_option(flops=2 * M * N * K, transcendentals=M * O, bytes_accessed=2 * (N * K + M * K + M * O)),
    )(x, w, *given.values())
    if turned:
        out = out.T if residual is None else out.T + residual
    return out.astype(dtype)
