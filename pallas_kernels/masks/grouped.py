# SPDX-License-Identifier: Apache-2.0
"""Masks for queries whose grouped heads lie side by side: row t * G + g stands for row t of a group's head g."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from pallas_kernels.masks.base import And, Array, Mask, Or
from pallas_kernels.masks.dense import Dense
from pallas_kernels.masks.lengths import Lengths
from pallas_kernels.masks.positions import Causal, Window
from pallas_kernels.masks.segments import Segments


def group_rows(mask: Mask, G: int, T: int, S: int) -> Mask:
    """The mask of queries [B, T * G, K, H] made of [B, T, K * G, H] under `mask`.

    >>> from pallas_kernels import masks
    >>> print(group_rows(masks.Causal(), 2, 2, 3).as_array(4, 3)[0, 0].astype(int))
    [[1 1 0]
     [1 1 0]
     [1 1 1]
     [1 1 1]]
    """
    again = functools.partial(group_rows, G=G, T=T, S=S)
    match mask:
        case And() | Or():
            return type(mask)(again(mask.left), again(mask.right))
        case Causal() | Window():
            rows, _ = mask.positions(T, S)
            return dataclasses.replace(mask, query_positions=_repeat(rows, G, -1))
        case Segments():
            return dataclasses.replace(mask, query_ids=_repeat(mask.query_ids, G, -1))
        case Lengths():
            return mask
        case Dense():
            return Dense(group_rows_of_array(mask.array, G))
    raise TypeError(f"masks.group_rows: unknown kind of mask {type(mask).__name__}; add a case for it.")


def group_rows_of_array(array: Array, G: int) -> Array:
    """[B|1, N|1, T|1, S|1], from the right -> [B|1, K|1, T * G|1, S|1]."""
    array = jnp.asarray(array).reshape((1,) * (4 - array.ndim) + array.shape)
    B, N, T, S = array.shape
    if N == 1:
        return array if T == 1 else _repeat(array, G, 2)
    return jnp.swapaxes(array.reshape(B, N // G, G, T, S), 2, 3).reshape(B, N // G, T * G, S)


def _repeat(values: Array, G: int, axis: int) -> Array:
    xp = np if isinstance(values, np.ndarray) else jnp
    return xp.repeat(values, G, axis=axis)
