# SPDX-License-Identifier: Apache-2.0
"""Training with weights and activations rounded to a few bits, and with a sparsity pattern that stays.

    scale = range / q_max         of a weight for each output, from what is kept; of activations one, from calibration
    fake(x) = clip(round(x / scale), q_min, q_max) * scale       gradient 1 inside the clip range, 0 outside

    masks = pattern(weights)         once; then every step:    gradients * mask --> optimizer --> parameters * mask

Ranges are symmetric, so that 0 stays 0 and a pruned weight stays pruned. What a softmax returns may use all codes of an
unsigned range. Scales and masters are float32.

Source: Yu et al., "Boost Vision Transformer with GPU-Friendly Sparsity and Quantization", 2023 (GPUSQ-ViT), stage 2.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

Observer = Literal["max", "percentile", "mse"]
BINS = 2048  # of a histogram of magnitudes


@dataclasses.dataclass(frozen=True)
class Codes:
    """The integers that a number of bits has.

    Attributes:
      bits: 2 to 8.
      signed: False for what is never negative.
    """

    bits: int
    signed: bool = True

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise ValueError(f"Codes: bits must be 2 to 8, got {self.bits}")

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - self.signed) - 1

    @property
    def lowest(self) -> int:
        """Symmetric: one code of the signed is not used."""
        return -self.highest if self.signed else 0


def fake_quantize(x: jax.Array, scale: jax.Array, codes: Codes) -> jax.Array:
    """x rounded to codes times a scale, in x's dtype; straight-through inside the clip range.

    >>> import jax.numpy as jnp
    >>> fake_quantize(jnp.asarray([0.0, 0.4, 0.6, 9.0]), jnp.asarray(0.5), Codes(4)).tolist()
    [0.0, 0.5, 0.5, 3.5]

    Args:
      x: floating, any shape.
      scale: float32, broadcast against x; positive where x is not 0. No gradient reaches it.
      codes: the integers.
    """
    return (fake_codes(x, scale, codes) * jax.lax.stop_gradient(scale)).astype(x.dtype)


def fake_codes(x: jax.Array, scale: jax.Array, codes: Codes) -> jax.Array:
    """The codes alone, as float32: sums of their products are exact, below 2^24, and are those of an integer model.
    The gradient is that of x / scale."""
    rounded: Any = _fake_codes(x, scale, codes)
    return rounded


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fake_codes(x: jax.Array, scale: jax.Array, codes: Codes) -> jax.Array:
    return quantize(x, scale, codes).astype(jnp.float32)


def _forward(x: jax.Array, scale: jax.Array, codes: Codes) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    steps = x.astype(jnp.float32) / _nonzero(scale)
    inside = (steps >= codes.lowest) & (steps <= codes.highest)
    return _fake_codes(x, scale, codes), (jnp.where(inside, 1 / _nonzero(scale), 0).astype(x.dtype), scale)


def _backward(codes: Codes, kept: tuple[jax.Array, jax.Array], dout: jax.Array) -> tuple[jax.Array, jax.Array]:
    slope, scale = kept
    return (dout * slope).astype(slope.dtype), jnp.zeros_like(scale)


_fake_codes.defvjp(_forward, _backward)


def quantize(x: jax.Array, scale: jax.Array, codes: Codes) -> jax.Array:
    """int32 codes of x, what an integer model stores."""
    return jnp.clip(jnp.round(x.astype(jnp.float32) / _nonzero(scale)), codes.lowest, codes.highest).astype(jnp.int32)


def _nonzero(scale: jax.Array) -> jax.Array:
    return jnp.where(scale == 0, 1, scale)


def weight_scale(w: jax.Array, codes: Codes, axis: int = 0) -> jax.Array:
    """float32 scale of each output of a weight [K, N], [1, N], from the largest magnitude along the inputs' axis."""
    return jnp.max(jnp.abs(w.astype(jnp.float32)), axis=axis, keepdims=True) / codes.highest


# --- Calibration ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Range:
    """A histogram of magnitudes that grows with the values seen; on the host.

    >>> import numpy as np
    >>> seen = Range()
    >>> seen.add(np.linspace(-1, 1, 1001)); seen.add([4.0])
    >>> seen.limit("max"), round(seen.limit("percentile", percentile=99.9), 1)
    (4.0, 1.0)

    Attributes:
      largest: magnitude seen.
      counts: int64 [BINS], of magnitudes from 0 to `top`.
      top: upper end of the histogram; doubled, and bins merged in pairs, when something larger comes.
    """

    largest: float = 0.0
    top: float = 0.0
    counts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, values: Any) -> None:
        """Values of any shape; ValueError for what is not finite."""
        magnitudes = np.abs(np.asarray(values, np.float64)).reshape(-1)
        if not magnitudes.size:
            return
        if not np.isfinite(largest := float(magnitudes.max())):
            raise ValueError(
                "Range: values to calibrate with must be finite; the model has diverged, or the data is bad"
            )
        self.largest = max(self.largest, largest)
        if not self.top:
            self.top = largest
        while largest > self.top:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts, self.top = np.concatenate([merged, np.zeros_like(merged)]), 2 * self.top
        if self.top:
            bins = np.minimum((magnitudes * (BINS / self.top)).astype(np.int64), BINS - 1)
            self.counts += np.bincount(bins, minlength=BINS)

    def limit(self, observer: Observer, *, percentile: float = 99.9, codes: Codes | None = None) -> float:
        """The largest magnitude that is represented.

        Args:
          observer: "max"; "percentile", that of which `percentile` percent are smaller; or "mse", that with the least
            squared error of rounding to `codes` among 100 fractions of the largest.
        """
        if not self.counts.any():
            raise ValueError("Range: nothing was added; run the calibration data through the model first")
        if observer == "max":
            return self.largest
        width = self.top / BINS
        if observer == "percentile":
            share = np.cumsum(self.counts) / self.counts.sum()
            return min(self.largest, float(width * (np.searchsorted(share, percentile / 100) + 1)))
        if observer != "mse" or codes is None:
            raise ValueError(f'Range: observer must be "max", "percentile", or "mse" with codes, got {observer!r}')
        middles = width * (np.arange(BINS) + 0.5)
        limits = self.largest * np.arange(1, 101) / 100

        def error(limit: float) -> float:
            scale = limit / codes.highest
            rounded = np.clip(np.round(middles / scale), 0, codes.highest) * scale
            return float(self.counts @ (middles - rounded) ** 2)

        return float(min(limits, key=error))


# --- Masks ----------------------------------------------------------------------------------------------------


def apply_masks(tree: Any, masks: Any) -> Any:
    """The tree, 0 where a mask is False.

    Args:
      tree: a pytree of arrays.
      masks: one like it: bool arrays, or None where all is kept.
    """

    def apply(mask: Any, x: jax.Array) -> jax.Array:
        return x if mask is None else jnp.where(mask, x, 0)

    return jax.tree.map(apply, masks, tree, is_leaf=lambda x: x is None)


def masked(optimizer: optax.GradientTransformation, masks: Any) -> optax.GradientTransformation:
    """An optimizer under which what a mask leaves out is 0 and stays 0, whatever momentum and weight decay do.

    Args:
      optimizer: any of optax.
      masks: as of `apply_masks`, a pytree like the parameters.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("masked: update needs the parameters")
        updates, state = optimizer.update(apply_masks(updates, masks), state, params)
        # Not only the update: a parameter that was not 0 before becomes 0.
        after = apply_masks(optax.apply_updates(params, updates), masks)
        return jax.tree.map(lambda new, old: new - old, after, params), state

    return optax.GradientTransformation(optimizer.init, update)
