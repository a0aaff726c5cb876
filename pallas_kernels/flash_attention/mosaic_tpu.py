# SPDX-License-Identifier: Apache-2.0
"""flash_attention for TPUs: FastAttention's two-level tiling and tiling-mask (Lin et al., 2024, sections 4.1, 4.2).

A grid step takes a first-level block of logits, block_q x width (T rows, S columns), through three stages that meet
in on-chip memory; each unit cuts the block its own way, and the softmax is updated once a block:

    matrix unit   S[:, sub] = Q K[sub]^T             sub-blocks of block_k columns
    vector unit   s = mask(scale S[r, :]); m' = max(m, rowmax s); P[r, :] = exp(s - m')
                  l = l exp(m - m') + rowsum P; acc = acc exp(m - m')      slices of block_rows whole rows
    matrix unit   acc += P[:, sub] V[sub]            sub-blocks again

    grid  forward, dQ   (b, n, row of tiles i, step)         `tiles.schedule` says which column the step visits;
          dK, dV        (b, k, column of tiles j, g, step)   a step beyond the last live tile stays where it is,
          dbias         (b, n, i, j, b', n')                 copies nothing and computes nothing

The backward passes recompute S and P from (q, k, v, out, lse) and sum in the order of the grid: bitwise repeatable.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.core.varying import vary_like
from pallas_kernels.flash_attention import tiles
from pallas_kernels.flash_attention.config import VMEM_BYTES, MosaicTpuConfig, mosaic_tpu_heuristic
from pallas_kernels.flash_attention.xla import Gradients
from pallas_kernels.masks import Causal, Mask
from pallas_kernels.masks.lowered import Lowered, lower

LANES = 128  # of a vector register; a per-row statistic is kept once in every lane, so that it needs no broadcast
# Scalar memory for the schedule of a mask that holds arrays, in int32; a larger one is cut down to four a row.
SCHEDULE_WORDS = 2**16


def supports(call: Call, device: Device) -> Refusal | None:
    if device.platform != "tpu":
        return Refusal(f"its kernels are for TPUs, and this is {device.platform}")
    if not device.arch:
        return Refusal(f"its kernels are compiled for TPU v4 and later, and this is {device.kind}")
    dtype = call.arguments[0].dtype
    if dtype not in ("float32", "bfloat16"):
        return Refusal(f"TPUs compute in float32 and bfloat16, not in {dtype}")
    needed = mosaic_tpu_heuristic(call).vmem_bytes(call)
    if needed > VMEM_BYTES:
        H, Hv = call.sizes["H"], call.sizes["Hv"]
        mib = f"{needed / 2**20:.0f} MiB of on-chip memory, and it plans with {VMEM_BYTES // 2**20}"
        return Refusal(f"tiles of head dims H={H}, Hv={Hv} need {mib}")
    return None


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
    config: MosaicTpuConfig,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, Hv] in the input dtype and LSE [B, N, T] in float32."""
    plane, arrays = _prepare(query, key, value, bias, mask, scale, soft_cap, config)
    if sink is not None:
        # [N, 1, lanes]: one register row for each head.
        arrays = arrays._replace(
            sink=jnp.broadcast_to(sink.astype(jnp.float32)[:, None, None], (*sink.shape, 1, LANES))
        )
    visits = _visits(plane, mask)
    out, lse = _run(
        _forward,
        plane,
        visits,
        arrays,
        **_row_by_row(plane, visits),
        outputs=(_query_output(plane, plane.Hv), _query_lanes(plane)),
        scratch=(
            pltpu.VMEM((plane.block_q, LANES), jnp.float32),  # m
            pltpu.VMEM((plane.block_q, LANES), jnp.float32),  # l
            pltpu.VMEM((plane.block_q, plane.Hv), jnp.float32),  # acc
            pltpu.VMEM((plane.block_q, plane.width), jnp.float32),  # S
            pltpu.VMEM((plane.block_q, plane.width), plane.dtype),  # P
            _columns(plane),
        ),
        products=(1, 1),
    )
    return jnp.swapaxes(out, 1, 2)[:, : plane.T], lse[:, :, 0, : plane.T]


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
    config: MosaicTpuConfig,
) -> Gradients:
    """Gradients from the residuals (q, k, v, out, lse): a pass over rows of tiles for dQ, one over columns for dK and
    dV, and a third one for a bias of T x S. A bias broadcast over rows or columns comes out of the first two."""
    plane, arrays = _prepare(query, key, value, bias, mask, scale, soft_cap, config)
    # dS = P * (dP - delta) with delta = sum_h dO O; a gradient that enters through the LSE adds P * dlse.
    delta = jnp.einsum("btnh,btnh->bnt", dout, out, preferred_element_type=jnp.float32)
    shift = dlse.astype(jnp.float32) - delta
    # Rows that see nothing, and rows beyond T, get P = exp(s - inf) = 0 whatever their logits are.
    lse_rows = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
    arrays = arrays._replace(
        dout=_pad(jnp.swapaxes(dout, 1, 2), 2, plane.T_padded),
        lse=_pad(lse_rows, 2, plane.T_padded, jnp.inf)[:, :, None],
        shift=_pad(shift, 2, plane.T_padded)[:, :, None],
    )
    # A bias that is broadcast over columns (rows) is as long as its gradient is: sums of dS along rows (columns).
    over_columns = arrays.bias is not None and arrays.bias.shape[2] != 1 and arrays.bias.shape[3] == 1
    over_rows = arrays.bias is not None and arrays.bias.shape[2] == 1
    dq, *row_sums = _query_gradient(plane, arrays, mask, sums=over_columns)
    dk, dv, *column_sums = _key_gradients(plane, arrays, mask, sums=over_rows)
    dbias = None
    if bias is not None:
        if over_columns:
            dbias = row_sums[0][:, :, 0, : plane.T, None]
        elif over_rows:
            dbias = column_sums[0][:, :, :, : plane.S]
        else:
            dbias = _bias_gradient(plane, arrays, mask)[:, :, : plane.T, : plane.S]
        dbias = _sum_to(dbias, bias.shape).astype(bias.dtype)
    dsink = None
    if sink is not None:  # a key without a value row: dP = 0 there
        sink_rows = sink.astype(jnp.float32)[:, None]
        p_sink = jnp.where(jnp.isneginf(sink_rows), 0, jnp.exp(sink_rows - lse_rows))
        dsink = jnp.sum(p_sink * shift, axis=(0, 2)).astype(sink.dtype)
    return Gradients(
        jnp.swapaxes(dq, 1, 2)[:, : plane.T],
        jnp.swapaxes(dk, 1, 2)[:, : plane.S],
        jnp.swapaxes(dv, 1, 2)[:, : plane.S],
        dbias,
        dsink,
    )


# --- What a call is made of ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Plane:
    """Everything that is known while tracing. T and S are the true lengths; arrays are padded to whole blocks."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    Hv: int
    dtype: jnp.dtype
    block_q: int
    width: int  # of a first-level block: block_k_major, narrowed to S
    block_k: int
    block_rows: int
    scale: float
    soft_cap: float | None
    lowered: Lowered | None
    bias_shape: tuple[int, ...] | None  # [B|1, N|1, T'|1, S'|1]
    use_window: bool

    @property
    def G(self) -> int:
        return self.N // self.K

    def key_head(self, n):
        """The key head that query head n reads; `//` would ask for the sign of n, on the scalar unit."""
        return lax.div(n, jnp.int32(self.G))

    @property
    def T_padded(self) -> int:
        return self.T + -self.T % self.block_q

    @property
    def S_padded(self) -> int:
        return self.S + -self.S % self.width

    @property
    def sub_blocks(self) -> list[slice]:
        """Second level of the matrix unit: columns of a first-level block."""
        return [slice(c, c + self.block_k) for c in range(0, self.width, self.block_k)]

    @property
    def row_blocks(self) -> list[slice]:
        """The same of rows, where a product contracts over them."""
        return [slice(r, min(r + LANES, self.block_q)) for r in range(0, self.block_q, LANES)]


class _Arrays(NamedTuple):
    """Inputs of the kernels. The same tuple holds their BlockSpecs and, inside a kernel, their references."""

    query: Any  # [B, N, T', H]
    key: Any  # [B, K, S', H]
    value: Any  # [B, K, S', Hv]
    bias: Any = None  # [B|1, N|1, T'|1, S'|1]
    sink: Any = None  # [N, 1, lanes] float32
    rows: Any = ()  # of the lowered mask: int32 [B|1, 1, T'] each
    cols: Any = ()  # int32 [B|1, 1, S'] each
    dense: Any = ()  # int8 [B|1, N|1, T'|1, S'|1] each; int32 where T is broadcast
    m_mask: Any = None  # int8 [2M, 2M]
    dout: Any = None  # [B, N, T', Hv]
    lse: Any = None  # [B, N, 1, T'] float32
    shift: Any = None  # [B, N, 1, T'] float32: dlse - delta


def _prepare(query, key, value, bias, mask, scale, soft_cap, config) -> tuple[_Plane, _Arrays]:
    """Heads first and padded to whole blocks, which XLA does in one copy."""
    (B, T, N, H), (S, K, Hv) = query.shape, value.shape[1:]
    # int8 tiles have 32 rows, registers 128 lanes: arrays shorter than a block get a block of their own length.
    block_q, block_k = min(config.block_q, T + -T % 32), min(config.block_k, S + -S % LANES)
    width = min(config.block_k_major - config.block_k_major % block_k, S + -S % block_k)
    causal = isinstance(mask, Causal) and mask.query_positions is None and mask.key_positions is None
    lowered = None if mask is None else lower(mask, T, S)
    plane = _Plane(
        *(B, T, S, N, K, H, Hv),
        dtype=query.dtype,
        block_q=block_q,
        width=width,
        block_k=block_k,
        block_rows=math.gcd(config.block_rows, block_q),
        scale=scale,
        soft_cap=soft_cap,
        lowered=lowered,
        bias_shape=None if bias is None else (1,) * (4 - bias.ndim) + bias.shape,
        use_window=causal and config.mask == "window",
    )
    arrays = _Arrays(
        query=_pad(jnp.swapaxes(query, 1, 2), 2, plane.T_padded),
        key=_pad(jnp.swapaxes(key, 1, 2), 2, plane.S_padded),
        value=_pad(jnp.swapaxes(value, 1, 2), 2, plane.S_padded),
    )
    if bias is not None and plane.bias_shape is not None:
        # A row of bfloat16 fills half a register row; float32 loads without repacking.
        keep = bias.dtype == jnp.bfloat16 and plane.bias_shape[2] != 1
        bias = bias if keep else bias.astype(jnp.float32)
        arrays = arrays._replace(bias=_pad_plane(plane, bias.reshape(plane.bias_shape)))
    if plane.use_window:
        arrays = arrays._replace(m_mask=tiles.m_mask(T, S, block_q, width, LANES))
    elif lowered is not None:
        arrays = arrays._replace(
            rows=tuple(_pad(x[:, None], 2, plane.T_padded) for x in lowered.rows),
            cols=tuple(_pad(x[:, None], 2, plane.S_padded) for x in lowered.cols),
            dense=tuple(_pad_plane(plane, x if x.shape[2] != 1 else x.astype(jnp.int32)) for x in lowered.dense),
        )
    return plane, arrays


def _pad(x: jax.Array, axis: int, size: int, fill: float = 0) -> jax.Array:
    widths = [(0, size - n if a == axis else 0) for a, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=fill) if x.shape[axis] != size else x


def _pad_plane(plane: _Plane, x: jax.Array) -> jax.Array:
    """[B|1, N|1, T|1, S|1] with whole blocks in the axes that are not broadcast."""
    for axis, size in ((2, plane.T_padded), (3, plane.S_padded)):
        x = x if x.shape[axis] == 1 else _pad(x, axis, size)
    return x


def _sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums the axes along which `shape` was broadcast."""
    wide = (1,) * (x.ndim - len(shape)) + shape
    axes = tuple(axis for axis, n in enumerate(wide) if n != x.shape[axis])
    return x.sum(axes, keepdims=True).reshape(shape)


# --- Which tiles a grid step stands for ----------------------------------------------------------------------------


class _Where(NamedTuple):
    """A grid step: its batch element, query head, row and column of tiles; what to do there, and what begins or ends.

    `last` and `first` bound the steps that share an output block; `head` is true at the first step of a query head.
    """

    b: Any
    n: Any
    i: Any
    j: Any
    live: Any
    mixed: Any
    first: Any
    last: Any
    head: tuple[Any, Any] = (False, False)


@dataclasses.dataclass(frozen=True)
class _Visits:
    """`tiles.Schedule` in scalar memory, where grid steps read it.

    Attributes:
      numbers: int32 [B|1 * N|1 * rows * stride], flat, since scalar memory pads rows to 128. A row of tiles has
        (live, mixed, order ...), or its `runs` (a, b, c, d).
      shape: (B|1, N|1, rows, stride).
      schedule: knows which of the two it is.
      steps: visits of the longest row.
      any_mixed, any_full: whether some tile is of that class; a class that is absent gets no code.
    """

    numbers: jax.Array | np.ndarray
    shape: tuple[int, ...]
    schedule: tiles.Schedule
    steps: int
    any_mixed: bool
    any_full: bool

    def _row(self, b, n, row):
        B, N, rows, stride = self.shape
        return (((b if B > 1 else 0) * N + (n if N > 1 else 0)) * rows + row) * stride

    def at(self, numbers, b, n, row, step) -> tuple[Any, Any, Any]:
        """Column of tiles of a step, whether the step is one of the live ones, and whether its tile is mixed."""
        start = self._row(b, n, row)
        if self.schedule.order is not None:
            runs, live, mixed = (), numbers[start], numbers[start + 1]
        else:
            runs = [numbers[start + x] for x in range(4)]
            live, mixed = runs[3] - runs[0], (runs[1] - runs[0]) + (runs[3] - runs[2])
        # Beyond the last live tile a step stays there: the blocks are on the chip already, so nothing is copied.
        stay = jnp.minimum(step, jnp.maximum(live - 1, 0))
        column = self.schedule.column(stay, runs, lambda visit: numbers[start + 2 + visit])
        return column, step < live, step < mixed

    def within(self, numbers, b, n, row, column) -> Any:
        """Whether a tile lies in the run of live ones; only of a schedule that has runs."""
        start = self._row(b, n, row)
        return (numbers[start] <= column) & (column < numbers[start + 3])


def _visits(plane: _Plane, mask: Mask | None, *, transpose: bool = False, hull: bool = False) -> _Visits:
    """The schedule of a pass; by `hull`, or where the whole order is too long, as the one run of live tiles of each
    row, in which every tile counts as mixed."""
    plan = tiles.schedule(mask, plane.T, plane.S, plane.block_q, plane.width, transpose=transpose)
    order = plan.order
    if hull or (order is not None and order.size > SCHEDULE_WORDS):
        live = tiles.classify(mask, plane.T, plane.S, plane.block_q, plane.width) != tiles.EMPTY
        xp = np if isinstance(live, np.ndarray) else jnp
        live = xp.swapaxes(live, 2, 3) if transpose else live
        start = live.argmax(-1)
        stop = xp.where(live.any(-1), live.shape[-1] - live[..., ::-1].argmax(-1), start)
        plan = plan._replace(order=None, mixed=stop - start, live=stop - start)
        numbers = xp.stack([start, stop, stop, stop], axis=-1)
    elif order is None:
        assert plan.runs is not None
        numbers = plan.runs[None, None]
    else:
        xp = np if isinstance(order, np.ndarray) else jnp
        numbers = xp.concatenate([plan.live[..., None], plan.mixed[..., None], order], axis=-1)
    static = isinstance(numbers, np.ndarray)
    columns = plane.T_padded // plane.block_q if transpose else plane.S_padded // plane.width
    return _Visits(
        numbers=numbers.astype(np.int32).reshape(-1),
        shape=numbers.shape,
        schedule=plan,
        steps=max(1, int(np.max(plan.live))) if static else columns,
        any_mixed=not static or bool(np.any(plan.mixed)),
        any_full=not static or bool(np.any(np.asarray(plan.live) > plan.mixed)),
    )


# --- From arrays to a kernel call -----------------------------------------------------------------------------------


class _Output(NamedTuple):
    """An output array, its block, and where a grid step writes it."""

    shape: tuple[int, ...]
    dtype: Any
    block: tuple[int | None, ...]
    at: Callable[[_Where], tuple]


def _query_output(plane: _Plane, H: int) -> _Output:
    shape = (plane.B, plane.N, plane.T_padded, H)
    return _Output(shape, plane.dtype, (None, None, plane.block_q, H), lambda w: (w.b, w.n, w.i, 0))


def _key_output(plane: _Plane, H: int) -> _Output:
    shape = (plane.B, plane.K, plane.S_padded, H)
    return _Output(shape, plane.dtype, (None, None, plane.width, H), lambda w: (w.b, plane.key_head(w.n), w.j, 0))


def _query_lanes(plane: _Plane) -> _Output:
    """One float32 a query row, along lanes: in HBM [.., T', 1] would be padded to 128 times its size."""
    shape = (plane.B, plane.N, 1, plane.T_padded)
    return _Output(shape, jnp.float32, (None, None, 1, plane.block_q), lambda w: (w.b, w.n, 0, w.i))


def _key_lanes(plane: _Plane) -> _Output:
    shape = (plane.B, plane.N, 1, plane.S_padded)
    return _Output(shape, jnp.float32, (None, None, 1, plane.width), lambda w: (w.b, w.n, 0, w.j))


def _run(
    kernel: Callable,
    plane: _Plane,
    visits: _Visits,
    arrays: _Arrays,
    *,
    grid: tuple[int, ...],
    where: Callable[..., _Where],
    outputs: Sequence[_Output],
    scratch: Sequence[Any],
    parallel: int,
    products: tuple[int, int],
    streamed: int,
) -> Sequence[jax.Array]:
    """Runs `kernel(plane, visits, w, x, outputs, scratch)` at every step of the grid.

    Args:
      where: (*grid position, schedule) -> _Where; its last grid axes sum into one output block.
      parallel: how many leading grid axes are independent (chips with two cores share them out).
      products: matrix products of a tile that contract over, or produce, H and Hv.
      streamed: rows of H + Hv that a live tile copies in.
    """
    numbers = jnp.asarray(visits.numbers)
    numbers, arrays = vary_like((numbers, arrays), (numbers, arrays))

    def body(numbers, x, *refs):
        w = where(*(pl.program_id(axis) for axis in range(len(grid))), numbers)
        kernel(plane, visits, w, x, refs[: len(outputs)], refs[len(outputs) :])

    def spec(block, at, **options):
        return pl.BlockSpec(block, lambda *ids: at(where(*ids)), **options)

    axis_type = jax.typeof(arrays.query).manual_axis_type
    item = jnp.dtype(plane.dtype).itemsize
    live = np.asarray(visits.schedule.live).sum() if isinstance(visits.numbers, np.ndarray) else None
    count = math.prod(grid) if live is None else int(live) * plane.B * plane.N
    results = pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(o.shape, o.dtype, manual_axis_type=axis_type) for o in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[_specs(plane, arrays, spec)],
            out_specs=[spec(o.block, o.at) for o in outputs],
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * count * plane.block_q * plane.width * (products[0] * plane.H + products[1] * plane.Hv),
            transcendentals=count * plane.block_q * plane.width,
            bytes_accessed=count * streamed * (plane.H + plane.Hv) * item
            + sum(math.prod(o.shape) * jnp.dtype(o.dtype).itemsize for o in outputs),
        ),
        name=f"flash_attention{kernel.__name__}",
    )(numbers, arrays)
    return results


def _row_by_row(plane: _Plane, visits: _Visits) -> dict[str, Any]:
    """The grid of forward and dQ: each row of tiles of each head visits its live columns."""

    def where(b, n, i, step, numbers):
        j, live, mixed = visits.at(numbers, b, n, i, step)
        return _Where(b, n, i, j, live, mixed, step == 0, step == visits.steps - 1)

    grid = (plane.B, plane.N, plane.T_padded // plane.block_q, visits.steps)
    return {"grid": grid, "where": where, "parallel": 3, "streamed": plane.width}


def _specs(plane: _Plane, arrays: _Arrays, spec: Callable) -> _Arrays:
    """Blocks of the inputs. A query head n reads key head n // G: keys and values are never repeated."""

    def queries(H):
        return spec((None, None, plane.block_q, H), lambda w: (w.b, w.n, w.i, 0))

    def keys(H):
        return spec((None, None, plane.width, H), lambda w: (w.b, plane.key_head(w.n), w.j, 0))

    def lanes(size, at, B):
        return spec((None, 1, size), lambda w: (w.b if B > 1 else 0, 0, at(w)))

    def tile(array):  # an axis of size 1 is broadcast: its block is 1 and stays
        b, n, t, s = (int(size > 1) for size in array.shape)
        block = (None, None, plane.block_q if t else 1, plane.width if s else 1)
        return spec(block, lambda w: (w.b * b, w.n * n, w.i * t, w.j * s))

    statistic = spec((None, None, 1, plane.block_q), lambda w: (w.b, w.n, 0, w.i))
    whole = spec(arrays.m_mask.shape, lambda w: (0, 0), pipeline_mode=pl.Buffered(1)) if plane.use_window else None
    return _Arrays(
        query=queries(plane.H),
        key=keys(plane.H),
        value=keys(plane.Hv),
        bias=None if arrays.bias is None else tile(arrays.bias),
        sink=None if arrays.sink is None else spec((None, 1, LANES), lambda w: (w.n, 0, 0)),
        rows=tuple(lanes(plane.block_q, lambda w: w.i, x.shape[0]) for x in arrays.rows),
        cols=tuple(lanes(plane.width, lambda w: w.j, x.shape[0]) for x in arrays.cols),
        dense=tuple(tile(x) for x in arrays.dense),
        m_mask=whole,
        dout=None if arrays.dout is None else queries(plane.Hv),
        lse=None if arrays.lse is None else statistic,
        shift=None if arrays.shift is None else statistic,
    )


# --- Inside a kernel ------------------------------------------------------------------------------------------------


def _dot(a, b, contract: tuple[int, int]):
    """A product on the matrix unit, accumulated in float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _by_class(visits: _Visits, w: _Where, tile: Callable[[bool], None]) -> None:
    """Runs `tile(masked)`, compiled twice: full tiles contain no masking code, empty ones none at all."""
    if visits.any_mixed:
        pl.when(w.live & w.mixed)(lambda: tile(True))
    if visits.any_full:
        pl.when(w.live & jnp.logical_not(w.mixed))(lambda: tile(False))


def _for_rows(plane: _Plane, body: Callable[[Any], None]) -> None:
    """Second level of the vector unit: `body(r)` for the first row of each slice of whole rows."""

    def step(n, carry):
        body(pl.multiple_of(n * plane.block_rows, plane.block_rows))
        return carry

    lax.fori_loop(0, plane.block_q // plane.block_rows, step, None)


def _across(x, width: int):
    """[R, lanes], every lane alike, to [R, width]."""
    return jnp.concatenate([x] * -(-width // LANES), axis=1)[:, :width]


def _down(lanes_ref, column_ref) -> None:
    """A vector along lanes [1, R] to the layout of per-row statistics [R, lanes]."""
    column_ref[...] = jnp.broadcast_to(lanes_ref[...], (LANES, lanes_ref.shape[1])).T


def _piece(ref, rows, dtype):
    """Rows of a tile whose axes may be broadcast."""
    return (ref[...] if ref.shape[0] == 1 else ref[rows, :]).astype(dtype)


def _logits(plane: _Plane, w: _Where, x: _Arrays, s_ref, columns_ref, r, masked: bool):
    """Masked logits of the row slice at r, -inf where hidden, and the slope of the soft cap (None without one)."""
    rows = pl.ds(r, plane.block_rows)
    s, slope = s_ref[rows, :] * plane.scale, None
    if plane.soft_cap is not None:
        tanh = jnp.tanh(s / plane.soft_cap)
        s, slope = plane.soft_cap * tanh, 1 - tanh * tanh
    if x.bias is not None:
        s = s + _piece(x.bias, rows, jnp.float32)
    if masked:
        s = jnp.where(_visible(plane, w, x, columns_ref, r), s, -jnp.inf)
    return s, slope


def _visible(plane: _Plane, w: _Where, x: _Arrays, columns_ref, r):
    """What the mask shows of a row slice: [block_rows, width]."""
    R, width = plane.block_rows, plane.width
    row, col = w.i * plane.block_q, w.j * width
    if plane.use_window:
        # A window of the M-mask, at multiples of a register's 128 lanes. It hides the columns beyond S as well:
        # the last row sees column S - 1, and padding rows beyond it are thrown away.
        i, j = tiles.mask_window(row, col, plane.T, plane.S, plane.block_q, width, LANES)
        window = x.m_mask[pl.ds(pl.multiple_of(i + r, 32), R), pl.ds(pl.multiple_of(j, LANES), width)]
        return window.astype(jnp.int32) == 0
    i = row + r + lax.broadcasted_iota(jnp.int32, (R, width), 0)
    j = col + lax.broadcasted_iota(jnp.int32, (R, width), 1)
    visible = j < plane.S
    if plane.lowered is not None:
        rows = pl.ds(r, R)
        per_row = [_across(columns_ref[n, rows, :], width) for n in range(len(x.rows))]
        per_col = [jnp.broadcast_to(ref[...], (R, width)) for ref in x.cols]
        dense = [jnp.broadcast_to(_piece(ref, rows, jnp.int32), (R, width)) for ref in x.dense]
        visible = visible & plane.lowered.visible(i, j, per_row, per_col, dense)
    return visible


def _columns(plane: _Plane):
    """Scratch for the mask's values along rows, in the layout of per-row statistics; a token of it where none are."""
    n = 0 if plane.lowered is None else len(plane.lowered.rows)
    return pltpu.VMEM((n, plane.block_q, LANES) if n else (1, 8, LANES), jnp.int32)


def _rows_down(x: _Arrays, columns_ref) -> None:
    for n, lanes_ref in enumerate(x.rows):
        _down(lanes_ref, columns_ref.at[n])


# --- Forward --------------------------------------------------------------------------------------------------------


def _forward(plane: _Plane, visits: _Visits, w: _Where, x: _Arrays, outputs, scratch) -> None:
    out_ref, lse_ref = outputs
    m_ref, l_ref, acc_ref, s_ref, p_ref, columns_ref = scratch

    @pl.when(w.first)
    def _start():
        if x.sink is None:
            m_ref[...] = jnp.full_like(m_ref, -jnp.inf)
            l_ref[...] = jnp.zeros_like(l_ref)
        else:  # the sink is a key of weight exp(sink - sink) that was seen before all others
            m_ref[...] = jnp.broadcast_to(x.sink[...], m_ref.shape)
            l_ref[...] = jnp.where(m_ref[...] == -jnp.inf, 0.0, 1.0)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def tile(masked: bool) -> None:
        q = x.query[...]
        for sub in plane.sub_blocks:
            s_ref[:, sub] = _dot(q, x.key[sub, :], (1, 1))
        if masked:
            _rows_down(x, columns_ref)

        def update(r):
            rows = pl.ds(r, plane.block_rows)
            s, _ = _logits(plane, w, x, s_ref, columns_ref, r, masked)
            m = m_ref[rows, :]
            m_new = jnp.maximum(m, s.max(-1, keepdims=True))
            # While a row has seen no visible key its maximum is -inf; 0 in its place keeps exp(-inf - m) = 0.
            m_safe = jnp.where(m_new == -jnp.inf, 0.0, m_new)
            p = jnp.exp(s - _across(m_safe, plane.width))
            rescale = jnp.exp(m - m_safe)
            m_ref[rows, :] = m_new
            l_ref[rows, :] = l_ref[rows, :] * rescale + p.sum(-1, keepdims=True)
            acc_ref[rows, :] = acc_ref[rows, :] * _across(rescale, plane.Hv)
            p_ref[rows, :] = p.astype(p_ref.dtype)

        _for_rows(plane, update)
        acc_ref[...] += sum(_dot(p_ref[:, sub], x.value[sub, :], (1, 0)) for sub in plane.sub_blocks)

    _by_class(visits, w, tile)

    @pl.when(w.last)
    def _finish():
        empty = l_ref[...] == 0
        l = jnp.where(empty, 1.0, l_ref[...])
        out_ref[...] = (acc_ref[...] / _across(l, plane.Hv)).astype(out_ref.dtype)
        lse_ref[...] = jnp.where(empty, -jnp.inf, m_ref[...] + jnp.log(l)).T[:1]


# --- Backward: Dao et al., "FlashAttention", 2022, algorithm 4, one kernel for each loop order ----------------------


class _Work(NamedTuple):
    """Scratch of a backward pass: S and dP of a first-level block, and what belongs to its rows."""

    s: Any  # [block_q, width] float32
    dp: Any  # [block_q, width] float32
    lse: Any  # [block_q, lanes] float32
    shift: Any  # [block_q, lanes] float32
    columns: Any  # [n, block_q, lanes] int32


def _work(plane: _Plane) -> list:
    block, column = (plane.block_q, plane.width), (plane.block_q, LANES)
    return [*(pltpu.VMEM(shape, jnp.float32) for shape in (block, block, column, column)), _columns(plane)]


def _tile_gradients(plane, w, x, work: _Work, masked: bool, use: Callable) -> None:
    """`use(rows, p, dlogits, ds)` for each row slice of a tile: P = exp(logit - lse), its gradient before and after
    the soft cap and the scale."""
    q, do = x.query[...], x.dout[...]
    for sub in plane.sub_blocks:
        work.s[:, sub] = _dot(q, x.key[sub, :], (1, 1))
        work.dp[:, sub] = _dot(do, x.value[sub, :], (1, 1))
    _down(x.lse, work.lse)
    _down(x.shift, work.shift)
    if masked:
        _rows_down(x, work.columns)

    def gradients(r):
        rows = pl.ds(r, plane.block_rows)
        s, slope = _logits(plane, w, x, work.s, work.columns, r, masked)
        p = jnp.exp(s - _across(work.lse[rows, :], plane.width))
        dlogits = p * (work.dp[rows, :] + _across(work.shift[rows, :], plane.width))
        ds = dlogits * plane.scale if slope is None else dlogits * slope * plane.scale
        use(rows, p, dlogits, ds)

    _for_rows(plane, gradients)


def _query_gradient(plane: _Plane, arrays: _Arrays, mask: Mask | None, *, sums: bool) -> Sequence[jax.Array]:
    """dQ [B, N, T', H]; with `sums` the sums of dS along rows, [B, N, 1, T']."""
    visits = _visits(plane, mask)
    column = pltpu.VMEM((plane.block_q, LANES), jnp.float32)
    return _run(
        _query_pass,
        plane,
        visits,
        arrays,
        **_row_by_row(plane, visits),
        outputs=[_query_output(plane, plane.H), *([_query_lanes(plane)] if sums else [])],
        scratch=[
            pltpu.VMEM((plane.block_q, plane.H), jnp.float32),  # dQ
            column,  # sums
            pltpu.VMEM((plane.block_q, plane.width), plane.dtype),  # dS
            *_work(plane),
        ],
        products=(2, 1),
    )


def _query_pass(plane: _Plane, visits: _Visits, w: _Where, x: _Arrays, outputs, scratch) -> None:
    """dQ[i] = sum_j dS K[j]."""
    dq_ref, *sums_ref = outputs
    acc_ref, sums_acc_ref, ds_ref, *work = scratch

    @pl.when(w.first)
    def _start():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        sums_acc_ref[...] = jnp.zeros_like(sums_acc_ref)

    def tile(masked: bool) -> None:
        def use(rows, p, dlogits, ds):
            ds_ref[rows, :] = ds.astype(ds_ref.dtype)
            if sums_ref:
                sums_acc_ref[rows, :] += jnp.broadcast_to(dlogits.sum(-1, keepdims=True), (plane.block_rows, LANES))

        _tile_gradients(plane, w, x, _Work(*work), masked, use)
        acc_ref[...] += sum(_dot(ds_ref[:, sub], x.key[sub, :], (1, 0)) for sub in plane.sub_blocks)

    _by_class(visits, w, tile)

    @pl.when(w.last)
    def _finish():
        dq_ref[...] = acc_ref[...].astype(dq_ref.dtype)
        for ref in sums_ref:
            ref[...] = sums_acc_ref[...].T[:1]


def _key_gradients(plane: _Plane, arrays: _Arrays, mask: Mask | None, *, sums: bool) -> Sequence[jax.Array]:
    """dK [B, K, S', H] and dV [B, K, S', Hv]; with `sums` the sums of dS along columns, [B, N, 1, S']."""
    visits = _visits(plane, mask, transpose=True)
    G, steps = plane.G, visits.steps

    def where(b, k, j, g, step, numbers):
        n = k * G + g
        i, live, mixed = visits.at(numbers, b, n, j, step)
        # The G query heads that share a key head are summed here, one after another.
        first, last = (g == 0) & (step == 0), (g == G - 1) & (step == steps - 1)
        return _Where(b, n, i, j, live, mixed, first, last, head=(step == 0, step == steps - 1))

    block = (plane.block_q, plane.width)
    return _run(
        _key_pass,
        plane,
        visits,
        arrays,
        grid=(plane.B, plane.K, plane.S_padded // plane.width, G, steps),
        where=where,
        parallel=3,
        streamed=plane.block_q,
        outputs=[
            _key_output(plane, plane.H),
            _key_output(plane, plane.Hv),
            *([_key_lanes(plane)] if sums else []),
        ],
        scratch=[
            pltpu.VMEM((plane.width, plane.H), jnp.float32),  # dK
            pltpu.VMEM((plane.width, plane.Hv), jnp.float32),  # dV
            pltpu.VMEM((1, plane.width), jnp.float32),  # sums
            pltpu.VMEM(block, plane.dtype),  # P
            pltpu.VMEM(block, plane.dtype),  # dS
            *_work(plane),
        ],
        products=(2, 2),
    )


def _key_pass(plane: _Plane, visits: _Visits, w: _Where, x: _Arrays, outputs, scratch) -> None:
    """dV[j] = sum_i P^T dO[i], dK[j] = sum_i dS^T Q[i]."""
    dk_ref, dv_ref, *sums_ref = outputs
    dk_acc_ref, dv_acc_ref, sums_acc_ref, p_ref, ds_ref, *work = scratch

    @pl.when(w.first)
    def _start():
        dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
        dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

    @pl.when(w.head[0])
    def _start_head():  # each query head has its own sums
        sums_acc_ref[...] = jnp.zeros_like(sums_acc_ref)

    def tile(masked: bool) -> None:
        def use(rows, p, dlogits, ds):
            p_ref[rows, :] = p.astype(p_ref.dtype)
            ds_ref[rows, :] = ds.astype(ds_ref.dtype)
            if sums_ref:
                sums_acc_ref[...] += dlogits.sum(0, keepdims=True)

        _tile_gradients(plane, w, x, _Work(*work), masked, use)
        for sub in plane.sub_blocks:
            # Sums over rows are cut like those over columns: short ones round less.
            dv_acc_ref[sub, :] += sum(_dot(p_ref[rows, sub], x.dout[rows, :], (0, 0)) for rows in plane.row_blocks)
            dk_acc_ref[sub, :] += sum(_dot(ds_ref[rows, sub], x.query[rows, :], (0, 0)) for rows in plane.row_blocks)

    _by_class(visits, w, tile)

    if sums_ref:

        @pl.when(w.head[1])
        def _finish_head():
            sums_ref[0][...] = sums_acc_ref[...]

    @pl.when(w.last)
    def _finish():
        dk_ref[...] = dk_acc_ref[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_acc_ref[...].astype(dv_ref.dtype)


def _bias_gradient(plane: _Plane, arrays: _Arrays, mask: Mask | None) -> jax.Array:
    """dS of a bias [B|1, N|1, T, S], summed over the batch and heads that share it: nothing larger than the bias."""
    visits = _visits(plane, mask, hull=True)
    B, N = arrays.bias.shape[:2]

    def where(b_bias, n_bias, i, j, b, n, numbers):
        b, n, first = b_bias + b, n_bias + n, (b == 0) & (n == 0)
        return _Where(b, n, i, j, visits.within(numbers, b, n, i, j), True, first, False)

    block = (plane.block_q, plane.width)
    output = _Output(
        (B, N, plane.T_padded, plane.S_padded),
        jnp.float32,
        (None, None, *block),
        lambda w: (w.b if B > 1 else 0, w.n if N > 1 else 0, w.i, w.j),
    )
    (dbias,) = _run(
        _bias_pass,
        plane,
        visits,
        arrays,
        grid=(B, N, plane.T_padded // block[0], plane.S_padded // block[1], plane.B // B, plane.N // N),
        where=where,
        parallel=4,
        streamed=sum(block),
        outputs=[output],
        scratch=_work(plane),
        products=(1, 1),
    )
    return dbias


def _bias_pass(plane: _Plane, visits: _Visits, w: _Where, x: _Arrays, outputs, scratch) -> None:
    (dbias_ref,) = outputs

    @pl.when(w.first)
    def _start():  # tiles that the mask skips keep these zeros
        dbias_ref[...] = jnp.zeros_like(dbias_ref)

    @pl.when(w.live)
    def _tile():
        def use(rows, p, dlogits, ds):
            dbias_ref[rows, :] += dlogits

        _tile_gradients(plane, w, x, _Work(*scratch), True, use)
