# SPDX-License-Identifier: Apache-2.0
"""From the arrays of a call to grid steps: blocks, the schedule in scalar memory, and the kernel call itself.

grid  forward, dQ   (b, n, row of tiles i, step)         `tiles.schedule` says which column the step visits;
      dK, dV        (b, k, column of tiles j, g, step)   a step beyond the last live tile stays where it is,
      dbias         (b, n, i, j, b', n')                 copies nothing and computes nothing
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

from pallas_kernels.core.tpu import LANES, VMEM_BYTES
from pallas_kernels.core.varying import vary_like
from pallas_kernels.flash_attention import tiles
from pallas_kernels.masks import Causal, Mask
from pallas_kernels.masks.lowered import Lowered, lower

# Scalar memory for the schedule of a mask that holds arrays, in int32; a longer one is cut down to four a row.
SCHEDULE_WORDS = 2**16


# --- What a call is made of ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plane:
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


class Arrays(NamedTuple):
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


def prepare(query, key, value, bias, mask, scale, soft_cap, config) -> tuple[Plane, Arrays]:
    """Heads first and padded to whole blocks, which XLA does in one copy."""
    (B, T, N, H), (S, K, Hv) = query.shape, value.shape[1:]
    # int8 tiles have 32 rows, registers 128 lanes: arrays shorter than a block get a block of their own length.
    block_q, block_k = min(config.block_q, T + -T % 32), min(config.block_k, S + -S % LANES)
    width = min(config.block_k_major - config.block_k_major % block_k, S + -S % block_k)
    causal = isinstance(mask, Causal) and mask.query_positions is None and mask.key_positions is None
    lowered = None if mask is None else lower(mask, T, S)
    plane = Plane(
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
    arrays = Arrays(
        query=pad(jnp.swapaxes(query, 1, 2), 2, plane.T_padded),
        key=pad(jnp.swapaxes(key, 1, 2), 2, plane.S_padded),
        value=pad(jnp.swapaxes(value, 1, 2), 2, plane.S_padded),
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
            rows=tuple(pad(x[:, None], 2, plane.T_padded) for x in lowered.rows),
            cols=tuple(pad(x[:, None], 2, plane.S_padded) for x in lowered.cols),
            dense=tuple(_pad_plane(plane, x if x.shape[2] != 1 else x.astype(jnp.int32)) for x in lowered.dense),
        )
    return plane, arrays


def pad(x: jax.Array, axis: int, size: int, fill: float = 0) -> jax.Array:
    widths = [(0, size - n if a == axis else 0) for a, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=fill) if x.shape[axis] != size else x


def _pad_plane(plane: Plane, x: jax.Array) -> jax.Array:
    """[B|1, N|1, T|1, S|1] with whole blocks in the axes that are not broadcast."""
    for axis, size in ((2, plane.T_padded), (3, plane.S_padded)):
        x = x if x.shape[axis] == 1 else pad(x, axis, size)
    return x


# --- Which tiles a grid step stands for ----------------------------------------------------------------------------


class Where(NamedTuple):
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
class Visits:
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


def plan_visits(plane: Plane, mask: Mask | None, *, transpose: bool = False, hull: bool = False) -> Visits:
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
    return Visits(
        numbers=numbers.astype(np.int32).reshape(-1),
        shape=numbers.shape,
        schedule=plan,
        steps=max(1, int(np.max(plan.live))) if static else columns,
        any_mixed=not static or bool(np.any(plan.mixed)),
        any_full=not static or bool(np.any(np.asarray(plan.live) > plan.mixed)),
    )


# --- From arrays to a kernel call -----------------------------------------------------------------------------------


class Output(NamedTuple):
    """An output array, its block, and where a grid step writes it."""

    shape: tuple[int, ...]
    dtype: Any
    block: tuple[int | None, ...]
    at: Callable[[Where], tuple]


def query_output(plane: Plane, H: int) -> Output:
    shape = (plane.B, plane.N, plane.T_padded, H)
    return Output(shape, plane.dtype, (None, None, plane.block_q, H), lambda w: (w.b, w.n, w.i, 0))


def key_output(plane: Plane, H: int) -> Output:
    shape = (plane.B, plane.K, plane.S_padded, H)
    return Output(shape, plane.dtype, (None, None, plane.width, H), lambda w: (w.b, plane.key_head(w.n), w.j, 0))


def query_lanes(plane: Plane) -> Output:
    """One float32 a query row, along lanes: in HBM [.., T', 1] would be padded to 128 times its size."""
    shape = (plane.B, plane.N, 1, plane.T_padded)
    return Output(shape, jnp.float32, (None, None, 1, plane.block_q), lambda w: (w.b, w.n, 0, w.i))


def key_lanes(plane: Plane) -> Output:
    shape = (plane.B, plane.N, 1, plane.S_padded)
    return Output(shape, jnp.float32, (None, None, 1, plane.width), lambda w: (w.b, w.n, 0, w.j))


def run(
    kernel: Callable,
    plane: Plane,
    visits: Visits,
    arrays: Arrays,
    *,
    grid: tuple[int, ...],
    where: Callable[..., Where],
    outputs: Sequence[Output],
    scratch: Sequence[Any],
    parallel: int,
    products: tuple[int, int],
    streamed: int,
) -> Sequence[jax.Array]:
    """Runs `kernel(plane, visits, w, x, outputs, scratch)` at every step of the grid.

    Args:
      where: (*grid position, schedule) -> Where; its last grid axes sum into one output block.
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


def row_by_row(plane: Plane, visits: Visits) -> dict[str, Any]:
    """The grid of forward and dQ: each row of tiles of each head visits its live columns."""

    def where(b, n, i, step, numbers):
        j, live, mixed = visits.at(numbers, b, n, i, step)
        return Where(b, n, i, j, live, mixed, step == 0, step == visits.steps - 1)

    grid = (plane.B, plane.N, plane.T_padded // plane.block_q, visits.steps)
    return {"grid": grid, "where": where, "parallel": 3, "streamed": plane.width}


def _specs(plane: Plane, arrays: Arrays, spec: Callable) -> Arrays:
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
    return Arrays(
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
