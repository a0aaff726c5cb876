# SPDX-License-Identifier: Apache-2.0
"""Weights that quantize makes: against the paper's formulas in NumPy, on weights made to be exact, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import quantize, quantized_matmul
from pallas_kernels.quantized_matmul import packing
from pallas_kernels.quantized_matmul.quantize import choose_strips, packed_bits_per_weight
from pallas_kernels.quantized_matmul.serialize import from_tensors, to_tensors
from tests.quantized_matmul.test_weights import by_numpy

SIZES = ((100, 35), (272, 32))  # [K, N]: ragged ones, more than a chunk


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def squared_error(weight, w):
    return float(np.sum((np.asarray(weight.dequantize(), np.float64) - w) ** 2))


def by_min_and_max(w, bits, inputs):
    """[K, N], section 2.1 of the paper in float64: no search, and scales that are not quantized."""
    K, N = w.shape
    groups = np.pad(w.astype(np.float64), ((0, -K % inputs), (0, 0))).reshape(-1, inputs, N)
    low, high = np.minimum(groups.min(1, keepdims=True), 0), np.maximum(groups.max(1, keepdims=True), 0)
    scale = (high - low) / (2**bits - 1)
    zero = np.round(-low / scale)
    codes = np.clip(np.round(groups / scale) + zero, 0, 2**bits - 1)
    return ((codes - zero) * scale).reshape(-1, N)[:K]


@given(st.sampled_from(SIZES), st.integers(0, 2**32 - 1), st.sampled_from(("some", "none", "all")))
def test_any_precision_map_is_kept_and_can_be_read(size, seed, which):
    random = np.random.default_rng(seed)
    S = -(-size[0] // 16)
    strips = {"some": random.random(S) < 0.4, "none": np.zeros(S, bool), "all": np.ones(S, bool)}[which]
    w = random.standard_normal(size).astype(np.float32) * 10.0 ** random.uniform(-6, 6)
    weight = quantize(w, strips=strips)
    assert weight.shape == size
    np.testing.assert_array_equal(weight.four_bit_strips(), strips)
    from_tensors(to_tensors(weight, "w"), "w")  # every scale code, zero, step and index is one that may be
    got = np.asarray(weight.dequantize())
    np.testing.assert_array_equal(got, by_numpy(weight))
    # Either way of rounding does better than nothing, and 4 bits do better than 2 (squared errors 0.1 and 0.005).
    share = np.sum((got - w) ** 2, 1) / np.mean(w**2) / size[1]
    each = np.repeat(strips, 16)[: size[0]]
    assert each.all() or np.mean(share[~each]) < 0.2
    assert not each.any() or np.mean(share[each]) < 0.02


def test_weights_of_a_grid_are_kept():
    """2 bits: -1, 0, 1, 2 times a power of 2, another for each strip; 4 bits: -8 ... 7."""
    random = np.random.default_rng(0)
    size = 2.0 ** random.integers(-8, 8, 16)
    for levels, strips in ((np.arange(-1, 3), np.zeros(16, bool)), (np.arange(-8, 8), np.ones(16, bool))):
        w = random.permuted(np.resize(levels, (16, 16, 48)), axis=1) * size[:, None, None]
        w[:, : len(levels)] = levels[:, None] * size[:, None, None]  # every output has the least and the largest
        weight = quantize(w.reshape(256, 48).astype(np.float32), strips=strips)
        np.testing.assert_array_equal(weight.dequantize(), w.reshape(256, 48))


@pytest.mark.parametrize(
    ("scheme", "bits", "inputs", "options"),
    [
        ("mixed_2_4", 2, 16, {"four_bit_fraction": 0}),
        ("mixed_2_4", 4, 16, {"four_bit_fraction": 1}),
        ("int2", 2, 64, {}),
        ("int2", 2, 32, {"group_size": 32}),
    ],
)
def test_it_is_better_than_minimum_and_maximum(scheme, bits, inputs, options):
    """Although its scales are rounded, to 4 bits times a step or to bfloat16."""
    w = normal((300, 48))
    plain = float(np.sum((by_min_and_max(w, bits, inputs) - w) ** 2))
    assert squared_error(quantize(w, scheme, **options), w) < plain


def test_integers_are_symmetric():
    """By NumPy, one scale for each output; and 4 bits are no worse than scales that hold the largest weight."""
    w = normal((200, 20))
    weight = quantize(w, "int8")
    scale = np.abs(w).max(0) / np.float32(127)
    np.testing.assert_allclose(weight.scale[0, :20], scale, rtol=1e-6)
    assert np.all(np.abs(weight.dequantize() - w) <= scale * 0.5001)
    assert int(jnp.min(packing.unpack(weight.words, 8, 200)[:20])) >= 1  # no -128
    groups = w[:128].reshape(128, 20), w[128:]
    scales = [np.abs(group).max(0) / 7 for group in groups]
    held = [np.clip(np.round(group / scale), -8, 7) * scale for group, scale in zip(groups, scales, strict=True)]
    assert squared_error(quantize(w, "int4"), w) < np.sum((np.concatenate(held) - w) ** 2)


@pytest.mark.parametrize("scheme", ["mixed_2_4", "int2", "int4", "int8"])
def test_scaling_by_a_power_of_two_is_all_that_happens(scheme):
    w = normal((100, 35))
    plain, scaled = (quantize(x, scheme).dequantize() for x in (w, w * 2.0**-9))
    np.testing.assert_array_equal(plain * 2.0**-9, scaled)


def test_weights_without_a_range():
    """Zeros stay zeros; a column of one value, of one sign, next to much larger ones, or near the limits of float32."""
    w = np.zeros((48, 32), np.float32)
    np.testing.assert_array_equal(quantize(w).dequantize(), w)
    assert quantize(w[:16, :1]).dequantize().shape == (16, 1)  # the least there is
    w[:, 3], w[:, 4], w[:, 5] = 1.5, -np.linspace(1, 2, 48), 2.0**60
    w[:, 20] = 1e-38
    for strips in (np.zeros(3, bool), np.ones(3, bool)):
        got = np.asarray(quantize(w, strips=strips).dequantize())
        np.testing.assert_array_equal(got[:, [0, 1, 2, *range(6, 16), *range(21, 32)]], 0)
        np.testing.assert_allclose(got[:, 5], 2.0**60, rtol=0.01)
    assert np.isfinite(got).all()
    for scheme in ("int2", "int4", "int8"):
        got = np.asarray(quantize(w, scheme).dequantize())
        np.testing.assert_allclose(got[:, [3, 5]], w[:, [3, 5]], rtol=0.01)
        assert np.isfinite(got).all()


def test_strips_are_chosen_by_what_they_are_ranked_by():
    w = normal((160, 32))
    w[48:64] *= 3  # strip 3 has the largest range
    w[5, 0] = 30  # and strip 0 the largest weight of one output
    for ranking in ("range", "error"):
        assert np.flatnonzero(choose_strips(w, ranking, 0.1)).tolist() == [3]
    # The squared error of a strip does not only depend on its range: two values have a place on the grid.
    w[48:64] = np.where(w[48:64] > 0, 5, 0)
    assert np.flatnonzero(choose_strips(w, "range", 0.1)).tolist() == [3]
    assert not choose_strips(w, "error", 0.8)[3]
    assert np.sum(choose_strips(w, "random", 0.3, seed=1)) == 3
    drawn = [choose_strips(w, "random", 0.5, seed=seed).tolist() for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len({tuple(x) for x in drawn}) == 3


def test_sensitivity_is_what_the_output_loses():
    """1 / [H^-1]_jj is the Schur complement of all other inputs: the least growth of |x dw|^2 for dw_j = 1."""
    random = np.random.default_rng(0)
    K, N = 40, 5
    x = random.standard_normal((64, K)) * random.uniform(0.1, 3, K)
    w = normal((K, N))
    hessian = x.T @ x
    damped = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(K)
    loss = np.zeros(3)
    for j in range(K):
        rest = np.delete(np.arange(K), j)
        others = np.linalg.solve(damped[np.ix_(rest, rest)], damped[rest, j])
        loss[j // 16] += np.sum(w[j] ** 2) * (damped[j, j] - damped[j, rest] @ others)
    for count in (1, 2):
        want = np.sort(np.argsort(-loss)[:count])
        np.testing.assert_array_equal(np.flatnonzero(choose_strips(w, "hessian", count / 3, hessian=hessian)), want)


def test_outliers_keep_their_values():
    w = normal((100, 35))
    places = [(17, 3), (40, 3), (99, 34), (50, 0)]  # outputs 3 twice, most not at all
    for i, place in enumerate(places):
        w[place] = (40 + i) * (-1) ** i
    strips = np.zeros(7, bool)
    strips[3] = True  # inputs 48 to 63: there 4 bits are enough
    weight = quantize(w, strips=strips, outlier_fraction=3 / w.size)
    assert weight.outliers is not None
    assert weight.outliers.values.shape == (3,)
    got = np.asarray(weight.dequantize())
    np.testing.assert_array_equal(got, by_numpy(weight).astype(np.float32))
    for place in places[:3]:
        assert got[place] == w[place]  # small integers
    rest = got.copy()
    for place in places:
        rest[place] = w[place]
    without = np.asarray(quantize(w, strips=strips).dequantize())
    outputs = [3, 34]
    assert np.sum((rest - w)[:, outputs] ** 2) < 0.8 * np.sum((without - w)[:, outputs] ** 2)
    from_tensors(to_tensors(weight, "w"), "w")
    # As many as there are, and no more.
    everything = quantize(w, four_bit_fraction=0, outlier_fraction=1)
    np.testing.assert_array_equal(everything.dequantize(), w.astype(jnp.bfloat16).astype(np.float32))


def test_clipped_scales_fit_in_the_packed_words():
    w = normal((48 * 16, 48))
    strips = np.arange(48) % 8 == 2
    plain, clipped, clamped = (quantize(w, strips=strips, clip_scales=c) for c in (False, True, "clamp"))
    codes = np.asarray(packing.unpack_stats(clipped.main.stats)[0])[:, :48][:, ~strips]
    assert codes[:, 0::3].max() == codes[:, 1::3].max() == 7
    assert codes[:, 2::3].max() == 15
    assert squared_error(plain, w) < squared_error(clipped, w) < squared_error(clamped, w)
    # Section 2.5's count, with scales of two orders in 4-bit strips, and their index.
    p = 6 / 48
    two, four = 2 + 16 / (3 * 16) + 16 / 256, 4 + 8 / 16 + 16 / 256
    for weight in (clipped, clamped):
        assert packed_bits_per_weight(weight) == pytest.approx((1 - p) * two + p * four + 32 * 6 / w.size)
    with pytest.raises(ValueError, match=r"do not fit in 3 bits; quantize\(..., clip_scales=True\) makes them fit."):
        packed_bits_per_weight(plain)


def test_products_in_integers_are_those_of_numpy():
    w, x = normal((100, 20)), normal((3, 100), 1)
    weight = quantize(w, "int8", activation_bits=8)
    integers = np.asarray(packing.unpack(weight.words, 8, 100)).astype(np.int64)[:20].T - 128
    x_scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
    want = (np.round(x / x_scale).astype(np.int64) @ integers) * x_scale.astype(np.float64)
    want = want * np.asarray(weight.scale, np.float64)[0, :20]
    for implementation in ("xla", "reference"):
        got = quantized_matmul(jnp.asarray(x), weight, implementation=implementation)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


GOOD = normal((64, 16))
INT4 = {"scheme": "int4"}
NOT_FINITE = np.where(np.arange(64 * 16).reshape(64, 16) % 500 == 499, np.nan, GOOD)


@pytest.mark.parametrize(
    ("w", "options", "error", "message"),
    [
        (NOT_FINITE, {}, ValueError, "2 of 1024 weights are not finite or above 2^60 in size, the first at [k=31, n=3"),
        (GOOD * np.float32(1e20), {}, ValueError, "weights are not finite or above 2^60 in size"),
        (GOOD[0], {}, ValueError, "w must have shape [K, N], both above 0, got (16,)."),
        (GOOD[:0], {}, ValueError, "w must have shape [K, N], both above 0, got (0, 16)."),
        (np.ones((64, 16), int), {}, TypeError, "w must be an array of floating point, got int64."),
        ([[1.0]], {}, TypeError, "w must be an array of floating point, got list."),
        (GOOD[:15], {}, ValueError, '"mixed_2_4" needs K >= 16, a strip; w has shape (15, 16).'),
        (GOOD, {"scheme": "int3"}, ValueError, 'one of "mixed_2_4", "int2", "int4", "int8", got \'int3\'.'),
        (GOOD, {"four_bit_fraction": 1.5}, ValueError, "four_bit_fraction must be from 0 to 1, got 1.5."),
        (GOOD, {"outlier_fraction": -0.1}, ValueError, "outlier_fraction must be from 0 to 1, got -0.1."),
        (GOOD, {"strips": "best"}, ValueError, 'strips must be one of "range", "error", "hessian", "random" or a b'),
        (GOOD, {"strips": np.ones(5, bool)}, ValueError, "strips must be bool [S=4] or a name, got bool (5,)."),
        (GOOD, {"strips": "hessian"}, ValueError, 'strips="hessian" needs hessian='),
        (GOOD, {"clip_scales": "yes"}, ValueError, "clip_scales must be True, False or \"clamp\", got 'yes'."),
        (GOOD, {"group_size": 32}, ValueError, 'group_size and activation_bits are for integer schemes; "mixed_2_4"'),
        (GOOD, INT4 | {"group_size": 24}, ValueError, "group_size must be a positive multiple of 16, or None"),
        (GOOD, INT4 | {"clip_scales": True}, ValueError, 'clip_scales cannot be given for scheme "int4", only'),
        (GOOD, INT4 | {"activation_bits": 8}, ValueError, 'scheme "int8" without group_size, got scheme "int4"'),
        (GOOD, {"scheme": "int8", "activation_bits": 4}, ValueError, "activation_bits must be 8 or None, got 4."),
        (GOOD, {"hessian": np.eye(63)}, ValueError, "hessian must have shape [K, K] with K=64, got (63, 63)."),
        (GOOD, {"hessian": -np.eye(64)}, ValueError, "hessian must be a finite sum of x^T x"),
        (GOOD, {"hessian": 2 - np.eye(64)}, ValueError, "hessian must be a sum of x^T x; it has negative eigenvalues."),
    ],
)
def test_bad_calls(w, options, error, message):
    with pytest.raises(error) as caught:
        quantize(w, **options)
    assert message in str(caught.value)


def test_a_weight_is_made_of_any_floating_array():
    for dtype in (jnp.bfloat16, jnp.float16, np.float64):
        w = np.asarray(GOOD, dtype)
        np.testing.assert_array_equal(
            quantize(w, "int8").dequantize(), quantize(jnp.asarray(w, jnp.float32), "int8").dequantize()
        )
    assert jax.tree.leaves(quantize(jnp.asarray(GOOD)))[0].dtype == jnp.uint32
