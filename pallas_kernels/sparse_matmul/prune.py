# SPDX-License-Identifier: Apache-2.0
"""Which two of four weights stay: those of the largest magnitude, of the lower index where two are equal.

    prune_2_4          w w w w | w w w w           two of every four along the axis over which products sum
    prune_4_8_pairs    ww ww ww ww                 two of every four adjacent pairs, the pattern of 4-bit weights

Sources: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, section 3 (magnitudes); Sun et al., "A Simple
and Effective Pruning Approach for Large Language Models" (Wanda), 2023, for magnitudes times the norm of the input;
PTX ISA, "Sparse matrix storage", for pairs.
"""

import jax
import jax.numpy as jnp


def prune_2_4(w: jax.Array, axis: int = 0, *, activation_norm: jax.Array | None = None) -> jax.Array:
    """w with 0 in place of the two smallest of every four along an axis.

    >>> import jax.numpy as jnp
    >>> prune_2_4(jnp.asarray([[1.0], [-3.0], [2.0], [2.0]]))[:, 0].tolist()     # of equals the first stays
    [0.0, -3.0, 2.0, 0.0]

    Args:
      w: any real array; the axis has a multiple of 4 entries.
      axis: that of the inputs, over which a product sums: 0 for a weight [K, N].
      activation_norm: [size of the axis], norms of the inputs of w; magnitudes are weighted by them.

    Raises:
      ValueError: no such axis, or sizes that do not fit.
      TypeError: w is neither of integers nor of floating point.
    """
    axis = _checked("prune_2_4", w, axis, 4)
    score = _magnitudes(w)
    if activation_norm is not None:
        if jnp.shape(activation_norm) != (w.shape[axis],):
            raise ValueError(
                f"prune_2_4: activation_norm must have shape [{w.shape[axis]}], one for each entry of axis {axis}, got "
                f"{jnp.shape(activation_norm)}."
            )
        score *= jnp.expand_dims(jnp.asarray(activation_norm, score.dtype), [i for i in range(w.ndim) if i != axis])
    return jnp.where(_largest_two(score, axis), w, jnp.zeros((), w.dtype))


def prune_4_8_pairs(w: jax.Array, axis: int = 0) -> jax.Array:
    """w with 0 in place of two of every four adjacent pairs along an axis: those with the smallest sums of magnitudes.

    Arguments and errors as of `prune_2_4`; the axis has a multiple of 8 entries.
    """
    axis = _checked("prune_4_8_pairs", w, axis, 8)
    pairs = jnp.moveaxis(_magnitudes(w), axis, -1)
    score = pairs.reshape(*pairs.shape[:-1], -1, 2).sum(-1)
    keep = jnp.repeat(_largest_two(score, score.ndim - 1), 2, axis=-1)
    return jnp.where(jnp.moveaxis(keep, -1, axis), w, jnp.zeros((), w.dtype))


def _checked(name: str, w: jax.Array, axis: int, multiple: int) -> int:
    """The axis, counted from 0."""
    if not (jnp.issubdtype(w.dtype, jnp.floating) or jnp.issubdtype(w.dtype, jnp.integer)):
        raise TypeError(f"{name}: w must be of integers or of floating point, got {w.dtype}.")
    if not -w.ndim <= axis < w.ndim:
        raise ValueError(f"{name}: axis={axis} is not one of w, which has shape {tuple(w.shape)}.")
    if w.shape[axis] % multiple:
        raise ValueError(
            f"{name}: axis {axis} of w has {w.shape[axis]} entries, and patterns are of {multiple}; pad it with zeros "
            f"to {-(-w.shape[axis] // multiple) * multiple}, or leave this weight dense."
        )
    return axis % w.ndim


def _magnitudes(w: jax.Array) -> jax.Array:
    # The most negative integer has no magnitude in its own type. What is not a number counts as large: it stays to be
    # seen, and no more than two of four do.
    floating = jnp.issubdtype(w.dtype, jnp.floating)
    magnitudes = jnp.abs(w.astype(jnp.promote_types(w.dtype, jnp.float32) if floating else jnp.float32))
    return jnp.where(jnp.isnan(magnitudes), jnp.inf, magnitudes)


def _largest_two(score: jax.Array, axis: int) -> jax.Array:
    """bool: of every four along the axis, the two that are larger than two others; of equals the first."""
    fours = jnp.moveaxis(score, axis, -1)
    fours = fours.reshape(*fours.shape[:-1], -1, 4)
    mine, other = fours[..., :, None], fours[..., None, :]
    before = jnp.arange(4)[:, None] > jnp.arange(4)
    rank = jnp.sum((other > mine) | ((other == mine) & before), axis=-1)
    keep = (rank < 2).reshape(*fours.shape[:-2], -1)
    return jnp.moveaxis(keep, -1, axis)
