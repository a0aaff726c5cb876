# SPDX-License-Identifier: Apache-2.0
"""What the kernels for NVIDIA GPUs share: arrays as they want them, and how a tile of logits is made from products.

A `Plane` is one head of one batch element: T x S logits. `prepare` pads and reshapes arrays, sorts tiles, and says how
a tile is masked; a kernel then asks `Plane.logits` for each tile of products, in whatever layout it has them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core.mma import cost_option
from pallas_kernels.flash_attention import tiles
from pallas_kernels.masks import lowered as lowered_lib

LOG2E = math.log2(math.e)
Ref = Any


class Operands(NamedTuple):
    """Arrays outside, their references inside a kernel. T' and S' are whole tiles, where copies need it."""

    query: Any  # [B, T', N * H]
    key: Any  # [B, S', K * H]
    value: Any  # [B, S', K * Hv]
    dout: Any  # [B, T', N * Hv]
    stats: Any  # `row_stats`
    sink: Any  # [N]
    bias: Any  # This and the next three have the axes of a tile last: [B|1, N|1, rows|1, columns|1], whole tiles.
    mask_rows: Any
    mask_cols: Any
    mask_dense: Any
    mixed: Any  # tiles.Schedule's
    live: Any
    where: Any  # its `runs` or `order`


class At(NamedTuple):
    """Which tile: batch element, query head, and the first of its rows and columns."""

    b: Any
    n: Any
    row: Any
    col: Any


@dataclasses.dataclass(frozen=True)
class Plane:
    """The T x S planes of logits, and how one of them is made from products of query and key."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    Hv: int
    dtype: Any
    scale: float
    soft_cap: float | None
    has_bias: bool
    visible: Callable | None
    transposed: bool  # a tile's rows are keys
    hide_tail: bool  # keys from S on have to be masked
    acc: Any  # the layout in which products come out of the tensor cores

    @property
    def plain(self) -> bool:
        """Logits are products times a positive number, which then need not be multiplied before the maximum."""
        return self.soft_cap is None and not self.has_bias and self.scale > 0

    @property
    def unit(self) -> float:
        """What `logits` have to be multiplied with to be exponents of 2."""
        return self.scale * LOG2E if self.plain else 1.0

    def zeros(self, *shape: int) -> jax.Array:
        return self.fill(0.0, *shape)

    def fill(self, value: float, *shape: int) -> jax.Array:
        """A float32 tile, or a vector along its rows."""
        layout = self.acc if len(shape) == 2 else self.acc.reduce(1)
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def logits(self, x: jax.Array, ops: Operands, at: At, masked: bool) -> tuple[jax.Array, jax.Array | None]:
        """Logits in units of `unit` from products `x`, -inf where hidden; and the slope of the soft cap."""
        slope = None
        if self.soft_cap is not None:
            # tanh(y) = 1 - 2 / (1 + exp(2 y)); the hardware's own tanh has 11 bits only.
            tanh = 1 - 2 / (1 + jnp.exp2(x * (2 * LOG2E * self.scale / self.soft_cap)))
            x, slope = tanh * (self.soft_cap * LOG2E), 1 - tanh * tanh
        elif not self.plain:
            x = x * (self.scale * LOG2E)
        if self.has_bias:
            x = x + self._piece(ops.bias, at, x.shape).astype(jnp.float32) * LOG2E
        if masked and (visible := self.visibility(ops, at, x.shape)) is not None:
            x = jnp.where(visible, x, -jnp.inf)
        return x, slope

    def visibility(self, ops: Operands, at: At, shape: tuple[int, ...]) -> jax.Array | None:
        """Which logits of a tile count; None if all."""
        i, j = (functools.partial(self._numbers, at, shape, n) for n in ((1, 0) if self.transposed else (0, 1)))
        visible = j() < self.S if self.hide_tail else None
        if self.visible is not None:
            pieces = [
                [self._piece(ref, at, shape).astype(jnp.int32) for ref in refs]
                for refs in (ops.mask_rows, ops.mask_cols, ops.mask_dense)
            ]
            allowed = self.visible(i, j, *pieces)
            visible = allowed if visible is None else visible & allowed
        return visible

    def _numbers(self, at: At, shape: tuple[int, ...], axis: int) -> jax.Array:
        """Of a tile's rows or columns. An iota of the whole tile would divide for each, and its registers, hoisted out
        of loops, would be missing there."""
        along = plgpu.broadcasted_iota(jnp.int32, (shape[axis],), 0, layout=self.acc.reduce(1 - axis))
        return lax.broadcast_in_dim(along + (at.row, at.col)[axis], shape, (axis,))

    def _piece(self, ref: Ref, at: At, shape: tuple[int, ...]) -> jax.Array:
        """A tile of an array [B|1, N|1, rows|1, columns|1], from global memory into the accumulator's layout."""
        ref = ref.at[broadcast_index(at.b, ref.shape[0]), broadcast_index(at.n, ref.shape[1])]
        rows, cols = pl.ds(at.row, shape[0]), pl.ds(at.col, shape[1])
        match ref.shape[0] > 1, ref.shape[1] > 1:
            case True, True:
                return plgpu.load(ref.at[rows, cols], layout=self.acc, optimized=False)
            case True, False:
                x = plgpu.load(ref.at[rows, 0], layout=self.acc.reduce(1), optimized=False)
                return along_rows(x, shape)
            case False, True:
                x = plgpu.load(ref.at[0, cols], layout=self.acc.reduce(0), optimized=False)
                return along_columns(x, shape)
            case _:
                return jnp.broadcast_to(ref[0, 0], shape)


def broadcast_index(index: Any, size: int) -> Any:
    """Along an axis that may be broadcast."""
    return index if size > 1 else 0


def zero_of_step(number: jax.Array) -> jax.Array:
    """0, if `number` is a count, and the compiler cannot tell. What is indexed with it inside a loop is computed there:
    hoisted out, the descriptors of a product's operands and a mask's row numbers take the registers that tiles need."""
    return lax.shift_right_logical(number, 30)


def along_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One number a row."""
    return lax.broadcast_in_dim(x, shape, (0,))


def along_columns(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, (1,))


# fmt: off
def prepare(
    query, key, value, bias, sink, mask, scale: float, soft_cap: float | None, block_q: int, block_k: int,
    *, acc: Any, copies_fill: bool, transposed: bool = False, hide_tail: bool = True,
    widths: tuple[int, int] | None = None, dout=None,
) -> tuple[Plane, tiles.Schedule, Operands]:
    """What a kernel with tiles of block_q x block_k (rows are keys if `transposed`) needs.

    Args:
      acc: the layout of its products.
      copies_fill: whether its copies to shared memory fill what is out of bounds by 0; if not, arrays are whole tiles.
      hide_tail: whether keys from S on, which are zeros, have to be masked. Without it they have weight exp(0 - LSE).
      widths: to what H and Hv are padded; multiples of 16 by default.
      dout: of a backward pass, which brings `Operands.stats` too.
    """
    # fmt: on
    (B, T, N, H), (_, S, K, Hv) = query.shape, value.shape
    hide_tail = hide_tail and S % block_k != 0
    schedule = tiles.schedule(mask, T, S, block_q, block_k, transpose=transposed, mix_tail=hide_tail)
    lowered = None if mask is None else lowered_lib.lower(mask, T, S)
    H, Hv = widths or (H + -H % 16, Hv + -Hv % 16)  # an mma takes 16 of the depth at a time

    def heads(x: jax.Array, width: int, block: int) -> jax.Array:
        """[B, L, heads, H] -> [B, L', heads * width], more of it being 0."""
        multiple = 8 if copies_fill else block  # TMA wants whole swizzle patterns
        x = pad(x, {1: x.shape[1] + -x.shape[1] % multiple, 3: width})
        return x.reshape(*x.shape[:2], -1)

    def whole_tiles(x: jax.Array) -> jax.Array:
        """[B|1, N|1, T|1, S|1], padded to whole tiles where it is not broadcast."""
        sizes = {axis: x.shape[axis] + -x.shape[axis] % block for axis, block in ((2, block_q), (3, block_k))}
        x = pad(x, {axis: size for axis, size in sizes.items() if x.shape[axis] > 1})
        return jnp.swapaxes(x, 2, 3) if transposed else x

    ops = Operands(
        query=heads(query, H, block_q),
        key=heads(key, H, block_k),
        value=heads(value, Hv, block_k),
        dout=None if dout is None else heads(dout, Hv, block_q),
        stats=None,
        sink=sink,
        bias=None if bias is None else whole_tiles(bias.reshape((1,) * (4 - bias.ndim) + bias.shape)),
        mask_rows=[whole_tiles(x[:, None, :, None]) for x in lowered.rows] if lowered else [],
        mask_cols=[whole_tiles(x[:, None, None, :]) for x in lowered.cols] if lowered else [],
        mask_dense=[whole_tiles(x) for x in lowered.dense] if lowered else [],
        mixed=jnp.asarray(schedule.mixed),
        live=jnp.asarray(schedule.live),
        where=jnp.asarray(schedule.order if schedule.runs is None else schedule.runs),
    )
    sizes = {"B": B, "T": T, "S": S, "N": N, "K": K, "H": H, "Hv": Hv}
    plane = Plane(
        **sizes,
        dtype=query.dtype,
        scale=scale,
        soft_cap=soft_cap,
        has_bias=bias is not None,
        visible=lowered.visible if lowered else None,
        transposed=transposed,
        hide_tail=hide_tail,
        acc=acc,
    )
    return plane, schedule, ops


def pad(x: jax.Array, sizes: dict[int, int]) -> jax.Array:
    """Zeros up to the given sizes of axes; no copy where nothing is missing."""
    widths = [(0, sizes.get(axis, n) - n) for axis, n in enumerate(x.shape)]
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def row_stats(lse: jax.Array, *others: jax.Array, block_q: int) -> jax.Array:
    """LSE in base 2 and other numbers of each row, [B, N, T], by tiles: [B, N, tiles, how many, block_q]."""
    B, N, T = lse.shape
    # P = exp2(logit - LSE) is 0 in rows that see no key, and in those beyond T, if their LSE is +inf.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2E)
    width = ((0, 0), (0, 0), (0, -T % block_q))
    padded = [jnp.pad(lse, width, constant_values=jnp.inf), *(jnp.pad(x, width) for x in others)]
    return jnp.stack([x.reshape(B, N, -1, block_q) for x in padded], axis=3)


def deltas(out: jax.Array, lse: jax.Array, dout: jax.Array, dlse: jax.Array) -> jax.Array:
    """delta [B, N, T] of dS = P * (dP - delta): sum_h dO O; a gradient that enters through the LSE adds P * dlse."""
    delta = jnp.einsum("btnh,btnh->bnt", dout, out, preferred_element_type=jnp.float32) - dlse
    return jnp.where(jnp.isneginf(lse), 0, delta)


def sink_gradient(sink: jax.Array | None, lse: jax.Array, delta: jax.Array) -> jax.Array | None:
    """The sink is a key without a value row: dP = 0 there."""
    if sink is None:
        return None
    p = jnp.where(jnp.isneginf(lse), 0, jnp.exp(sink.astype(jnp.float32)[:, None] - lse))
    return -jnp.sum(p * delta, axis=(0, 2)).astype(sink.dtype)


def slopes(p: jax.Array, dp: jax.Array, delta: jax.Array, slope: jax.Array | None) -> jax.Array:
    """dS / scale = P * (dP - delta), by the rule of softmax, times the slope of the soft cap."""
    ds = p * (dp - delta)
    return ds if slope is None else ds * slope


def cost_estimate(plane: Plane, products: int) -> dict[str, Any]:
    """The option of `plgpu.kernel` that says what a plane without a mask costs."""
    pairs = plane.B * plane.N * plane.T * plane.S
    moved = plane.B * (plane.H + plane.Hv) * 2 * (plane.T * plane.N + plane.S * plane.K)
    flops = products * pairs * (plane.H + plane.Hv)
    return cost_option(flops, pairs, moved)
