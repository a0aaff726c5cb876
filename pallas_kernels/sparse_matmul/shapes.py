# SPDX-License-Identifier: Apache-2.0
"""Named calls of sparse_matmul, shared by tests and benchmarks.

>>> import jax, jax.numpy as jnp
>>> arguments = SHAPES["gelu_5"].make(jnp.bfloat16, jax.random.key(0))
>>> arguments["x"].shape, arguments["weight"].shape, arguments["activation"]
((5, 136), (136, 200), 'gelu')
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout

from pallas_kernels.flat_gemm.shapes import MODELS
from pallas_kernels.sparse_matmul.prune import prune_2_4, prune_4_8_pairs
from pallas_kernels.sparse_matmul.reference import quantized
from pallas_kernels.sparse_matmul.weights import Sparse24Weight


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call. Letters as in the API.

    Attributes:
      kind: of the weight: that of x, or of 8 or 4 bits.
      sparse: False for a dense weight, which has to be of 8 bits.
      rounded: whether x is int8 already.
      leading: axes before M.
    """

    M: int
    N: int
    K: int
    kind: Literal["floating", "int8", "int4"] = "floating"
    activation: str | None = None
    bias: bool = False
    sparse: bool = True
    rounded: bool = False
    leading: tuple[int, ...] = ()
    mask_name: str = ""

    def make(self, dtype, key: jax.Array) -> dict[str, Any]:
        """Random arguments of the call, by name; sums of products are of size 1."""
        random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        arguments: dict[str, Any] = {"x": random.standard_normal((*self.leading, self.M, self.K), np.float32)}
        arguments["bias"] = random.standard_normal(self.N, np.float32) if self.bias else None
        arguments = {name: a if a is None else jnp.asarray(a, dtype) for name, a in arguments.items()}
        w = random.standard_normal((self.K, self.N), np.float32) / math.sqrt(self.K / 2)
        if self.kind == "floating":
            return arguments | {"weight": self._weight(jnp.asarray(w, dtype)), "activation": self.activation}
        largest = 127 if self.kind == "int8" else 7
        scale = np.abs(w).max(axis=0) / largest
        integers = jnp.asarray(np.round(w / scale), jnp.int8)
        scales = jnp.asarray(4 / 127, jnp.float32), jnp.asarray(scale, jnp.float32)
        weight = self._weight(integers)
        if isinstance(weight, jax.Array):  # read along K: in this order in memory nothing is turned
            weight = jax.device_put(weight, Format(Layout((1, 0)), weight.sharding))
        arguments |= {"weight": weight, "activation": self.activation, "scales": scales}
        if self.rounded:
            arguments |= {"x": quantized(arguments["x"], scales[0]), "out_dtype": jnp.dtype(dtype).name}
        return arguments

    def abstract(self, dtype) -> dict[str, Any]:
        """The same call with shapes in place of arrays: for `explain` and ahead-of-time compiling."""
        options = {"activation": self.activation} | ({"out_dtype": jnp.dtype(dtype).name} if self.rounded else {})
        return jax.eval_shape(lambda: self._arrays(dtype)) | options

    def _arrays(self, dtype) -> dict[str, Any]:
        floating = self.kind == "floating"
        w = jnp.zeros((self.K, self.N), dtype if floating else jnp.int8)
        arrays: dict[str, Any] = {
            "x": jnp.zeros((*self.leading, self.M, self.K), jnp.int8 if self.rounded else dtype),
            "weight": self._weight(w),
        }
        arrays["bias"] = jnp.zeros(self.N, dtype) if self.bias else None
        return arrays if floating else arrays | {"scales": (jnp.float32(1), jnp.ones(self.N, jnp.float32))}

    def _weight(self, w: jax.Array) -> Any:
        if not self.sparse:
            return w
        if self.kind == "int4":
            return Sparse24Weight.from_dense(prune_4_8_pairs(w), bits=4)
        return Sparse24Weight.from_dense(prune_2_4(w))

    def flops(self, direction: str = "forward", mask: None = None) -> float:
        """Of the dense product; the backward pass has two."""
        passes = 3 if direction == "forward_backward" else 1
        return 2.0 * passes * math.prod(self.leading) * self.M * self.N * self.K

    @property
    def large(self) -> bool:
        """Too large for a test on a CPU: for benchmarks only."""
        return self.N * self.K > 2**20


_LAYERS = {f"{model}_{layer}": nk for model, layers in MODELS.items() for layer, nk in layers.items()}
SHAPES: dict[str, Shape] = {
    # Small and ugly on purpose: for tests.
    "plain_8": Shape(8, 64, 128),
    "bias_3": Shape(3, 40, 68, bias=True),
    "gelu_5": Shape(5, 200, 136, activation="gelu", bias=True),
    "swiglu_2_3": Shape(3, 72, 200, activation="swiglu", leading=(2,)),
    "silu_70": Shape(70, 136, 72, activation="silu"),
    "int8_8": Shape(8, 64, 128, "int8"),
    "int8_gelu_5": Shape(5, 72, 200, "int8", activation="gelu", bias=True),
    "int8_dense_6": Shape(6, 40, 100, "int8", bias=True, sparse=False),
    "int4_7": Shape(7, 72, 200, "int4", activation="silu", bias=True),
    # Large: for benchmarks.
    **{f"{layer}_m{M}": Shape(M, *nk) for layer, nk in _LAYERS.items() for M in (1, 16, 64, 256, 4096, 8192)},
    "square_4096": Shape(4096, 4096, 4096),
    "square_8192": Shape(8192, 8192, 8192),
    **{
        f"{name}_{layer}_m{M}": Shape(M, *_LAYERS[layer], "int8", sparse=name == "int8", rounded=True)
        for name in ("int8", "int8_dense")
        for layer in ("llama2_7b_gate_up", "llama2_70b_down")
        for M in (64, 4096, 8192)
    },
    "int8_square_8192": Shape(8192, 8192, 8192, "int8", rounded=True),
    "int8_dense_square_8192": Shape(8192, 8192, 8192, "int8", sparse=False, rounded=True),
}
