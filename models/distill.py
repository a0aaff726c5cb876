# SPDX-License-Identifier: Apache-2.0
"""What a compressed model learns from the model that it was made of: labels, soft labels and features.

    hard     cross entropy with the label                                    labels below 0, NaN: there is none
    soft     tau^2 KL(softmax(teacher / tau) || softmax(student / tau))
    feature  sum over layers of rho_i mean (student_i - teacher_i)^2
    loss     alpha hard + beta soft + gamma feature

rho are the weights of layers when the sparse model is quantized: the feature losses that pruning left, as shares of
their mean, so that layers which suffered most count most.

Source: Yu et al., "Boost Vision Transformer with GPU-Friendly Sparsity and Quantization", 2023 (GPUSQ-ViT).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

LayerWeights = Literal["proportional", "uniform", "inverse"]


@dataclasses.dataclass(frozen=True)
class Weights:
    """How much each part of the loss counts.

    Attributes:
      hard, soft, feature: alpha, beta, gamma. Unsupervised is hard=0: labels are then never looked at.
      temperature: tau.
      by_energy: feature losses are divided by the mean square of the teacher's features, so that layers of different
        widths and sizes compare.
    """

    hard: float = 1.0
    soft: float = 10.0
    feature: float = 5.0
    temperature: float = 2.0
    by_energy: bool = True

    def __post_init__(self):
        for name in ("hard", "soft", "feature"):
            if getattr(self, name) < 0:
                raise ValueError(f"Weights: {name} must not be negative, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(f"Weights: temperature must be positive, got {self.temperature}")


def hard_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy, nats, of logits [B, classes] and the labels [B] that are there: not below 0, nor NaN."""
    known = jnp.nan_to_num(labels.astype(jnp.float32), nan=-1.0) >= 0
    safe = jnp.where(known, labels, 0).astype(jnp.int32)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    losses = -jnp.take_along_axis(log_p, safe[:, None], axis=-1)[:, 0]
    return jnp.sum(jnp.where(known, losses, 0)) / jnp.maximum(jnp.sum(known), 1)


def soft_loss(logits: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
    """tau^2 KL of the softened distributions, mean over B; no gradient reaches the teacher."""
    log_p, log_q = (
        jax.nn.log_softmax(z.astype(jnp.float32) / temperature) for z in (jax.lax.stop_gradient(teacher), logits)
    )
    return temperature**2 * jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def feature_losses(features: jax.Array, teacher: jax.Array, *, by_energy: bool = True) -> jax.Array:
    """float32 [L], mean squares of differences of features [L, ...]; no gradient reaches the teacher."""
    student, teacher = features.astype(jnp.float32), jax.lax.stop_gradient(teacher).astype(jnp.float32)
    axes = tuple(range(1, student.ndim))
    losses = jnp.mean(jnp.square(student - teacher), axis=axes)
    if not by_energy:
        return losses
    energy = jnp.mean(jnp.square(teacher), axis=axes)
    return losses / jnp.where(energy == 0, 1, energy)


def loss(
    student: tuple[jax.Array, jax.Array],
    teacher: tuple[jax.Array, jax.Array],
    labels: jax.Array | None,
    weights: Weights,
    rho: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss and its parts.

    Args:
      student, teacher: logits [B, classes] and features [L, ...], of the layers that count.
      labels: [B]; those below 0 or NaN are not there. None, or weights.hard=0: none is looked at.
      weights: of the parts.
      rho: float32 [L], of layers; None for 1.

    Returns:
      a scalar, and "hard", "soft", "feature" (scalars) and "layers" [L], unweighted, for the log.
    """
    (logits, features), (teacher_logits, teacher_features) = student, teacher
    layers = feature_losses(features, teacher_features, by_energy=weights.by_energy)
    hard = jnp.zeros((), jnp.float32)
    if labels is not None and weights.hard > 0:
        hard = hard_loss(logits, labels)
    parts = {
        "hard": hard,
        "soft": soft_loss(logits, teacher_logits, weights.temperature),
        "feature": jnp.sum(layers if rho is None else rho * layers),
    }
    total = weights.hard * parts["hard"] + weights.soft * parts["soft"] + weights.feature * parts["feature"]
    return total, {**parts, "layers": layers}


def layer_weights(losses: np.ndarray, mode: LayerWeights = "proportional") -> np.ndarray:
    """rho [L] of mean 1, of the mean feature losses [L] of the last epoch of pruning.

    >>> layer_weights(np.array([1.0, 3.0])).tolist(), layer_weights(np.array([1.0, 3.0]), "inverse").tolist()
    ([0.5, 1.5], [1.5, 0.5])
    """
    losses = np.asarray(losses, np.float64)
    if losses.ndim != 1 or not np.isfinite(losses).all() or (losses < 0).any():
        raise ValueError(f"layer_weights: losses must be finite and not negative, one for each layer, got {losses}")
    if mode not in ("proportional", "uniform", "inverse"):
        raise ValueError(f'layer_weights: mode must be "proportional", "uniform" or "inverse", got {mode!r}')
    if mode == "uniform" or not losses.any():
        return np.ones_like(losses)
    if mode == "inverse":
        if not losses.all():
            raise ValueError(f'layer_weights: mode "inverse" needs losses above 0, got {losses}')
        losses = 1 / losses
    return losses * (len(losses) / losses.sum())
