# SPDX-License-Identifier: Apache-2.0
"""sparse_matmul on NVIDIA GPUs: the kernel of sm90.py for Hopper, which takes sparse weights and dense ones of int8."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.core import device as device_lib
from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.sparse_matmul import sm90
from pallas_kernels.sparse_matmul.config import TILE, Sm90Config
from pallas_kernels.sparse_matmul.operands import Dense, Sparse
from pallas_kernels.sparse_matmul.reference import Scales, quantized
from pallas_kernels.sparse_matmul.weights import Sparse24Weight


def supports(call: Call, device: Device) -> Refusal | None:
    if device.platform != "gpu" or device.arch != "sm90":
        return Refusal(f"it is for sparse tensor cores of Hopper, and this is {device}")
    weight, out = call.arguments[1].dtype, call.option("out_dtype")
    if call.option("bits") == 4:
        return Refusal("Hopper has no products of 4 bits; dequantize the weight and keep 2 of 4 in int8")
    if weight == "float32" or out == "float32":
        return Refusal(f"it takes and gives 16-bit floats, and here are weights in {weight} and outputs in {out}")
    if call.option("activation") == "swiglu":
        return Refusal("it has no swiglu yet; multiply with gate and up apart")
    return None


def forward(
    x: jax.Array,
    weight: Sparse24Weight | jax.Array,
    bias: jax.Array | None,
    scales: Scales | None,
    *,
    activation: str | None,
    out_dtype: Any,
    config: Sm90Config,
) -> jax.Array:
    """As `xla.forward`."""
    N = weight.shape[1]
    per_output = {}
    if scales is not None:
        x = quantized(x, scales[0])
        per_output["scale"] = scales[0] * scales[1]
    if bias is not None:
        per_output["bias"] = bias
    per_output = {name: jnp.pad(array, (0, -N % TILE))[None] for name, array in per_output.items()}
    num_sms = device_lib.current().num_cores or 132
    operand = Sparse(weight) if isinstance(weight, Sparse24Weight) else Dense(weight)
    return sm90.outputs(
        x, operand, per_output, N, activation=activation, out_dtype=out_dtype, config=config, num_sms=num_sms
    )
