# SPDX-License-Identifier: Apache-2.0
"""Losses of distillation against optax, SciPy and NumPy, and what they never look at."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from models import distill
from models.distill import Weights

KEYS = jax.random.split(jax.random.key(0), 4)
LOGITS, TEACHER = (3 * jax.random.normal(key, (6, 5)) for key in KEYS[:2])
FEATURES, TEACHER_FEATURES = (jax.random.normal(key, (3, 6, 4, 8)) for key in KEYS[2:])
LABELS = jnp.asarray([0, 4, 2, 1, 1, 3])


def test_hard_loss_is_cross_entropy():
    expected = optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS)
    np.testing.assert_allclose(distill.hard_loss(LOGITS, LABELS), expected.mean(), rtol=1e-6)
    some = LABELS.at[jnp.asarray([1, 4])].set(-1)
    np.testing.assert_allclose(distill.hard_loss(LOGITS, some), np.delete(expected, [1, 4]).mean(), rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_loss_is_a_divergence(temperature):
    p, q = (scipy.special.softmax(np.asarray(z, np.float64) / temperature, -1) for z in (TEACHER, LOGITS))
    expected = temperature**2 * scipy.special.rel_entr(p, q).sum(-1).mean()
    np.testing.assert_allclose(distill.soft_loss(LOGITS, TEACHER, temperature), expected, rtol=1e-5)


@pytest.mark.parametrize("by_energy", [False, True])
def test_feature_losses_are_mean_squares_of_layers(by_energy):
    student, teacher = (np.asarray(x, np.float64) for x in (FEATURES, TEACHER_FEATURES))
    expected = ((student - teacher) ** 2).mean((1, 2, 3)) / ((teacher**2).mean((1, 2, 3)) if by_energy else 1)
    np.testing.assert_allclose(
        distill.feature_losses(FEATURES, TEACHER_FEATURES, by_energy=by_energy), expected, rtol=1e-5
    )


def test_the_loss_is_the_weighted_sum():
    weights, rho = Weights(2.0, 3.0, 0.5, temperature=3.0), jnp.asarray([0.5, 1.0, 1.5])
    total, parts = distill.loss((LOGITS, FEATURES), (TEACHER, TEACHER_FEATURES), LABELS, weights, rho)
    layers = distill.feature_losses(FEATURES, TEACHER_FEATURES)
    expected = (
        2 * distill.hard_loss(LOGITS, LABELS) + 3 * distill.soft_loss(LOGITS, TEACHER, 3.0) + 0.5 * (rho @ layers)
    )
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    np.testing.assert_array_equal(parts["layers"], layers)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    _, parts = distill.loss((TEACHER, FEATURES), (TEACHER, FEATURES), LABELS, Weights())
    assert parts["soft"] == pytest.approx(0, abs=1e-6)
    assert parts["feature"] == 0


@pytest.mark.parametrize("labels", [jnp.full(6, jnp.nan), jnp.full(6, -1), None])
def test_unsupervised_never_touches_labels(labels):
    def loss(logits, features):
        return distill.loss((logits, features), (TEACHER, TEACHER_FEATURES), labels, Weights(hard=0))[0]

    value, gradients = jax.value_and_grad(loss, (0, 1))(LOGITS, FEATURES)
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    supervised = distill.loss((LOGITS, FEATURES), (TEACHER, TEACHER_FEATURES), LABELS, Weights(hard=0))[0]
    assert value == supervised


def test_missing_labels_are_safe_where_labels_count():
    gradient = jax.grad(distill.hard_loss)(LOGITS, jnp.full(6, jnp.nan))
    np.testing.assert_array_equal(gradient, 0)


def test_no_gradient_reaches_the_teacher():
    def loss(logits, features):
        return distill.loss((LOGITS, FEATURES), (logits, features), LABELS, Weights())[0]

    for gradient in jax.grad(loss, (0, 1))(TEACHER, TEACHER_FEATURES):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("mode", ["proportional", "uniform", "inverse"])
def test_weights_of_layers_have_mean_1(mode):
    losses = np.array([0.1, 0.4, 2.0, 0.7])
    rho = distill.layer_weights(losses, mode)
    assert rho.sum() == pytest.approx(4)
    order = {"proportional": np.argsort(losses), "inverse": np.argsort(-losses)}
    if mode in order:
        assert np.argsort(rho).tolist() == order[mode].tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Weights(hard=-1), "hard must not be negative, got -1"),
        (lambda: Weights(temperature=0), "temperature must be positive, got 0"),
        (lambda: distill.layer_weights(np.array([1.0, np.nan])), "must be finite"),
        (lambda: distill.layer_weights(np.array([1.0, 0.0]), "inverse"), "needs losses above 0"),
        (lambda: distill.layer_weights(np.array([1.0]), "other"), "got 'other'"),
    ],
)
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
