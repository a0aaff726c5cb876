# SPDX-License-Identifier: Apache-2.0
"""Named calls of flat_gemm, shared by tests, tuner and benchmarks; and the weights of models, for the dataflow search.

>>> import jax, jax.numpy as jnp
>>> arguments = SHAPES["swiglu_3"].make(jnp.bfloat16, jax.random.key(0))
>>> arguments["x"].shape, arguments["w"].shape, arguments["residual"].shape, arguments["activation"]
((3, 200), (312, 200), (3, 156), 'swiglu')
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core.activations import parts_of


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call. Letters as in the API.

    Attributes:
      leading: axes before M.
      extras: arrays to add: "bias", "residual".
    """

    M: int
    N: int
    K: int
    transpose_w: bool = True
    activation: str | None = None
    rms_norm_eps: float | None = None
    extras: tuple[str, ...] = ()
    leading: tuple[int, ...] = ()
    mask_name: str = ""

    def make(self, dtype, key: jax.Array) -> dict[str, Any]:
        """Random arguments of the call, by name; sums of products are of size 1."""

        def draw(name: str, x: jax.ShapeDtypeStruct) -> jax.Array:
            scale = self.K**-0.5 if name == "w" else 1.0
            if name == "w" and self.large:  # NumPy takes seconds for each
                return _normal(key, x.shape, x.dtype, scale)
            return jnp.asarray(random.standard_normal(x.shape, np.float32) * scale, x.dtype)

        random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        arguments = self.abstract(dtype)
        arrays = {name: draw(name, x) for name, x in arguments.items() if isinstance(x, jax.ShapeDtypeStruct)}
        return arguments | arrays

    def abstract(self, dtype) -> dict[str, Any]:
        """The same call with shapes in place of arrays: for `explain` and ahead-of-time compiling."""
        O = self.N // parts_of(self.activation)
        shapes = {
            "x": (*self.leading, self.M, self.K),
            "w": (self.N, self.K) if self.transpose_w else (self.K, self.N),
            "bias": (self.N,),
            "residual": (*self.leading, self.M, O),
        }
        arrays = {
            name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
            for name, shape in shapes.items()
            if name in ("x", "w", *self.extras)
        }
        options = {"activation": self.activation, "transpose_w": self.transpose_w, "rms_norm_eps": self.rms_norm_eps}
        return arrays | options

    def flops(self, direction: str = "forward", mask: None = None) -> float:
        """Of one product; the backward pass has two."""
        passes = 3 if direction == "forward_backward" else 1
        return 2.0 * passes * math.prod(self.leading) * self.M * self.N * self.K

    @property
    def large(self) -> bool:
        """Too large for a test on a CPU: for benchmarks only."""
        return self.N * self.K > 2**20


def _normal(key: jax.Array, shape: tuple[int, ...], dtype, scale: float) -> jax.Array:
    return jax.jit(lambda key: (jax.random.normal(key, shape) * scale).astype(dtype))(key)


# Layer -> (N, K) of models, with query, key and value in one weight, and gate and up in one.
MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "llama2_7b": {"qkv": (12288, 4096), "out": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)},
    "llama2_70b": {"qkv": (10240, 8192), "out": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)},
}

SHAPES: dict[str, Shape] = {
    # Small and ugly on purpose: for tests.
    "plain_1": Shape(1, 72, 136),
    "plain_8": Shape(8, 192, 256),
    "columns_1": Shape(1, 104, 72, transpose_w=False),
    "columns_17": Shape(17, 88, 200, transpose_w=False),
    "columns_128": Shape(8, 384, 256, transpose_w=False, activation="silu", extras=("bias", "residual")),
    "bias_4": Shape(4, 130, 96, extras=("bias",)),
    "silu_5": Shape(5, 96, 328, transpose_w=False, activation="silu", extras=("bias", "residual")),
    "square_5": Shape(5, 128, 128, activation="silu", extras=("bias", "residual")),
    "gelu_64": Shape(64, 120, 80, activation="gelu", extras=("bias",)),
    "swiglu_3": Shape(3, 312, 200, activation="swiglu", extras=("bias", "residual")),
    "swiglu_columns_8": Shape(8, 256, 72, transpose_w=False, activation="swiglu"),
    "residual_200": Shape(200, 136, 152, extras=("residual",)),
    "odd_3": Shape(3, 37, 53, activation="gelu", extras=("bias", "residual")),
    "normalized_8": Shape(8, 192, 320, rms_norm_eps=1e-5, extras=("residual",)),
    "normalized_swiglu_2": Shape(2, 256, 192, activation="swiglu", rms_norm_eps=1e-2, extras=("bias",)),
    "leading_2_3": Shape(4, 80, 96, extras=("bias", "residual"), leading=(2, 3)),
    # Large: for benchmarks.
    **{
        f"{model}_{layer}_m{M}": Shape(M, N, K)
        for model, layers in MODELS.items()
        for layer, (N, K) in layers.items()
        for M in (1, 2, 4, 8, 16, 32, 64, 128, 256)
    },
}
