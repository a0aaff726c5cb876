# SPDX-License-Identifier: Apache-2.0
"""flat_gemm for TPUs: all rows stay on the chip, and the weight streams past them once.

    x [M, K]      on the chip for good: the matrix unit pads M to 8 rows (16 of bfloat16), nothing else does
    w             blocks [block_n, block_k], or [block_k, block_n], in the orientation that it is stored in
    grid (n, k)   acc[M, block_n] += x[:, k] w[n, k]^T in float32;   out[:, n] = epilogue(acc) after the last k

The pipeline of Pallas copies the next block while this one is multiplied: that is the paper's double buffering. swiglu
takes two blocks a step, one of gates and the one of what they let through.

Source: Hong et al., "FlashDecoding++", 2023, section 4.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.activations import parts_of
from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.core.tpu import LANES, VMEM_BYTES, dot
from pallas_kernels.core.varying import vary_like
from pallas_kernels.flat_gemm.config import MosaicTpuConfig, mosaic_tpu_heuristic
from pallas_kernels.flat_gemm.reference import epilogue, scale_of_rows
from pallas_kernels.flat_gemm.routes import MOST_ROWS


def supports(call: Call, device: Device) -> Refusal | None:
    if device.platform != "tpu":
        return Refusal(f"its kernels are for TPUs, and this is {device.platform}")
    if not device.arch:
        return Refusal(f"its kernels are compiled for TPU v4 and later, and this is {device.kind}")
    s, dtype = call.sizes, call.arguments[0].dtype
    if dtype not in ("float32", "bfloat16"):
        return Refusal(f"TPUs compute in float32 and bfloat16, not in {dtype}")
    if s["M"] > MOST_ROWS:
        return Refusal(f"M={s['M']} rows, and it is for {MOST_ROWS} at most")
    if call.option("activation") == "swiglu" and s["N"] // 2 % LANES:
        return Refusal(f"gates and what they let through are {s['N'] // 2} columns each; it takes multiples of {LANES}")
    if s["K"] == 1:
        return Refusal("a product over K=1 number is none for the matrix unit")
    needed = mosaic_tpu_heuristic(call).vmem_bytes(call)
    if needed > VMEM_BYTES:
        mib = f"{needed / 2**20:.0f} MiB of on-chip memory, and it plans with {VMEM_BYTES // 2**20}"
        return Refusal(f"M={s['M']} rows of K={s['K']} and a block of the weight need {mib}")
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
    config: MosaicTpuConfig,
) -> jax.Array:
    """As `xla.forward`."""
    (M, K), N = x.shape, w.shape[0 if transpose_w else 1]
    parts = parts_of(activation)
    O = N // parts
    block_n, block_k = config.block(O * parts, K, activation)
    columns, steps = pl.cdiv(O, block_n), K // block_k

    def along_n(rows: int, part: int = 0) -> pl.BlockSpec:
        # Columns of the second part begin at O, a multiple of the block where there are two.
        return pl.BlockSpec((rows, block_n), lambda n, k: (0, n + part * columns))

    def weight(part: int) -> pl.BlockSpec:
        if transpose_w:
            return pl.BlockSpec((block_n, block_k), lambda n, k: (n + part * columns, k))
        return pl.BlockSpec((block_k, block_n), lambda n, k: (k, n + part * columns))

    operands = {"x": x, "w": (w,) * parts}
    specs: dict = {
        # Rows are copied once, and need no second buffer.
        "x": pl.BlockSpec((M, K), lambda n, k: (0, 0), pipeline_mode=pl.Buffered(1)),
        "w": tuple(weight(part) for part in range(parts)),
    }
    if bias is not None:
        operands["bias"] = (bias[None],) * parts
        specs["bias"] = tuple(along_n(1, part) for part in range(parts))
    if residual is not None:
        operands["residual"], specs["residual"] = residual, along_n(M)
    operands = vary_like(operands, operands)
    axis_type = jax.typeof(operands["x"]).manual_axis_type
    item = x.dtype.itemsize
    return pl.pallas_call(
        functools.partial(_kernel, activation, transpose_w, rms_norm_eps, block_k),
        out_shape=jax.ShapeDtypeStruct((M, O), x.dtype, manual_axis_type=axis_type),
        grid=(columns, steps),
        in_specs=[specs],
        out_specs=along_n(M),
        scratch_shapes=[pltpu.VMEM((M, parts * block_n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * N * K,
            transcendentals=0 if activation is None else M * O,
            bytes_accessed=(N * K + M * K + M * O * (1 if residual is None else 2)) * item,
        ),
        name="flat_gemm",
    )(operands)


def _kernel(
    activation: str | None,
    transpose_w: bool,
    rms_norm_eps: float | None,
    block_k: int,
    refs: dict,
    out_ref,
    acc_ref,
) -> None:
    k = pl.program_id(1)

    @pl.when(k == 0)
    def _start():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    # Steps of K begin at a register's first lane, unless there is one step only.
    whole = block_k == refs["x"].shape[1]
    x = refs["x"][...] if whole else refs["x"][:, pl.ds(pl.multiple_of(k * block_k, LANES), block_k)]
    for part, w_ref in enumerate(refs["w"]):
        width = out_ref.shape[1]
        acc_ref[:, part * width : (part + 1) * width] += dot(x, w_ref[...], (1, 1 if transpose_w else 0))

    @pl.when(k == pl.num_programs(1) - 1)
    def _finish():
        bias = jnp.concatenate([ref[...] for ref in refs["bias"]], axis=1) if "bias" in refs else None
        residual = refs["residual"][...] if "residual" in refs else None
        # The norm of a row may as well follow the product.
        z = acc_ref[...] * scale_of_rows(refs["x"][...].astype(jnp.float32), rms_norm_eps)
        out_ref[...] = epilogue(z, bias, residual, activation).astype(out_ref.dtype)
