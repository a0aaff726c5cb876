# SPDX-License-Identifier: Apache-2.0
"""sparse_matmul on NVIDIA GPUs: sm90.py for Hopper, which also takes dense weights of int8, and sm80.py before it."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.core import device as device_lib
from pallas_kernels.core.device import MMA_ARCHS, Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.sparse_matmul import sm80, sm90
from pallas_kernels.sparse_matmul.config import TILE, Config, Sm80Config
from pallas_kernels.sparse_matmul.operands import Dense, Sparse
from pallas_kernels.sparse_matmul.reference import Scales, quantized
from pallas_kernels.sparse_matmul.weights import Sparse24Weight

MOST_ROWS = 1024  # before Hopper


def supports(call: Call, device: Device) -> Refusal | None:
    if device.platform != "gpu" or device.arch not in MMA_ARCHS:
        return Refusal(f"it is for sparse tensor cores of Ampere, Ada and Hopper, and this is {device}")
    if device.arch != "sm90" and not call.option("sparse"):
        return Refusal("the library's product of dense int8 is as fast before Hopper")
    if device.arch != "sm90" and call.sizes["M"] > MOST_ROWS:
        return Refusal(
            f"M={call.sizes['M']} rows; it takes {MOST_ROWS}, and more are faster on weights made dense once"
        )
    weight, out = call.arguments[1].dtype, call.option("out_dtype")
    if call.option("bits") == 4:
        return Refusal("it has no products of 4 bits; dequantize the weight and keep 2 of 4 in int8")
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
    config: Config,
) -> jax.Array:
    """As `xla.forward`."""
    N = weight.shape[1]
    per_output = {}
    if scales is not None:
        x = quantized(x, scales[0])
        per_output["scale"] = scales[0] * scales[1]
    if bias is not None:
        per_output["bias"] = bias
    block = TILE * (config.tiles if isinstance(config, Sm80Config) else 1)
    per_output = {name: jnp.pad(array, (0, -N % block))[None] for name, array in per_output.items()}
    options: dict[str, Any] = {"activation": activation, "out_dtype": out_dtype}
    if isinstance(config, Sm80Config):
        if not isinstance(weight, Sparse24Weight):
            raise ValueError(f"sparse_matmul: a dense weight takes an Sm90Config, got {config}.")
        return sm80.outputs(x, weight, per_output, N, config=config, **options)
    num_sms = device_lib.current().num_cores or 132
    operand = Sparse(weight) if isinstance(weight, Sparse24Weight) else Dense(weight)
    return sm90.outputs(x, operand, per_output, N, config=config, num_sms=num_sms, **options)
