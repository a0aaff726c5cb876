# SPDX-License-Identifier: Apache-2.0
"""What kernels compute of a mask, against the dense array made by plain comparisons."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from pallas_kernels import masks
from pallas_kernels.masks.grouped import group_rows
from pallas_kernels.masks.lowered import lower
from tests.masks.test_masks import B, N, cases


@given(cases())
def test_visible_is_the_dense_array(case):
    mask, array, T, S, *_ = case
    lowered = lower(mask, T, S)
    visible = lowered.visible(
        lambda: np.arange(T, dtype=np.int32)[:, None],
        lambda: np.arange(S, dtype=np.int32)[None, :],
        [x[:, None, :, None] for x in lowered.rows],
        [x[:, None, None, :] for x in lowered.cols],
        lowered.dense,
    )
    np.testing.assert_array_equal(np.broadcast_to(visible, (B, N, T, S)), np.broadcast_to(array, (B, N, T, S)))


@given(cases())
def test_heads_of_a_group_as_rows(case):
    mask, array, T, S, *_ = case
    together = group_rows(mask, N, T, S)  # one group of all heads
    want = np.swapaxes(array[:, None], 2, 3).reshape(B, 1, T * N, S)
    np.testing.assert_array_equal(np.broadcast_to(together.as_array(T * N, S), want.shape), want)


def test_static_masks_store_nothing():
    assert lower(masks.Causal() & masks.Window(3, None), 100, 200).is_static
    assert not lower(masks.Causal() | masks.Lengths(jnp.asarray([3])), 100, 200).is_static


def test_an_unknown_mask_is_an_error():
    class Odd(masks.Mask):
        pass

    with pytest.raises(TypeError, match="unknown kind of mask Odd"):
        lower(Odd(), 4, 4)
