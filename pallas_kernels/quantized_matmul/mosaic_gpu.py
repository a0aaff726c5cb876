# SPDX-License-Identifier: Apache-2.0
"""quantized_matmul for NVIDIA GPUs from Ampere on: packed weights are read once, and decoded on their way to the tensor
cores.

A block takes a strip of outputs and walks along the inputs. Words of weights, their scales and rows of x run ahead
through a ring in shared memory; `lanes.py` says what a thread makes of them.

    copies    W0 s0 X0   W1 s1 X1   W2 s2 X2 ...             a ring of `stages` slots
    each      scale = code * step, z scale                   by arithmetic that no word of weights waits for
    chunk     Z^T [64, M] += W^ [64, k] X^T [k, M]           words to bfloat16 in registers, two instructions a pair

The second plane of a `MixedBitWeight`, the low digits of strips of 4 bits, follows the first; its inputs are gathered.
Where strips are fewer than multiprocessors, blocks of a cluster share one, each a part of the inputs, and the first
adds up what the others leave in their shared memory. Ampere has neither clusters nor copies that fill what is missing.

Source: Li et al., "Enabling Fast 2-bit LLM on GPUs", 2023, sections 2 and 3.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import cluster
from pallas_kernels.core.activations import activate_parts, parts_of
from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.core.mma import Ring, copies_of_device, cost_option, store, tile_memory
from pallas_kernels.quantized_matmul import ptx
from pallas_kernels.quantized_matmul.config import MosaicGpuConfig, chunk_inputs
from pallas_kernels.quantized_matmul.weights import IntWeight, MixedBitWeight, Weight

Ref = Any
Rows = Callable[[range], jax.Array]  # of x, stretches of 64 inputs of a chunk
TILE = 64  # outputs of a warpgroup's product
MOST_ROWS = 64
_ARCHS = ("sm80", "sm86", "sm87", "sm89", "sm90")


def supports(call: Call, device: Device) -> Refusal | None:
    if device.platform != "gpu" or device.arch not in _ARCHS:
        return Refusal(f"it is for NVIDIA GPUs of Ampere, Ada and Hopper, and this is {device}")
    s, dtype, bits, hopper = call.sizes, call.arguments[0].dtype, call.option("bits"), device.arch == "sm90"
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
    outputs = s["N"] // parts_of(call.option("activation"))
    k, o = (16, 16) if hopper else (inputs, TILE)  # what copies of a ragged tail leave alone
    if s["K"] % k or outputs % o:
        return Refusal(f"K={s['K']} and O={outputs} features; it takes multiples of {k} and {o} on {device.arch}")
    return None


def forward(
    x: jax.Array, weight: Weight, bias: jax.Array | None, *, activation: str | None, config: MosaicGpuConfig
) -> jax.Array:
    """As `xla.forward`."""
    M, hopper, parts = len(x), copies_of_device().fill, parts_of(activation)
    if not hopper and config.num_splits > 1:
        raise ValueError(f"quantized_matmul: num_splits takes the clusters of Hopper, got {config}.")
    at = _Digits(weight, config.centered) if isinstance(weight, MixedBitWeight) else _Codes(weight)
    if not hopper:
        # Four warps copy as many tiles of 8 rows and 64 inputs each by cp.async.
        x = jnp.pad(x, ((0, -M % (8 * 4 // math.gcd(4, config.chunks * at.inputs // 64))), (0, 0)))
    if isinstance(at, _Codes) and at.chunks_of_group % config.chunks and at.chunks_of_group > 1:
        raise ValueError(f"quantized_matmul: a group is {at.chunks_of_group} chunks, which {config} does not divide.")
    N = weight.shape[1]
    per_output = {} if bias is None else {"bias": bias}
    if isinstance(weight, IntWeight) and weight.group_size is None:
        per_output = {"scale": weight.scale[0, :N], **per_output}

    def padded(array: jax.Array) -> jax.Array:
        array = array.reshape(parts, -1)
        return jnp.pad(array, ((0, 0), (0, -array.shape[1] % (TILE * config.tiles))))

    per_output = {name: padded(array) for name, array in per_output.items()}
    return _strips(at, x, N, per_output, activation=activation, config=config)[:M]


# --- How weights lie in memory, and what becomes of a chunk of them ------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Digits:
    """Two planes of 2-bit digits: `MixedBitWeight`."""

    weight: MixedBitWeight
    centered: bool
    inputs: ClassVar = chunk_inputs(2)
    layouts: ClassVar = {"words": ptx.WORDS, "stats": ptx.STATS, "steps": ptx.STEPS}

    @property
    def planes(self) -> list[dict[str, jax.Array]]:
        """Arrays that are walked along, one plane after the other."""
        planes = [p for p in (self.weight.main, self.weight.tail) if p.words.shape[1]]
        return [{name: getattr(p, name) for name in self.layouts} for p in planes]

    def memory(self, outputs: int, chunks: int) -> dict[str, tuple[tuple[int, int], Any]]:
        """Shape and dtype of what belongs to some outputs and chunks."""
        words, stats = (outputs, 16 * chunks), (outputs, 4 * chunks)
        return {
            "words": (words, jnp.uint32),
            "stats": (stats, jnp.uint32),
            "steps": ((outputs // 16, 16 * chunks), jnp.bfloat16),
        }

    def at(self, name: str, output: Any, outputs: int, chunk: Any, chunks: int) -> tuple[Any, Any]:
        """Where that begins in an array, [outputs, inputs]."""
        (height, width), _ = self.memory(outputs, chunks)[name]
        row = lax.div(output, jnp.int32(16)) if name == "steps" else output
        return pl.ds(row, height), pl.ds(width // chunks * chunk, width)

    def start(self, zero: jax.Array) -> list[jax.Array]:
        """Sums of no chunk, of tiles [64, M]."""
        return [zero] * (1 if self.centered else 4)

    def add(self, sums: list[jax.Array], read: dict[str, jax.Array], x: Rows) -> list[jax.Array]:
        own = read["words"], read["stats"], read["steps"]
        if not self.centered:
            return ptx.strips(sums, *own, x(range(4)))
        # Many rows: the registers hold no more of them than a stretch.
        return [
            functools.reduce(
                lambda total, j: ptx.centered_strips(total, *own, x(range(j, j + 1)), j), range(4), sums[0]
            )
        ]

    def total(self, sums: list[jax.Array]) -> jax.Array:
        return sums[0] if self.centered else sums[0] - sums[3] + sums[1] / 4 + sums[2] / 16


@dataclasses.dataclass(frozen=True)
class _Codes:
    """One plane of symmetric codes of 4 or 8 bits: `IntWeight`. A group is a few whole chunks."""

    weight: IntWeight

    @property
    def layouts(self) -> dict[str, Any]:
        return {"words": ptx.WORDS} | ({} if self.weight.group_size is None else {"scale": ptx.SUMS.reduce(1)})

    @property
    def inputs(self) -> int:
        return chunk_inputs(self.weight.bits)

    @property
    def planes(self) -> list[dict[str, jax.Array]]:
        return [{name: getattr(self.weight, name) for name in self.layouts}]

    @property
    def chunks_of_group(self) -> int:
        return (self.weight.group_size or self.inputs) // self.inputs

    def memory(self, outputs: int, chunks: int) -> dict[str, tuple[tuple[int, int], Any]]:
        groups = -(-chunks // self.chunks_of_group)
        return {"words": ((outputs, 16 * chunks), jnp.uint32), "scale": ((groups, outputs), jnp.bfloat16)}

    def at(self, name: str, output: Any, outputs: int, chunk: Any, chunks: int) -> tuple[Any, Any]:
        if name == "words":
            return pl.ds(output, outputs), pl.ds(16 * chunk, 16 * chunks)
        (groups, _), _ = self.memory(outputs, chunks)["scale"]
        return pl.ds(lax.div(chunk, jnp.int32(self.chunks_of_group)), groups), pl.ds(output, outputs)

    def start(self, zero: jax.Array) -> jax.Array:
        return zero

    def add(self, total: jax.Array, read: dict[str, jax.Array], x: Rows) -> jax.Array:
        rows = x(range(self.inputs // 64))
        if "scale" not in read:
            return ptx.integers(total, read["words"], rows, self.weight.bits)
        part = ptx.integers(_zeros(total.shape), read["words"], rows, self.weight.bits)
        return total + part * _along_rows(read["scale"].astype(jnp.float32), total.shape)

    def total(self, total: jax.Array) -> jax.Array:
        return total


# --- The kernel ----------------------------------------------------------------------------------------------


def _zeros(shape: tuple[int, ...]) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), ptx.SUMS)


def _along_rows(column: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One number an output, the same for each row of x."""
    return plgpu.layout_cast(lax.broadcast_in_dim(column, shape, (0,)), ptx.SUMS)


def _strips(
    at: _Digits | _Codes,
    x: jax.Array,
    N: int,
    per_output: dict[str, jax.Array],
    *,
    activation: str | None,
    config: MosaicGpuConfig,
) -> jax.Array:
    """The kernel, [M, O]. `per_output` has arrays [parts, O], padded to whole strips: "scale", "bias"."""
    (M, K), parts, hopper = x.shape, parts_of(activation), copies_of_device().fill
    O, copies, planes = N // parts, copies_of_device(), at.planes
    tiles, chunks, stages, splits = config.tiles, config.chunks, config.stages, config.num_splits
    n, padded = TILE * tiles, M + -M % 8
    strips = -(-O // n)
    # Steps of a plane, and how many of them a block of a cluster takes.
    steps = [-(-plane["words"].shape[1] // (16 * chunks)) for plane in planes]
    shares = [-(-count // splits) for count in steps]
    # Copies of Ampere are of 16 bytes by each of 128 threads: what is less is read by each thread for itself.
    names = list(at.layouts) if hopper else ["words"]
    gathers = len(planes) > 1
    operands = [x, *per_output.values(), *(array for plane in planes for array in plane.values())]
    operands += [at.weight.tail_index] if isinstance(at, _Digits) and gathers else []

    def kernel(
        *refs,
        xs: Ref,
        arrived: Any = None,
        x_arrived: Any = None,
        out_smem: Any = None,
        partial: Any = None,
        **slots: Ref,
    ):
        given, out_gmem = iter(refs[:-1]), refs[-1]
        x_gmem, option = next(given), {name: next(given) for name in per_output}
        gmem = [{name: next(given) for name in plane} for plane in planes]
        tail_index = next(given, None)
        strip = lax.axis_index("strip")
        first, zero = strip * n, lax.div(strip, strips)
        split = lax.axis_index("split") if splits > 1 else zero
        # From row 0, in words that do not tell that fewer rows than a tile may follow.
        rows = pl.ds(zero * 8, padded) if hopper else slice(None)
        live = [jnp.clip(count - split * share, 0, share) for count, share in zip(steps, shares, strict=True)]
        every = functools.reduce(jnp.add, live)

        def chunk_of(plane: int, step: Any) -> Any:
            return (split * shares[plane] + step - (live[0] if plane else 0)) * chunks

        def of_plane(plane: int) -> list:
            def source(name: str, part: int, step: Any) -> Ref:
                return gmem[plane][name].at[at.at(name, part * O + first, n, chunk_of(plane, step), chunks)]

            return [
                (functools.partial(source, name, part), slots[name].at[:, part])
                for name in names
                for part in range(parts)
            ]

        inputs = chunks * at.inputs
        of_rows = [(lambda step: x_gmem.at[rows, pl.ds(chunk_of(0, step) * at.inputs, inputs)], xs)]
        rings = [Ring(copies, stages, of_plane(plane), arrived) for plane in range(len(planes))]
        rows_ring = Ring(copies, stages, of_rows, x_arrived)

        def start(step: Any) -> None:
            rings[0].start(step, live[0])
            rows_ring.start(step, live[0])
            if gathers:
                pl.when(step >= live[0])(lambda: rings[1].start(step, every))

        for step in range(stages - 1):
            start(jnp.int32(step))

        def multiply(plane: int, step: Any, sums: list) -> list:
            start(step + stages - 1)
            slot, last = lax.rem(step, stages), step + stages - 1 < live[0]
            copies_of_step = len(names) * parts
            if plane == 0:
                in_flight = (stages - 1) * (copies_of_step + 1)
                rings[0].wait(step, in_flight, last)
                rows_ring.wait(step, in_flight, last)
            else:
                rings[1].wait(step, (stages - 1) * copies_of_step, step + stages - 1 < every)
            out = list(sums)
            for chunk in range(chunks):

                def x_of(stretches: range, chunk=chunk) -> jax.Array:
                    if plane:
                        number = chunk_of(plane, step) + chunk
                        return ptx.gathered(x_gmem, tail_index, number, padded, stretches)
                    here = pl.ds(at.inputs * chunk + 64 * stretches.start, 64 * len(stretches))
                    return plgpu.load(xs.at[slot, :, here], layout=ptx.ROWS)

                # Read once for all tiles, or for each what it takes at a time.
                rows_of = functools.cache(x_of) if padded <= 16 else x_of
                for i, (part, tile) in enumerate(every_tile):
                    read = {}
                    for name, layout in at.layouts.items():
                        if name in names:
                            ref = slots[name].at[slot, part].at[at.at(name, TILE * tile, TILE, chunk, 1)]
                        else:
                            where = part * O + first + TILE * tile, TILE, chunk_of(plane, step) + chunk, 1
                            ref = gmem[plane][name].at[at.at(name, *where)]
                        ref = ref.at[0] if name == "scale" else ref  # of one group
                        read[name] = plgpu.load(ref, layout=layout, optimized=name == "words")
                    out[i] = at.add(out[i], read, rows_of)
            return out

        every_tile = [(part, tile) for part in range(parts) for tile in range(tiles)]
        sums = [at.start(_zeros((TILE, padded))) for _ in every_tile]
        sums = lax.fori_loop(0, live[0], functools.partial(multiply, 0), sums)
        if gathers:
            sums = lax.fori_loop(live[0], every, functools.partial(multiply, 1), sums)
        z = [at.total(tile) for tile in sums]

        def finish(z: list[jax.Array]) -> None:
            for tile in range(tiles):
                of_parts = z[tile::tiles]
                for name, array in option.items():
                    columns = [array.at[part, pl.ds(first + TILE * tile, TILE)] for part in range(parts)]
                    columns = [plgpu.load(c, layout=ptx.SUMS.reduce(1), optimized=False) for c in columns]
                    columns = [_along_rows(c.astype(jnp.float32), (TILE, padded)) for c in columns]
                    of_parts = [y * c if name == "scale" else y + c for y, c in zip(of_parts, columns, strict=True)]
                y = activate_parts(of_parts, activation)
                if hopper:
                    out_smem.at[:, pl.ds(TILE * tile, TILE)].transpose((1, 0))[...] = y.astype(x.dtype)
                else:
                    store(out_gmem.at[pl.ds(first + TILE * tile, TILE)], y)
            if hopper:
                copies.send(out_smem, out_gmem.at[rows, pl.ds(first, n)])

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
    memory = {name: at.memory(n, chunks)[name] for name in names}
    scratch = {name: _memory(name, (stages, parts, *shape), dtype) for name, (shape, dtype) in memory.items()}
    scratch["xs"] = tile_memory(stages, padded, chunks * at.inputs, dtype=x.dtype)
    scratch["arrived"], scratch["x_arrived"] = copies.barrier(parts * len(names), stages), copies.barrier(1, stages)
    if hopper:
        scratch["out_smem"] = tile_memory(padded, n, dtype=x.dtype)
    if splits > 1:
        scratch["partial"] = plgpu.SMEM((parts * tiles, TILE, padded), jnp.float32)
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, O), x.dtype) if hopper else jax.ShapeDtypeStruct((O, M), jnp.float32),
        grid=(strips,),
        grid_names=("strip",),
        **({"cluster": (splits,), "cluster_names": ("split",)} if splits > 1 else {}),
        scratch_types={name: memory for name, memory in scratch.items() if memory is not None},
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **cost_option(
            flops=2 * M * N * K,
            transcendentals=M * O if activation else 0,
            bytes_accessed=at.weight.nbytes + 2 * M * (K + O),
        ),
    )(*operands)
    # Ampere has no copies out of shared memory that would turn Z^T around: XLA does.
    return out if hopper else out.T.astype(x.dtype)


def _memory(name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory of slots. Two outputs of a chunk's words, 64 bytes each, are all banks: any swizzle leaves them."""
    if name != "words":
        return plgpu.SMEM(shape, dtype)
    tiling: Any = plgpu.TilingTransform
    swizzling: Any = plgpu.SwizzleTransform
    return plgpu.SMEM(shape, dtype, transforms=(tiling((8, 16)), swizzling(64)))
