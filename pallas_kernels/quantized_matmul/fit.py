# SPDX-License-Identifier: Apache-2.0
"""Grids that weights are rounded to, and how one is fitted to a group.

A group is some consecutive inputs of all outputs, w [inputs, N']. Fitting gives it a grid, w^ = (q - zero) * scale with
a scale and a zero for each output; the scale is rounded to what is stored first, and weights with the rounded one.

    asymmetric     s = (max w - min w) / (2^b - 1)     z = round(-min w / s)     0 <= q < 2^b      min w <= 0 <= max w
    symmetric      s = max |w| / (2^(b - 1) - 1)       z = 2^(b - 1)             of 8 bits 1 <= q
    two orders     s = bfloat16(code * step)           a code for each output, a step for each 16 of them

That s keeps every weight within the grid, which is not where the error is least: smaller ones are tried too, with the
same z (the range shrinks towards 0 at both ends), and each output takes the best. `plainly` rounds each weight to the
nearest point of its grid. Whoever wants to do better (compensating errors in the weights that are still to be rounded)
walks over groups in the same way, with the same fits.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantized_matmul.weights import BLOCK, rounded

# Fractions of s. On normal weights in strips, s alone leaves a squared error of 0.122 at 2 bits, these 0.092.
FRACTIONS = (1.0, 0.9, 0.8, 0.7, 0.6)
# Fractions of the step that gives the largest scale of a block the largest code.
STEPS = (1.0, 0.85, 0.7)
LEAST_STEP = 2.0**-120  # times 15, 3 and x it is still a normal number


class Grid(NamedTuple):
    """w^ = (q - zero) * scale, least <= q <= most. All broadcast to [inputs, N']."""

    scale: jax.Array
    zero: jax.Array
    least: jax.Array | int
    most: jax.Array | int

    def encode(self, w: jax.Array) -> jax.Array:
        """The nearest q, float32."""
        steps = jnp.round(w / jnp.where(self.scale == 0, 1, self.scale))
        return jnp.clip(steps + self.zero, self.least, self.most)

    def decode(self, codes: jax.Array) -> jax.Array:
        return (codes - self.zero) * self.scale

    def error(self, w: jax.Array) -> jax.Array:
        """Squared error of each output, [N']."""
        return jnp.sum(jnp.square(w - self.decode(self.encode(w))), 0)


class Fit(Protocol):
    """(group [inputs, N'], what is special about this group) -> its grid, and what is stored of it."""

    def __call__(self, w: jax.Array, special: Any) -> tuple[Grid, Any]: ...


class TwoOrders(NamedTuple):
    """What is stored of a strip's grid: codes and zeros of scales uint8 [N'], steps bfloat16 [N' / 16]."""

    scale_codes: jax.Array
    zeros: jax.Array
    steps: jax.Array


@dataclasses.dataclass(frozen=True)
class FitStrip:
    """Fits a strip; what is special is its largest q and its largest scale code, and that which its step is made for
    (a smaller one than the step's clips scales)."""

    def __call__(self, w: jax.Array, special: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Grid, TwoOrders]:
        most, most_code, full_code = special
        full, zero = _range(w, most)
        largest = jnp.max(full.reshape(-1, BLOCK), axis=1)

        def with_step(fraction: jax.Array):
            step = jnp.maximum(rounded(largest * fraction / full_code), LEAST_STEP)
            each = jnp.repeat(step, BLOCK)

            def with_code(code: jax.Array):
                scale = rounded(code * each)
                return Grid(scale, zero, 0, most).error(w), code

            codes = jnp.concatenate([jnp.ceil(full / each)[None], jnp.round(full / each * _column(FRACTIONS))])
            error, best = _best(with_code, jnp.clip(codes, 1, most_code))
            return jnp.repeat(jnp.sum(error.reshape(-1, BLOCK), 1), BLOCK), (best, each)

        _, (code, each) = _best(with_step, jnp.asarray(STEPS))
        stored = TwoOrders(code.astype(jnp.uint8), zero.astype(jnp.uint8), each[::BLOCK].astype(jnp.bfloat16))
        return Grid(rounded(code * each), zero, 0, most), stored


@dataclasses.dataclass(frozen=True)
class FitGroup:
    """Fits a group of an IntWeight: scales in float32 (its only group) or bfloat16, and zeros for 2 bits."""

    bits: int
    scale_dtype: str

    def __call__(self, w: jax.Array, special: Any) -> tuple[Grid, tuple[jax.Array, jax.Array]]:
        most = 2**self.bits - 1
        store = rounded if self.scale_dtype == "bfloat16" else lambda scale: scale
        half = 2 ** (self.bits - 1)
        if self.bits == 2:
            full, zero = _range(w, most)
        else:
            full = jnp.max(jnp.abs(w), 0) / (half - 1)
            zero = jnp.full_like(full, half)

        def grid(scale: jax.Array) -> Grid:
            return Grid(scale, zero, 1 if self.bits == 8 else 0, most)

        # 8 bits lose more by clipping one weight than all the others gain.
        fractions = FRACTIONS[:1] if self.bits == 8 else FRACTIONS
        candidates = store(jnp.maximum(full * _column(fractions), LEAST_STEP))
        _, scale = _best(lambda scale: (grid(scale).error(w), scale), candidates)
        return grid(scale), (scale.astype(self.scale_dtype), zero.astype(jnp.uint8))


def _range(w: jax.Array, most: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """The scale that holds all weights, and the zero, [N']. 0 is always within the range: else it could not be exact,
    and a zero of b bits could not reach the weights."""
    low, high = jnp.minimum(jnp.min(w, 0), 0), jnp.maximum(jnp.max(w, 0), 0)
    full = (high - low) / most
    return full, jnp.clip(jnp.round(-low / jnp.where(full < LEAST_STEP, 1, full)), 0, most)


def _column(values: Iterable[float]) -> jax.Array:
    return jnp.asarray(values)[:, None]


def _best(try_one: Callable[[jax.Array], tuple[jax.Array, Any]], candidates: jax.Array) -> tuple[jax.Array, Any]:
    """(error [N'], result) of the candidate with the least error, for each output by itself; the first of equals."""

    def step(best, candidate):
        new = try_one(candidate)
        return jax.tree.map(lambda x, y: jnp.where(new[0] < best[0], y, x), best, new), None

    shapes = jax.eval_shape(try_one, candidates[0])
    error, result = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return lax.scan(step, (error + jnp.inf, result), candidates)[0]


@functools.partial(jax.jit, static_argnames="fit")
def plainly(w: jax.Array, special: Any, fit: Fit) -> tuple[jax.Array, Any]:
    """Codes uint8 [groups, inputs, N'] of w [groups, inputs, N'], and what is stored of the groups, each with a leading
    axis of groups; every weight is rounded by itself. `special` has the same leading axis."""

    def one(group: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        grid, stored = fit(*group)
        return grid.encode(group[0]).astype(jnp.uint8), stored

    return lax.map(one, (w, special))
