# SPDX-License-Identifier: Apache-2.0
"""quantized_matmul for NVIDIA GPUs from Ampere on: packed weights are read once, and decoded on their way to the tensor
cores.

A block takes 64 outputs and walks along the inputs, chunk by chunk. Words of weights, their scales and rows of x are on
their way to shared memory (`ring.py`) while a chunk before them is decoded and multiplied (`lanes.py`):

    copy      W[i + 2]  s[i + 2]  X[i + 2]               from memory
    scales    code * step, -z * scale                    of chunk i
    multiply  Z^T [64, M] += W^[i] [64, k] X^T [k, M]    words to bfloat16 in registers, one rounding each

With `scales_ahead` they are copied a step before the words of their chunk, so that their arithmetic can be done before
the wait for these. The second plane of a `MixedBitWeight`, the low digits of strips of 4 bits, follows the first: the
same program with other addresses, its inputs found by an index.

The smallest number of rows is bound by instructions, about 36 for 16 weights of two outputs in 32 threads; so all
multiprocessors must have as much of them. Where outputs are few, the warps of a block take fewer, and a part of the
inputs each (`shares`), or blocks of a cluster do (`num_splits`), and what they have is added up in order. Ampere has no
clusters.

Source: Li et al., "Enabling Fast 2-bit LLM on GPUs", 2023, sections 2 and 3.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import cluster
from pallas_kernels.core.activations import activate_parts, parts_of
from pallas_kernels.core.device import MMA_ARCHS, Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.core.epilogue import with_outputs
from pallas_kernels.core.mma import copies_of_device, cost_option, store, tile_memory
from pallas_kernels.quantized_matmul import lanes, ptx, sm90
from pallas_kernels.quantized_matmul.config import TILE, MosaicGpuConfig, Sm90Config, chunk_inputs
from pallas_kernels.quantized_matmul.ring import Ring, Stored, barrier, index_of, put, wait
from pallas_kernels.quantized_matmul.weights import IntWeight, MixedBitWeight, Weight

Ref = Any
Rows = Callable[[range], jax.Array]  # of x, stretches of 64 inputs of a chunk
MOST_ROWS = 64


def supports(call: Call, device: Device) -> Refusal | None:
    if device.platform != "gpu" or device.arch not in MMA_ARCHS:
        return Refusal(f"it is for NVIDIA GPUs of Ampere, Ada and Hopper, and this is {device}")
    s, dtype, bits = call.sizes, call.arguments[0].dtype, call.option("bits")
    if dtype != "bfloat16":
        return Refusal(f"it makes bfloat16 of weights, and x is {dtype}; cast it")
    if s["M"] > MOST_ROWS:
        return Refusal(f"M={s['M']} rows; it takes {MOST_ROWS}, and more are faster on weights decoded once")
    if call.option("activation_bits") is not None:
        return Refusal("it multiplies in bfloat16, not in integers (activation_bits=8)")
    if call.option("outliers"):
        return Refusal("it does not add outliers; quantize with outlier_fraction=0")
    if bits == 2:
        return Refusal('it takes 2 bits as part of scheme="mixed_2_4" only (four_bit_fraction=0 has no others)')
    inputs = chunk_inputs(bits)
    if (group := call.option("group_size")) is not None and group % inputs:
        return Refusal(f"groups of {group} inputs; it takes multiples of {inputs} at {bits} bits")
    if s["K"] % 16:
        return Refusal(f"K={s['K']} features; it takes multiples of 16")
    if parts_of(call.option("activation")) == 2 and s["N"] % 32:
        return Refusal(f"N={s['N']} columns of gates and what they gate; it takes multiples of 32")
    return None


def forward(
    x: jax.Array,
    weight: Weight,
    bias: jax.Array | None,
    *,
    activation: str | None,
    config: MosaicGpuConfig | Sm90Config,
) -> jax.Array:
    """As `xla.forward`."""
    hopper, parts = copies_of_device().fill, parts_of(activation)
    if not hopper and config.num_splits > 1:
        raise ValueError(f"quantized_matmul: num_splits takes the clusters of Hopper, got {config}.")
    per_output = {} if bias is None else {"bias": bias}
    if isinstance(weight, IntWeight) and weight.group_size is None:
        per_output = {"scale": weight.scale[0, : weight.shape[1]], **per_output}

    def padded(outputs: int, more: int = 0) -> dict[str, jax.Array]:
        """To whole blocks of so many outputs, and some more."""
        of_parts = {name: array.reshape(parts, -1) for name, array in per_output.items()}
        return {name: jnp.pad(a, ((0, 0), (0, -a.shape[1] % outputs + more))) for name, a in of_parts.items()}

    if isinstance(config, Sm90Config):
        columns = padded(TILE * config.warpgroups * config.tiles)
        return sm90.outputs(x, weight, columns, activation=activation, config=config)
    # Blocks of fewer outputs than a tile begin within one.
    columns = padded(TILE * config.tiles, TILE if config.shares > 1 else 0)
    return _outputs(x, weight, columns, activation=activation, config=config)


# --- What a chunk of each kind of weight is, and what becomes of it -------------------------------------------

Scales = list[jax.Array]  # of a chunk, in registers: as they are stored, or as weights are multiplied by them


class _Digits:
    """Two planes of 2-bit digits: `MixedBitWeight`."""

    def empty(self, zero: jax.Array) -> list[jax.Array]:
        """Sums of no chunk, of tiles [64, M]: of few rows two, so that fewer products wait for each other."""
        return [zero] * (2 if zero.shape[1] == 8 else 1)

    def factors(self, scales: Scales) -> Scales:
        return ptx.scales(*scales)

    def add(self, sums: list[jax.Array], words: jax.Array, factors: Scales, x: Rows) -> list[jax.Array]:
        # The registers hold all rows of a chunk, or, if they are many, of a stretch.
        width = 4 if sums[0].shape[1] <= 16 else 1
        for j in range(0, 4, width):
            stretches = range(j, j + width)
            sums = ptx.strips(sums, words, factors, x(stretches), stretches)
        return sums

    def total(self, sums: list[jax.Array]) -> jax.Array:
        return functools.reduce(jnp.add, sums) * (1 / (lanes.TINY * lanes.LARGE))


@dataclasses.dataclass(frozen=True)
class _Codes:
    """One plane of symmetric codes of 4 or 8 bits: `IntWeight`. A group is a few whole chunks."""

    bits: int

    def empty(self, zero: jax.Array) -> list[jax.Array]:
        return [zero]

    def factors(self, scales: Scales) -> Scales:
        return scales

    def add(self, sums: list[jax.Array], words: jax.Array, factors: Scales, x: Rows) -> list[jax.Array]:
        rows = x(range(chunk_inputs(self.bits) // 64))
        return [ptx.integers(sums[0], words, factors[0] if factors else None, rows, self.bits)]

    def total(self, sums: list[jax.Array]) -> jax.Array:
        return sums[0]


# --- The kernel ----------------------------------------------------------------------------------------------


def _zeros(shape: tuple[int, ...]) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), ptx.SUMS)


def _outputs(
    x: jax.Array, weight: Weight, per_output: dict[str, jax.Array], *, activation: str | None, config: MosaicGpuConfig
) -> jax.Array:
    """The kernel, [M, O]. `per_output` has arrays [parts, O], padded to whole tiles: "scale", "bias"."""
    at = _Digits() if isinstance(weight, MixedBitWeight) else _Codes(weight.bits)
    (M, K), N, stored, parts = x.shape, weight.shape[1], Stored.of(weight), parts_of(activation)
    O, copies, hopper = N // parts, copies_of_device(), copies_of_device().fill
    tiles, stages, shares = config.tiles, config.stages, config.shares
    steps = -(-stored.chunks // shares)
    splits = min(config.num_splits, steps)
    n, padded = TILE * tiles // shares, M + -M % 8
    by_copies = hopper and shares == 1  # of whole tiles, out of shared memory
    whole = hopper or shares > 1  # the output is written as it is
    blocks = -(-O // n)
    # Copies on Hopper leave alone what is not there, in whole tiles. The rest is cut off afterwards.
    columns = O if shares > 1 or (hopper and O % TILE == 0) else blocks * n
    rows = padded if by_copies and M > 8 else M  # they leave out some of the first 8, but not of others

    def kernel(*refs, slots: Ref, out_smem: Any = None, twice: Any = None, partial: Any = None):
        x_gmem, given, out_gmem = refs[0], iter(refs[1:-1]), refs[-1]
        option = {name: next(given) for name in per_output}
        gmem = list(given)
        block = lax.axis_index("block")
        output, zero = block * n, lax.div(block, blocks)
        split = lax.axis_index("split") if splits > 1 else zero
        begin, end = (lax.div((split + i) * steps, splits) for i in range(2))
        count = end - begin
        outputs = [part * O + output + TILE * tile for part in range(parts) for tile in range(tiles)]
        index = index_of(gmem)

        def fold(z: jax.Array) -> jax.Array:
            """Warps of the same outputs add up what each has of the inputs."""
            if shares == 1:
                return z
            barrier()
            for i in range(2):
                twice[pl.ds(TILE * i, TILE)] = z
            barrier()
            parts = [plgpu.load(twice.at[pl.ds(n * i, TILE)], layout=ptx.SUMS, optimized=False) for i in range(shares)]
            return functools.reduce(jnp.add, parts)

        # Each block begins somewhere else: all reading the same rows of x would wait for one part of the L2.
        first = shares * (begin + lax.rem(block, count))

        def after(chunk: Any) -> Any:
            return jnp.where(chunk + shares >= shares * end, shares * begin, chunk + shares)

        def start(step: Any, chunk: Any) -> None:
            scales_of = after(chunk) if config.scales_ahead else chunk
            ring.start(slots, lax.rem(step, stages), gmem, x_gmem, outputs, chunk, scales_of, count - step)

        def scales_in(slot: Any, tile: int, chunk: Any) -> Scales:
            return ring.take_scales(slots, slot, gmem, tile, outputs[tile], chunk)

        def multiply(step: Any, carried: tuple) -> tuple:
            chunk, ahead, scales, sums = carried
            if stages == 1:
                barrier()
                start(step, chunk)
            factors = [at.factors(one) for one in scales]  # while words are on their way
            wait(but=max(stages - 2, 0))
            if stages > 1:
                start(step + stages - 1, ahead)  # to the slot that all threads have read in the step before
            slot = lax.rem(step, stages)

            def x_of(stretches: range) -> jax.Array:
                return ring.take_rows(slots, slot, x_gmem, index, chunk, padded, stretches)

            # Read once for all tiles, or for each what it takes at a time.
            rows, out = functools.cache(x_of) if padded <= 16 else x_of, []
            for i, (begins, total) in enumerate(zip(outputs, sums, strict=True)):
                words = ring.take_words(slots, slot, gmem, i, begins, chunk)
                own = factors[i] if config.scales_ahead else at.factors(scales_in(slot, i, chunk))
                out.append(at.add(total, words, own, rows))
            scales = [scales_in(slot, i, after(chunk)) for i in range(len(scales))]
            return after(chunk), after(ahead), scales, out

        ahead, scales = first, []
        if config.scales_ahead:
            last = jnp.int32(stages - 1)  # the slot that is filled next by the first step
            ring.start_scales(slots, last, gmem, outputs, first)
        for i in range(stages - 1):
            start(jnp.int32(i), ahead)
            ahead = after(ahead)
        if config.scales_ahead:
            wait(but=stages - 1)
            scales = [scales_in(last, i, first) for i in range(len(outputs))]
        sums = [at.empty(_zeros((TILE, padded))) for _ in outputs]
        *_, sums = lax.fori_loop(0, count, multiply, (first, ahead, scales, sums))
        z = [fold(at.total(tile)) for tile in sums]

        def finish(z: list[jax.Array]) -> None:
            for tile in range(tiles):
                of_parts = z[tile::tiles]
                of_parts = with_outputs(of_parts, option, output + TILE * tile, ptx.SUMS)
                y = activate_parts(of_parts, activation)
                if shares > 1:
                    put(out_gmem, y, output, n)
                elif hopper:
                    out_smem.at[:, pl.ds(TILE * tile, TILE)].transpose((1, 0))[...] = y.astype(x.dtype)
                else:
                    store(out_gmem.at[pl.ds(output + TILE * tile, TILE)], y)
            if by_copies:
                # From row 0, in words that do not tell that fewer rows than a tile may follow.
                rows = pl.ds(zero * 8, padded)
                copies.send(out_smem, out_gmem.at[rows, pl.ds(output, n)])

        if splits == 1:
            finish(z)
            return
        # Blocks of a cluster leave what they have; the first adds it up, in order.
        for i, y in enumerate(z):
            partial[i] = y
        cluster.sync()

        def add(total: list[jax.Array], peer: int) -> list[jax.Array]:
            return [y + cluster.load(partial.at[i], peer, ptx.SUMS) for i, y in enumerate(total)]

        pl.when(split == 0)(lambda: finish(functools.reduce(add, range(1, splits), z)))
        cluster.sync()  # no block is gone while others read from it

    kernel.__name__ = f"quantized_matmul_{type(at).__name__.strip('_').lower()}"
    ring = Ring(stored.inputs, stored.chunks, parts * tiles, M, shares, per_group=stored.per_group, mains=stored.mains)
    scratch: dict[str, Any] = {"slots": plgpu.SMEM((stages, ring.nbytes // 4), jnp.uint32)}
    if shares > 1:
        scratch["twice"] = plgpu.SMEM((2 * TILE, padded), jnp.float32)
    if by_copies:
        scratch["out_smem"] = tile_memory(padded, n, dtype=x.dtype)
    if splits > 1:
        scratch["partial"] = plgpu.SMEM((parts * tiles, TILE, padded), jnp.float32)
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(*((rows, columns), x.dtype) if whole else ((columns, padded), jnp.float32)),
        grid=(blocks,),
        grid_names=("block",),
        **({"cluster": (splits,), "cluster_names": ("split",)} if splits > 1 else {}),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **cost_option(
            flops=2 * M * N * K,
            transcendentals=M * O if activation else 0,
            bytes_accessed=weight.nbytes + 2 * M * (K + O),
        ),
    )(x, *per_output.values(), *stored.arrays)
    # Ampere has no copies out of shared memory that would turn Z^T around: XLA does.
    return out[:M, :O] if whole else out[:O, :M].T.astype(x.dtype)
