# SPDX-License-Identifier: Apache-2.0
"""Named calls of decode_attention, shared by tests, tuner and benchmarks.

>>> import jax, jax.numpy as jnp
>>> arguments = SHAPES["paged_16"].make(jnp.bfloat16, jax.random.key(0))
>>> arguments["key"].shape, arguments["page_table"].shape
((26, 16, 2, 64), (3, 8))
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core.softmax import UnifiedMax

_UNUSED = 2  # pages that no sequence has


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call. Letters as in the API.

    Attributes:
      page: keys of a page, or 0 for a dense cache.
      lengths: of the sequences; () draws them, with 0 and S among them.
      cache: dtype of a quantized cache, or "".
      options: arguments that are not arrays.
      extras: arrays to add: "sink", "phi".
    """

    B: int
    S: int
    N: int
    K: int
    H: int
    Hv: int = 0  # 0 means H
    T: int = 0  # 0 means a query [B, N, H]
    page: int = 0
    lengths: tuple[int, ...] = ()
    cache: str = ""
    extras: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    mask_name: str = "lengths"

    def make(self, dtype, key: jax.Array) -> dict[str, Any]:
        """Random arguments of the call, by name."""
        # NumPy draws them: JAX would compile a generator for every shape.
        random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        drawn = [0, self.S, *random.integers(1, self.S + 1, max(0, self.B - 2))][-self.B :]
        lengths = np.asarray(self.lengths or random.permutation(drawn), np.int32)

        def fill(name: str, x: jax.ShapeDtypeStruct) -> jax.Array:
            if name == "lengths":
                return jnp.asarray(lengths)
            if name == "page_table":
                table = random.permutation(self.B * x.shape[1] + _UNUSED)[: self.B * x.shape[1]].reshape(x.shape)
                beyond = np.arange(x.shape[1]) >= -(-lengths[:, None] // self.page)
                return jnp.asarray(np.where(beyond, -1, table), x.dtype)
            if name.endswith("_scale"):
                return jnp.asarray(random.uniform(0.05, 0.1, x.shape), x.dtype)
            if self.cache and name in ("key", "value"):
                return jnp.asarray(random.integers(-20, 21, x.shape), x.dtype)
            return jnp.asarray(random.standard_normal(x.shape, np.float32), x.dtype)

        arguments = self.abstract(dtype)
        if "phi" in self.extras:
            bounds = arguments["unified_max"]
            arguments["unified_max"] = dataclasses.replace(bounds, phi=fill("phi", bounds.phi))
        given = {name: x for name, x in arguments.items() if isinstance(x, jax.ShapeDtypeStruct)}
        return arguments | {name: fill(name, x) for name, x in given.items()}

    def abstract(self, dtype) -> dict[str, Any]:
        """The same call with shapes in place of arrays: for `explain` and ahead-of-time compiling."""
        pages = self.S // self.page if self.page else 0
        rows = (self.B * pages + _UNUSED, self.page) if pages else (self.B, self.S)
        cache = jnp.dtype(self.cache or dtype)
        arrays: dict[str, tuple[tuple[int, ...], Any]] = {
            "query": ((self.B, *([self.T] if self.T else []), self.N, self.H), dtype),
            "key": ((*rows, self.K, self.H), cache),
            "value": ((*rows, self.K, self.Hv or self.H), cache),
            "lengths": ((self.B,), jnp.int32),
        }
        if pages:
            arrays["page_table"] = (self.B, pages), jnp.int32
        if self.cache:
            arrays["key_scale"] = arrays["value_scale"] = (self.K,), jnp.float32
        if "sink" in self.extras:
            arrays["sink"] = (self.N,), jnp.float32
        arguments = {name: jax.ShapeDtypeStruct(*x) for name, x in arrays.items()} | dict(self.options)
        if "phi" in self.extras:
            phi: Any = jax.ShapeDtypeStruct((self.N,), jnp.float32)
            arguments["unified_max"] = UnifiedMax(phi, -20.0, 20.0)
        return arguments

    def flops(self, direction: str = "forward", mask: None = None) -> float:
        """Of two products with every key, as if all sequences were full."""
        return 2.0 * self.B * max(1, self.T) * self.N * self.S * (self.H + (self.Hv or self.H))

    @property
    def large(self) -> bool:
        """Too large for a test on a CPU: for benchmarks only."""
        return self.B * self.S * self.K * self.H > 2**20


def _all(**options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(options.items())


SHAPES: dict[str, Shape] = {
    # Small and ugly on purpose: for tests.
    "dense_203": Shape(4, 203, 8, 2, 64),
    "one_head_1": Shape(2, 1, 1, 1, 32),
    "mha_300": Shape(3, 300, 4, 4, 72),
    "drafted_5": Shape(3, 150, 6, 3, 48, 56, T=5),
    "paged_16": Shape(3, 128, 4, 2, 64, page=16),
    "paged_window_sink": Shape(4, 192, 6, 2, 64, T=3, page=32, extras=("sink",), options=_all(window=70, soft_cap=5.0)),
    "asynchronous_257": Shape(3, 257, 8, 2, 64, extras=("sink", "phi"), options=_all(scale=0.1)),
    "int8_160": Shape(3, 160, 8, 2, 64, page=16, cache="int8"),
    "fp8_160": Shape(3, 160, 8, 2, 64, cache="float8_e4m3fn", extras=("phi",), options=_all(scale=0.1)),
    "splits_190": Shape(3, 190, 4, 1, 64, options=_all(num_splits=3)),
    # Large: for benchmarks, every sequence full.
    "drafted_4_8k": Shape(8, 8192, 32, 8, 128, T=4, page=64, lengths=(8192,) * 8),
    "asynchronous_8k": Shape(8, 8192, 32, 8, 128, lengths=(8192,) * 8, extras=("phi",), options=_all(scale=0.01)),
    **{
        f"batch_{B}_{S // 1024}k{f'_page_{page}' if page else ''}": Shape(B, S, 32, 8, 128, page=page, lengths=(S,) * B)
        for B, S in ((1, 2048), (1, 32768), (8, 8192), (64, 8192))
        for page in (0, 16, 64)
    },
    **{
        f"batch_{B}_{S // 1024}k{f'_page_{page}' if page else ''}_{name}": Shape(
            B, S, 32, 8, 128, page=page, lengths=(S,) * B, cache=cache
        )
        for name, cache in (("int8", "int8"), ("fp8", "float8_e4m3fn"))
        for B, S in ((1, 32768), (8, 8192), (64, 8192))
        for page in (0, 16)
    },
}
