# SPDX-License-Identifier: Apache-2.0
"""What kernels for NVIDIA GPUs do to sums of turned products, [outputs, M], before they leave: scales and biases."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def with_outputs(sums: Sequence[jax.Array], arrays: Mapping[str, Any], output: Any, layout: Any) -> list[jax.Array]:
    """Sums of each part, [outputs, M] in a layout, of outputs from `output` on, times "scale" and plus "bias".

    `arrays`: [parts, O] in global memory, of these names.
    """
    z = list(sums)
    for name, array in arrays.items():
        for part, y in enumerate(z):
            column = array.at[part, pl.ds(output, y.shape[0])]
            column = plgpu.load(column, layout=layout.reduce(1), optimized=False).astype(jnp.float32)
            of_output = plgpu.layout_cast(lax.broadcast_in_dim(column, y.shape, (0,)), layout)
            z[part] = y * of_output if name == "scale" else y + of_output
    return z
