# SPDX-License-Identifier: Apache-2.0
"""Fake quantization, calibration and masks against their definitions and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.qat import Codes, Range, fake_quantize, masked, quantize, weight_scale
from pallas_kernels import prune_2_4


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 8), st.booleans(), st.integers(0, 99))
def test_fake_quantization_is_rounding_to_the_nearest_code(bits, signed, seed):
    codes = Codes(bits, signed)
    x = np.random.default_rng(seed).standard_normal(200).astype(np.float32)
    scale = np.float32(1.5 / codes.highest)
    grid = np.arange(codes.lowest, codes.highest + 1) * np.float64(scale)
    assert 0 in grid
    assert len(grid) == 2**bits - signed
    found = np.asarray(fake_quantize(jnp.asarray(x), jnp.asarray(scale), codes), np.float64)
    best = np.abs(x[:, None] - grid).min(1)
    np.testing.assert_allclose(np.abs(found - x), best, atol=1e-6)
    np.testing.assert_allclose(found, np.asarray(quantize(jnp.asarray(x), scale, codes)) * np.float64(scale), atol=1e-6)


def test_gradients_pass_inside_and_not_outside():
    codes, scale = Codes(4), jnp.asarray(0.5)
    x = jnp.asarray([-4.0, -3.5, -0.1, 0.0, 3.5, 3.6])  # the limits are -3.5 and 3.5
    gradient, of_scale = jax.grad(lambda x, s: jnp.sum(3 * fake_quantize(x, s, codes)), (0, 1))(x, scale)
    assert gradient.tolist() == [0, 3, 3, 3, 3, 0]
    assert of_scale == 0
    unsigned = jax.grad(lambda x: jnp.sum(fake_quantize(x, scale, Codes(4, signed=False))))(x)
    assert unsigned.tolist() == [0, 0, 0, 1, 1, 1]


def test_scales_are_of_each_output_and_of_what_is_kept():
    w = np.random.default_rng(0).standard_normal((16, 6)).astype(np.float32)
    pruned = np.array(prune_2_4(jnp.asarray(w)))
    pruned[:, 3] = 0  # an output without weights
    scale = weight_scale(jnp.asarray(pruned), Codes(8))
    np.testing.assert_allclose(scale, np.abs(pruned).max(0, keepdims=True) / 127, rtol=1e-6)
    rounded = np.asarray(fake_quantize(jnp.asarray(pruned), scale, Codes(8)))
    assert ((rounded != 0) <= (pruned != 0)).all()
    np.testing.assert_allclose(rounded, pruned, atol=float(scale.max()) / 2)


@pytest.mark.parametrize("parts", [1, 7])
def test_limits_do_not_depend_on_how_values_come(parts):
    values = np.random.default_rng(1).standard_normal(20_000) * np.linspace(0.1, 3, 20_000)
    seen = Range()
    for part in np.array_split(values, parts):
        seen.add(part)
    assert seen.counts.sum() == values.size
    assert seen.limit("max") == np.abs(values).max()
    limit, bin_width = seen.limit("percentile"), seen.top / 2048
    assert np.mean(np.abs(values) <= limit) >= 0.999
    assert np.mean(np.abs(values) <= limit - 2 * bin_width) <= 0.999
    # The best limit, by a search of its own on the values themselves.
    codes, limits = Codes(4), np.abs(values).max() * np.linspace(0.05, 1, 200)
    errors = [np.mean((values - np.clip(np.round(values / (l / 7)), -7, 7) * (l / 7)) ** 2) for l in limits]
    chosen = seen.limit("mse", codes=codes)
    rounded = np.clip(np.round(values / (chosen / 7)), -7, 7) * (chosen / 7)
    assert np.mean((values - rounded) ** 2) <= 1.01 * min(errors)


def test_bad_calibration_is_named():
    with pytest.raises(ValueError, match="nothing was added"):
        Range().limit("max")
    with pytest.raises(ValueError, match="must be finite"):
        Range().add([1.0, np.nan])
    seen = Range()
    seen.add([1.0])
    with pytest.raises(ValueError, match='"mse" with codes'):
        seen.limit("mse")
    with pytest.raises(ValueError, match="bits must be 2 to 8, got 9"):
        Codes(9)


def test_a_pattern_stays_for_100_steps_with_weight_decay():
    keys = jax.random.split(jax.random.key(0), 4)
    w, bias = jax.random.normal(keys[0], (32, 8)), jnp.ones(8)
    x, y = jax.random.normal(keys[1], (64, 32)), jax.random.normal(keys[2], (64, 8))
    parameters = {"w": w, "bias": bias}
    masks = {"w": prune_2_4(w) != 0, "bias": None}
    optimizer = masked(optax.adamw(1e-2, weight_decay=0.1), masks)
    state = optimizer.init(parameters)
    loss = lambda p: jnp.mean((x @ p["w"] + p["bias"] - y) ** 2)  # noqa: E731

    @jax.jit
    def step(parameters, state):
        updates, state = optimizer.update(jax.grad(loss)(parameters), state, parameters)
        return optax.apply_updates(parameters, updates), state

    before = loss({"w": prune_2_4(w), "bias": bias})
    for _ in range(100):
        parameters, state = step(parameters, state)
        assert not np.asarray(parameters["w"])[~np.asarray(masks["w"])].any()
    assert loss(parameters) < 0.8 * before
    assert (np.asarray(parameters["bias"]) != 1).all()
    # Where there is a mask, momentum of what is masked is 0, too.
    with pytest.raises(ValueError, match="needs the parameters"):
        optimizer.update(parameters, state)
