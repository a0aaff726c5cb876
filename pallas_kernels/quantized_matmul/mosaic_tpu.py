# SPDX-License-Identifier: Apache-2.0
"""quantized_matmul for TPUs: packed weights stream to the chip, and are decoded there on their way to the matrix unit.

    x [M, K]      on the chip for good, inputs in the order in which they leave the words
    words         blocks of outputs with all their inputs, copied while the block before is decoded
    per 256 outputs, for each group of 8 chunks of 16 words:
        turn      words [16 blocks, 8 chunks x 16 outputs x 16] -> rows [16 outputs x 16 blocks, 8 chunks x 16 = 128]
        scales    codes and zeros of strips, each spread over the lanes of its words
        decode    w[t] = ((rows >> bits t) & mask - zero) * scale       in float32, one rounding to the dtype of x
        multiply  z [M, 256] += x[t] [M, 128] w[t] [256, 128]^T         in float32, two positions t at a time

Sixteen outputs share a row of words in memory (packing.py), so that 128 lanes hold a few words of several outputs. A
product wants many words of one: `turn` cuts rows in pieces and puts them together, once for all values of a word. What
is left of the chunks is taken in groups of 4, 2 and 1. They fill the lanes with as many copies of their words, each
shifted to another part of the values, and have fewer positions t: no lane is decoded in vain.

The second plane of a `MixedBitWeight`, the low digits of strips of 4 bits, follows the first, by the inputs of its
strips. Scales of outputs, bias and activation are done by XLA, while it puts outputs in order.

Source: Li et al., "Enabling Fast 2-bit LLM on GPUs", 2023, sections 2 and 3, for what is decoded.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.activations import ACTIVATIONS
from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.core.tpu import LANES, VMEM_BYTES, dot
from pallas_kernels.core.varying import vary_like
from pallas_kernels.quantized_matmul import packing
from pallas_kernels.quantized_matmul.config import TPU_TILE, MosaicTpuConfig, chunk_inputs, mosaic_tpu_heuristic
from pallas_kernels.quantized_matmul.packing import CHUNK
from pallas_kernels.quantized_matmul.weights import BLOCK, STRIP, IntWeight, MixedBitWeight, Weight

MOST_ROWS = 256
BLOCKS = TPU_TILE // BLOCK  # blocks of 16 outputs that are decoded at a time: of bfloat16, a tile
GROUP = LANES // CHUNK  # chunks whose words of one output fill the lanes


def supports(call: Call, device: Device) -> Refusal | None:
    if device.platform != "tpu":
        return Refusal(f"its kernels are for TPUs, and this is {device.platform}")
    if not device.arch:
        return Refusal(f"its kernels are compiled for TPU v4 and later, and this is {device.kind}")
    s, dtype, bits = call.sizes, call.arguments[0].dtype, call.option("bits")
    if dtype not in ("float32", "bfloat16"):
        return Refusal(f"TPUs compute in float32 and bfloat16, not in {dtype}")
    if s["M"] > MOST_ROWS:
        return Refusal(f"M={s['M']} rows, and it is for {MOST_ROWS} at most")
    if call.option("activation_bits") is not None:
        return Refusal("it multiplies in the dtype of x, not in integers (activation_bits=8)")
    if call.option("outliers"):
        return Refusal("it does not add outliers; quantize with outlier_fraction=0")
    if bits == 2:
        return Refusal('it takes 2 bits as part of scheme="mixed_2_4" only (four_bit_fraction=0 has no others)')
    inputs = chunk_inputs(bits)
    if (group := call.option("group_size")) is not None and group % inputs:
        return Refusal(f"groups of {group} inputs; it takes multiples of {inputs} at {bits} bits")
    needed = mosaic_tpu_heuristic(call).vmem_bytes(call)
    if needed > VMEM_BYTES:
        mib = f"{needed / 2**20:.0f} MiB of on-chip memory, and it plans with {VMEM_BYTES // 2**20}"
        return Refusal(f"M={s['M']} rows of K={s['K']} and words of 256 outputs need {mib}")
    return None


def forward(
    x: jax.Array, weight: Weight, bias: jax.Array | None, *, activation: str | None, config: MosaicTpuConfig
) -> jax.Array:
    """As `xla.forward`."""
    M = len(x)
    x = jnp.pad(x, ((0, -M % 8), (0, 0)))  # rows of a register
    planes = _planes_of_digits(x, weight) if isinstance(weight, MixedBitWeight) else [_plane_of_codes(x, weight)]
    z = _product(planes, weight, config)[:M]
    if isinstance(weight, IntWeight) and weight.group_size is None:
        z *= weight.scale[0, : weight.shape[1]]
    if bias is not None:
        z += bias.astype(jnp.float32)
    return ACTIVATIONS[activation](z).astype(x.dtype)


# --- What is multiplied ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Plane:
    """Words of one form, and the inputs that they belong to.

    Attributes:
      bits: of a value.
      x: [M, inputs], as `_ordered` has them.
      arrays: words [N' / 16, 256 C], of C chunks; then stats and steps, or scales of chunks, [N' / 16, 16 C].
    """

    bits: int
    x: jax.Array
    arrays: list[jax.Array]


def _planes_of_digits(x: jax.Array, weight: MixedBitWeight) -> list[_Plane]:
    S, T = (plane.steps.shape[1] for plane in (weight.main, weight.tail))
    strips = jnp.pad(x, ((0, 0), (0, S * STRIP - x.shape[1]))).reshape(len(x), S, STRIP)
    index = jnp.pad(weight.tail_index, (0, T - len(weight.tail_index)))  # padding has scale 0
    inputs = [strips, jnp.take(strips, index, axis=1)] if T else [strips]
    return [
        _Plane(2, _ordered(x, 2), [plane.words, plane.stats, plane.steps])
        for x, plane in zip(inputs, (weight.main, weight.tail), strict=False)
    ]


def _plane_of_codes(x: jax.Array, weight: IntWeight) -> _Plane:
    inputs, arrays = chunk_inputs(weight.bits), [weight.words]
    chunks = weight.words.shape[1] // (BLOCK * CHUNK)
    x = jnp.pad(x, ((0, 0), (0, chunks * inputs - x.shape[1])))
    if weight.group_size is not None:
        # A scale for each chunk and output, as words lie. They are 1/32 of a weight of 4 bits.
        scale = jnp.repeat(weight.scale, weight.group_size // inputs, axis=0)
        arrays.append(packing.blocked(scale[:chunks].T, 1))
    return _Plane(weight.bits, _ordered(x, weight.bits), arrays)


@dataclasses.dataclass(frozen=True)
class _Group:
    """Chunks that are decoded together.

    Attributes:
      chunks: how many; a power of two.
      copies: of their words in the lanes, [copies, chunks, 16]; copy r holds bits from 32 / copies r on.
      positions: values that each lane decodes, bits t + 32 / copies r of its word.
    """

    chunks: int
    copies: int
    positions: int

    @property
    def lanes(self) -> int:
        return self.copies * self.chunks * CHUNK

    @staticmethod
    def of(chunks: int, bits: int) -> "_Group":
        copies = min(GROUP // chunks, 32 // bits)
        return _Group(chunks, copies, 32 // bits // copies)


def _groups(chunks: int, bits: int) -> Iterator[tuple[int, int, _Group]]:
    """First chunk, how many groups in a row, and their form.

    >>> [(first, count, group.chunks) for first, count, group in _groups(43, 2)]
    [(0, 5, 8), (40, 1, 2), (42, 1, 1)]
    """
    size, first = GROUP, 0
    while size:
        if count := (chunks - first) // size:
            yield first, count, _Group.of(size, bits)
        first, size = first + count * size, size // 2


def _ordered(x: jax.Array, bits: int) -> jax.Array:
    """[M, inputs] of x [M, ...]: for each group, its positions; for each of these the inputs of the lanes."""
    M = len(x)
    by_word = packing.to_memory(x.reshape(M, -1, CHUNK, 32 // bits).swapaxes(2, 3), bits)
    # [M, C, values from the lowest bit on, words]. Slices: XLA makes a loop of an index.
    by_word = jnp.stack([by_word[:, :, v] for v in np.argsort(packing.shifts(bits))], axis=2)
    pieces = []
    for first, count, group in _groups(by_word.shape[1], bits):
        piece = by_word[:, first : first + count * group.chunks]
        piece = piece.reshape(M, count, group.chunks, group.copies, group.positions, CHUNK)
        pieces.append(piece.transpose(0, 1, 4, 3, 2, 5).reshape(M, -1))
    return jnp.concatenate(pieces, axis=1)


# --- The kernel -----------------------------------------------------------------------------------------------


def _product(planes: list[_Plane], weight: Weight, config: MosaicTpuConfig) -> jax.Array:
    """z [M, N] in float32."""
    M, (K, N) = len(planes[0].x), weight.shape
    tiles = min(config.tiles, pl.cdiv(N, TPU_TILE))
    columns = TPU_TILE * tiles
    steps = pl.cdiv(N, columns)
    operands = {"x": [plane.x for plane in planes], "arrays": [plane.arrays for plane in planes]}
    operands = vary_like(operands, operands)
    axis_type = jax.typeof(operands["x"][0]).manual_axis_type
    specs = {
        # Rows are copied once, and need no second buffer.
        "x": [pl.BlockSpec(x.shape, lambda n: (0, 0), pipeline_mode=pl.Buffered(1)) for x in operands["x"]],
        "arrays": jax.tree.map(
            lambda array: pl.BlockSpec((BLOCKS * tiles, array.shape[1]), lambda n: (n, 0)), operands["arrays"]
        ),
    }
    z = pl.pallas_call(
        functools.partial(_kernel, [plane.bits for plane in planes], tiles),
        out_shape=jax.ShapeDtypeStruct((M, steps * columns), jnp.float32, manual_axis_type=axis_type),
        grid=(steps,),
        in_specs=[specs],
        out_specs=pl.BlockSpec((M, columns), lambda n: (0, n)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * N * K,
            transcendentals=0,
            bytes_accessed=weight.nbytes + sum(plane.x.nbytes for plane in planes) + 4 * M * N,
        ),
        name="quantized_matmul",
    )(operands)
    # The kernel's outputs are [M, tiles, 16 of a block, blocks].
    return z.reshape(M, -1, BLOCK, BLOCKS).swapaxes(2, 3).reshape(M, -1)[:, :N]


def _kernel(bits: list[int], tiles: int, refs: dict, out_ref: Any) -> None:
    def tile(i: Any, _: None) -> None:
        blocks = pl.ds(pl.multiple_of(BLOCKS * i, BLOCKS), BLOCKS)
        z = jnp.zeros((TPU_TILE, out_ref.shape[0]), jnp.float32)
        for x_ref, arrays, b in zip(refs["x"], refs["arrays"], bits, strict=True):
            z = _add_plane(z, x_ref, arrays, blocks, b)
        out_ref[:, _lanes(TPU_TILE * i, TPU_TILE)] = z.T

    lax.fori_loop(0, tiles, tile, None)


def _add_plane(z: jax.Array, x_ref: Any, refs: list, blocks: Any, bits: int) -> jax.Array:
    """z + (x w)^T of a plane, [16 outputs x 16 blocks, M]: `blocks` of its arrays, group by group."""
    chunks = refs[0].shape[1] // (BLOCK * CHUNK)

    def add(first: int, group: _Group, j: Any, z: jax.Array) -> jax.Array:
        chunk = first + j * group.chunks
        of_chunk = [ref.shape[1] // chunks for ref in refs]
        arrays = [ref[blocks, _lanes(n * chunk, n * group.chunks)] for ref, n in zip(refs, of_chunk, strict=True)]
        # Words are signed from here on, where it costs nothing: XLA would write all of them anew.
        arrays = [a.astype(jnp.int32) if a.dtype == jnp.uint32 else a for a in arrays]
        return _multiply(z, arrays, group, bits, x_ref, chunk_inputs(bits) * chunk)

    for first, count, group in _groups(chunks, bits):
        step = functools.partial(add, first, group)
        z = lax.fori_loop(0, count, step, z) if count > 1 else step(0, z)
    return z


def _lanes(start: Any, size: int) -> Any:
    """Those that are not known while compiling begin at a register's first."""
    return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, LANES), size)


def _multiply(z: jax.Array, arrays: list, group: _Group, bits: int, x_ref: Any, begin: Any) -> jax.Array:
    """z + (x w)^T of a group, [16 outputs x 16 blocks, M]. Its arrays are [16 blocks, chunks x 16 outputs x ...]."""
    chunks = jnp.split(arrays[0], group.chunks, axis=1)
    words = _turned([chunk >> (32 // group.copies * r) for r in range(group.copies) for chunk in chunks])
    zero, scale = 2 ** (bits - 1), None
    if bits == 2:
        zero, scale = _stats(arrays[1], arrays[2], group)
    elif len(arrays) > 1:
        scale = _scales(arrays[1], group)

    def weights(t: int) -> jax.Array:
        w = (((words >> (bits * t)) & (2**bits - 1)) - zero).astype(jnp.float32)
        return w if scale is None else w * scale

    # Two at a time: the matrix unit sums over 128 or 256 lanes.
    for t in range(0, group.positions, 2):
        w = jnp.concatenate([weights(t) for t in range(t, min(t + 2, group.positions))], axis=1)
        z += dot(w.astype(x_ref.dtype), x_ref[:, _lanes(begin + t * group.lanes, w.shape[1])], (1, 1))
    return z


def _turned(chunks: list[jax.Array]) -> jax.Array:
    """[16 outputs x 16 blocks, chunks x 16] of chunks [16 blocks, 16 outputs x 16]."""
    whole = (chunks * GROUP)[:GROUP]
    halves = [_exchanged([chunk[:, half : half + LANES] for chunk in whole]) for half in (0, LANES)]
    return jnp.concatenate([*halves[0], *halves[1]], axis=0)[:, : CHUNK * len(chunks)]


def _exchanged(arrays: list[jax.Array]) -> list[jax.Array]:
    """Of n arrays, lanes [..., n, 16]: array i becomes the lanes [..., i, 16] of all, in order. Neighbors exchange half
    of what they have, then those two apart, then four."""
    lane = lax.broadcasted_iota(jnp.int32, arrays[0].shape, 1)
    arrays, step = list(arrays), 1
    while step < len(arrays):
        distance = CHUNK * step
        low = lane & distance == 0
        for i in range(len(arrays)):
            if not i & step:
                a, b = arrays[i], arrays[i + step]
                arrays[i] = jnp.where(low, a, pltpu.roll(b, distance, 1))
                arrays[i + step] = jnp.where(low, pltpu.roll(a, LANES - distance, 1), b)
        step *= 2
    return arrays


def _stats(stats: jax.Array, steps: jax.Array, group: _Group) -> tuple[jax.Array, jax.Array]:
    """Zeros, int32, and scales, float32 rounded to bfloat16, [16 outputs x 16 blocks, lanes] of stats and steps."""
    # Lanes [2 chunks, 4, 4 outputs, 4 words] of four arrays become [2 chunks, 4 arrays, 4 outputs, 4 words] of four.
    whole = jnp.concatenate([stats] * (GROUP // group.chunks), axis=1)
    pairs = _exchanged(jnp.split(whole, 4, axis=1))
    lane = lax.broadcasted_iota(jnp.int32, (BLOCKS, LANES), 1)
    source = (lane & 16) << 2 | (lane & 96) >> 1 | (lane & 12) >> 2
    words = [jnp.take_along_axis(pair, source | output << 2, axis=1) for pair in pairs for output in range(4)]
    words = jnp.concatenate(words, axis=0)
    # The lane's own code of four, eight bits below its zero (packing.pack_stats).
    lane = lax.broadcasted_iota(jnp.int32, words.shape, 1)
    words >>= (lane & 1) << 4 | (lane & 2) << 1
    steps = jnp.concatenate([steps.astype(jnp.float32)] * (LANES // steps.shape[1]), axis=1)
    scale = (words & 15).astype(jnp.float32) * jnp.concatenate([steps] * BLOCK, axis=0)
    return (words >> 8) & 15, _rounded(scale)


def _scales(scale: jax.Array, group: _Group) -> jax.Array:
    """float32 [16 outputs x 16 blocks, lanes] of scales of chunks."""
    whole = jnp.concatenate([scale.astype(jnp.float32)] * (GROUP // group.chunks), axis=1)
    lane = lax.broadcasted_iota(jnp.int32, whole.shape, 1)
    spread = [jnp.take_along_axis(whole, lane & ~15 | output, axis=1) for output in range(BLOCK)]
    return jnp.concatenate(spread, axis=0)[:, : group.lanes]


def _rounded(x: jax.Array) -> jax.Array:
    """float32 rounded to bfloat16, to even, as `weights.rounded`, which kernels for TPUs do not have."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return lax.bitcast_convert_type(bits & ~0xFFFF, jnp.float32)
