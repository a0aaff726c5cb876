# SPDX-License-Identifier: Apache-2.0
"""Von Mises-Fisher distributions: directions in p dimensions, with a mean and a concentration; and mixtures of them.

    >>> import jax, jax.numpy as jnp
    >>> from models.vmf import VonMisesFisher, fit
    >>> truth = VonMisesFisher(jnp.eye(384)[0], jnp.asarray(500.0))
    >>> fitted = fit(truth.sample(jax.random.key(0), 2000))
    >>> bool(abs(fitted.kappa / 500 - 1) < 0.02)
    True

All functions are of jnp alone: jit, vmap over many distributions, grad. Those that sum over samples or features take
the mesh axes that these are sharded over, inside jax.shard_map, and return the same on every device. Fits of more than
a few digits want float64 (jax_enable_x64): a concentration has the digits of 1 - |mean of the samples|.

Sources: Banerjee et al., "Clustering on the Unit Hypersphere using von Mises-Fisher Distributions", 2005; Sra, "A short
note on parameter approximation for von Mises-Fisher distributions", 2012; Wood, "Simulation of the von Mises Fisher
distribution", 1994.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import bessel_ratio_i, log_iv

Axes = str | tuple[str, ...] | None
NEWTON_STEPS = 4  # two reach 1e-12 from 2000 dimensions on, four in all


class VonMisesFisher(NamedTuple):
    """Density C(kappa) exp(kappa mean . y) over unit vectors y; a pytree, batched over leading axes.

    Attributes:
      mean: [..., p], of length 1.
      kappa: [...], concentration, above 0; the variance around the mean is about (p - 1) / kappa.
    """

    mean: jax.Array
    kappa: jax.Array

    def log_prob(self, y: jax.Array) -> jax.Array:
        """[...] of unit vectors [..., p]."""
        return log_normalizer(self.mean.shape[-1], self.kappa) + self.kappa * jnp.sum(self.mean * y, -1)

    def resultant(self) -> jax.Array:
        """[...]: length of the expected vector, I_{p/2}(kappa) / I_{p/2-1}(kappa)."""
        return resultant(self.mean.shape[-1], self.kappa)

    def entropy(self) -> jax.Array:
        """[...], in nats."""
        return -log_normalizer(self.mean.shape[-1], self.kappa) - self.kappa * self.resultant()

    def kl(self, other: "VonMisesFisher") -> jax.Array:
        """[...]: Kullback-Leibler divergence of `other` from this, E[log p - log q]."""
        p = self.mean.shape[-1]
        agreement = jnp.sum(self.mean * other.mean, -1)
        of_constants = log_normalizer(p, self.kappa) - log_normalizer(p, other.kappa)
        return of_constants + self.resultant() * (self.kappa - other.kappa * agreement)

    def sample(self, key: jax.Array, n: int) -> jax.Array:
        """[n, p] unit vectors, of one distribution (mean [p])."""
        along, across = jax.random.split(key)
        p, kind = self.mean.shape[-1], self.mean.dtype
        w = _sample_along(along, n, p, self.kappa)[:, None]
        direction = jax.random.normal(across, (n, p - 1), kind)
        direction = direction / jnp.linalg.norm(direction, axis=-1, keepdims=True)
        y = jnp.concatenate([w, jnp.sqrt(jnp.maximum(0, 1 - w * w)) * direction], axis=-1)
        # A reflection takes the first axis to the mean.
        normal = jnp.zeros(p, kind).at[0].set(1) - self.mean
        square = jnp.sum(normal * normal)
        return y - jnp.where(square > 0, 2 / jnp.where(square > 0, square, 1), 0) * (y @ normal)[:, None] * normal


def log_normalizer(p: int, kappa: jax.Array) -> jax.Array:
    """log C(kappa) = (p/2 - 1) log kappa - p/2 log(2 pi) - log I_{p/2-1}(kappa)."""
    v = p / 2 - 1
    return v * jnp.log(kappa) - p / 2 * math.log(2 * math.pi) - log_iv(v, kappa)


def resultant(p: int, kappa: jax.Array) -> jax.Array:
    """A(kappa) = I_{p/2}(kappa) / I_{p/2-1}(kappa), from 0 to 1."""
    return bessel_ratio_i(p / 2 - 1, kappa)


def concentration(p: int, length: jax.Array, steps: int = NEWTON_STEPS) -> jax.Array:
    """The kappa whose resultant has this length, 0 < length < 1: the maximum of likelihood.

    Banerjee's start, R (p - R^2) / (1 - R^2), and Newton's steps by A' = 1 - A^2 - (p - 1) A / kappa. Differentiable:
    d kappa = d R / A'.
    """
    found: Any = _concentration(p, length, steps)
    return found


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 2))
def _concentration(p: int, length: jax.Array, steps: int) -> jax.Array:
    kappa = length * (p - length * length) / (1 - length * length)
    for _ in range(steps):
        a = resultant(p, kappa)
        kappa = kappa - (a - length) / _slope(p, kappa, a)
    return kappa


@_concentration.defjvp
def _(p: int, steps: int, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    kappa = concentration(p, primals[0], steps)
    return kappa, tangents[0] / _slope(p, kappa, resultant(p, kappa))


def fit(
    y: jax.Array,
    weights: jax.Array | None = None,
    *,
    steps: int = NEWTON_STEPS,
    data_axis: Axes = None,
    feature_axis: Axes = None,
) -> VonMisesFisher:
    """Maximum likelihood of unit vectors y [n, p].

    Args:
      y: samples; inside shard_map those, and the features, of this device.
      weights: [n], not negative; None for 1 each.
      steps: of Newton's method.
      data_axis, feature_axis: mesh axes that n and p are sharded over.

    Raises:
      ValueError: y is no matrix.
    """
    if y.ndim != 2:
        raise ValueError(f"fit: y must be [n, p], got {y.shape}; jax.vmap fits many at once.")
    weights = jnp.ones(len(y), y.dtype) if weights is None else weights
    return _of_sums(weights @ y, jnp.sum(weights), steps, data_axis, feature_axis)


class Mixture(NamedTuple):
    """k components: component.mean [k, p], component.kappa [k], weight [k], of sum 1."""

    component: VonMisesFisher
    weight: jax.Array

    def log_joint(self, y: jax.Array, feature_axis: Axes = None) -> jax.Array:
        """[n, k]: log of weight times density, of each component."""
        mean, kappa = self.component
        p = mean.shape[-1] * _size(feature_axis)
        return jnp.log(self.weight) + log_normalizer(p, kappa) + kappa * _sum(y @ mean.T, feature_axis)

    def log_prob(self, y: jax.Array, feature_axis: Axes = None) -> jax.Array:
        """[n]. Low for what is like none of the data: a score to find outliers by."""
        return jax.nn.logsumexp(self.log_joint(y, feature_axis), axis=-1)


def fit_mixture(
    y: jax.Array,
    means: jax.Array,
    *,
    rounds: int = 50,
    least_weight: float = 1.0,
    data_axis: Axes = None,
    feature_axis: Axes = None,
) -> tuple[Mixture, jax.Array]:
    """Expectation maximization from k means (`spread` finds some): soft clusters of directions.

    Args:
      y: unit vectors [n, p], or this device's share.
      means: [k, p], unit vectors.
      rounds: of expectation and maximization.
      least_weight: samples that a component keeps, so that none dies or shrinks to a point.
      data_axis, feature_axis: mesh axes that n and p are sharded over.

    Returns:
      The mixture, and the mean log likelihood before each round, [rounds]: it never falls by more than rounding.
    """
    n, k = len(y) * _size(data_axis), len(means)
    p = y.shape[1] * _size(feature_axis)
    start = Mixture(VonMisesFisher(means, jnp.full(k, float(p), y.dtype)), jnp.full(k, 1 / k, y.dtype))

    def step(mixture: Mixture, _: None) -> tuple[Mixture, jax.Array]:
        joint = mixture.log_joint(y, feature_axis)
        total = jax.nn.logsumexp(joint, axis=-1, keepdims=True)
        share = jnp.exp(joint - total)  # [n, k]
        count = jnp.maximum(_sum(jnp.sum(share, 0), data_axis), least_weight)
        component = jax.vmap(lambda sums, count: _of_sums(sums, count, NEWTON_STEPS, None, feature_axis))(
            _sum(share.T @ y, data_axis), count
        )
        return Mixture(component, count / jnp.sum(count)), _sum(jnp.sum(total), data_axis) / n

    return lax.scan(step, start, length=rounds)


def spread(key: jax.Array, y: jax.Array, k: int) -> jax.Array:
    """[k, p]: samples far from each other, each drawn by its squared distance to those before it (k-means++)."""

    def draw(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        chosen, distance = carry
        weight = jnp.log(jnp.maximum(distance, jnp.finfo(y.dtype).tiny))
        found = y[jax.random.categorical(jax.random.fold_in(key, i), weight)]
        return chosen.at[i].set(found), jnp.minimum(distance, 1 - y @ found)

    start = jnp.zeros((k, y.shape[1]), y.dtype), jnp.ones(len(y), y.dtype)
    return lax.fori_loop(0, k, draw, start)[0]


def _of_sums(sums: jax.Array, count: jax.Array, steps: int, data_axis: Axes, feature_axis: Axes) -> VonMisesFisher:
    """Of weighted sums [p] of samples and the sum of their weights."""
    sums, count = _sum(sums, data_axis), _sum(count, data_axis)
    length = jnp.sqrt(_sum(jnp.sum(sums * sums), feature_axis))
    p = sums.shape[-1] * _size(feature_axis)
    # All samples in one point, or balanced around it, have a maximum at infinity, or at 0.
    mean_length = jnp.clip(length / count, jnp.finfo(sums.dtype).tiny, 1 - 4 * jnp.finfo(sums.dtype).eps)
    return VonMisesFisher(sums / length, concentration(p, mean_length, steps))


def _slope(p: int, kappa: jax.Array, a: jax.Array) -> jax.Array:
    """A'(kappa)."""
    return 1 - a * a - (p - 1) * a / kappa


def _sample_along(key: jax.Array, n: int, p: int, kappa: jax.Array) -> jax.Array:
    """[n]: cosines to the mean, by Wood's rejection from a transformed beta distribution."""
    kind, half = jnp.asarray(kappa).dtype, (p - 1) / 2
    b = (p - 1) / (2 * kappa + jnp.sqrt(4 * kappa * kappa + (p - 1) ** 2))
    x = (1 - b) / (1 + b)
    limit = kappa * x + (p - 1) * jnp.log1p(-x * x)

    def draw(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        key, w, done = carry
        key, beta, uniform = jax.random.split(key, 3)
        z = jax.random.beta(beta, half, half, (n,), kind)
        tried = (1 - (1 + b) * z) / (1 - (1 - b) * z)
        accepted = kappa * tried + (p - 1) * jnp.log1p(-x * tried) - limit
        accepted = accepted >= jnp.log(jax.random.uniform(uniform, (n,), kind))
        return key, jnp.where(done, w, tried), done | accepted

    start = key, jnp.zeros(n, kind), jnp.zeros(n, bool)
    return lax.while_loop(lambda carry: ~jnp.all(carry[2]), draw, start)[1]


def _sum(x: jax.Array, axes: Axes) -> jax.Array:
    return lax.psum(x, axes) if axes else x


def _size(axes: Axes) -> int:
    return lax.axis_size(axes) if axes else 1
