# SPDX-License-Identifier: Apache-2.0
"""Von Mises-Fisher distributions against SciPy's, mpmath, and the same on one device."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax.sharding import PartitionSpec as P

from benchmarks.vmf_fit import length_of
from models import vmf
from models.vmf import Mixture, VonMisesFisher

pytestmark = pytest.mark.usefixtures("float64")


def directions(seed: int, *shape: int) -> jax.Array:
    y = jax.random.normal(jax.random.key(seed), shape)
    return y / jnp.linalg.norm(y, axis=-1, keepdims=True)


# Dimensions of features of a ResNet-50, at concentrations from spread to dense.
@pytest.mark.parametrize(
    ("p", "kappa"),
    [
        (2048, 512.0),
        (2048, 2048.0),
        (8192, 819.2),
        (8192, 8192.0),
        (32768, 1638.4),
        (32768, 32768.0),
        (32768, 163840.0),
    ],
)
def test_two_newton_steps_are_enough_where_scipy_has_nothing(p, kappa):
    found = float(vmf.concentration(p, jnp.asarray(length_of(p, kappa)), 2))
    assert abs(found / kappa - 1) < 1e-12
    with np.errstate(all="ignore"):
        scaled = scipy.special.ive(p / 2 - 1, kappa)
        assert not scaled > 1e-100  # an underflow, or what is left of one


@pytest.mark.parametrize("p", [3, 10, 100])
@pytest.mark.parametrize("kappa", [0.3, 7.0, 400.0])
def test_concentration_in_few_dimensions(p, kappa):
    length = jnp.asarray(length_of(p, kappa))
    assert abs(float(vmf.concentration(p, length, 8)) / kappa - 1) < 1e-12
    by_difference = (vmf.concentration(p, length + 1e-6, 8) - vmf.concentration(p, length - 1e-6, 8)) / 2e-6
    slope = jax.grad(functools.partial(vmf.concentration, p))(length)
    np.testing.assert_allclose(slope, by_difference, rtol=1e-4)


@pytest.mark.parametrize(("p", "kappa"), [(3, 2.0), (3, 80.0), (16, 5.0), (64, 300.0)])
def test_density_and_entropy_are_scipys(p, kappa):
    mean, y = directions(1, p), directions(2, 20, p)
    ours, theirs = VonMisesFisher(mean, jnp.asarray(kappa)), scipy.stats.vonmises_fisher(np.asarray(mean), kappa)
    np.testing.assert_allclose(ours.log_prob(y), theirs.logpdf(np.asarray(y)), rtol=1e-10)
    np.testing.assert_allclose(ours.entropy(), theirs.entropy(), rtol=1e-10)
    many = scipy.stats.vonmises_fisher.fit(theirs.rvs(500, random_state=3))
    fitted = vmf.fit(jnp.asarray(theirs.rvs(500, random_state=3)))
    np.testing.assert_allclose(fitted.kappa, many[1], rtol=1e-6)
    np.testing.assert_allclose(fitted.mean, many[0], rtol=1e-8, atol=1e-10)


def test_divergence():
    """Of two on a sphere, by quadrature; and nothing of itself."""
    one = VonMisesFisher(jnp.asarray([0.0, 0.0, 1.0]), jnp.asarray(4.0))
    other = VonMisesFisher(jnp.asarray([0.6, 0.0, 0.8]), jnp.asarray(9.0))
    z, weight = np.polynomial.legendre.leggauss(80)
    angle = np.arange(160) * 2 * math.pi / 160
    r = np.sqrt(1 - z[:, None] ** 2)
    y = np.stack([r * np.cos(angle), r * np.sin(angle), np.broadcast_to(z[:, None], (80, 160))], axis=-1)
    log_p, log_q = (np.asarray(d.log_prob(y)) for d in (one, other))
    expected = np.sum(weight[:, None] * np.exp(log_p) * (log_p - log_q)) * 2 * math.pi / 160
    np.testing.assert_allclose(one.kl(other), expected, rtol=1e-12)
    assert abs(float(one.kl(one))) < 1e-14


@pytest.mark.parametrize(("p", "kappa"), [(3, 1.5), (50, 40.0), (384, 500.0)])
def test_samples(p, kappa):
    """Lengths are 1, their mean has the length and the direction that it should, and what they vary by."""
    truth = VonMisesFisher(directions(4, p), jnp.asarray(kappa))
    y = truth.sample(jax.random.key(5), 20000)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), 1, rtol=1e-12)
    cosine = np.asarray(y @ truth.mean)
    a = length_of(p, kappa)
    variance = 1 - a * a - (p - 1) * a / kappa
    assert abs(cosine.mean() - a) < 5 * math.sqrt(variance / len(y))
    np.testing.assert_allclose(cosine.var(), variance, rtol=0.06)
    np.testing.assert_allclose(vmf.fit(y).kappa, kappa, rtol=0.05)


def test_many_at_once():
    y = jnp.stack(
        [VonMisesFisher(directions(i, 20), jnp.asarray(30.0)).sample(jax.random.key(i), 400) for i in range(3)]
    )
    many = jax.vmap(vmf.fit)(y)
    for i in range(3):
        np.testing.assert_allclose(many.kappa[i], vmf.fit(y[i]).kappa, rtol=1e-12)
    with pytest.raises(ValueError, match=r"y must be \[n, p\], got \(3, 400, 20\); jax.vmap fits many at once"):
        vmf.fit(y)


def clusters(p: int = 32, n: int = 256, k: int = 4) -> tuple[jax.Array, jax.Array]:
    means = directions(6, k, p)
    parts = [VonMisesFisher(means[i], jnp.asarray(60.0 + 20 * i)).sample(jax.random.key(i), n // k) for i in range(k)]
    return jnp.concatenate(parts), means


def test_a_mixture_finds_its_clusters():
    y, means = clusters()
    starts = jnp.stack([vmf.spread(jax.random.key(i), y, 4) for i in range(8)])
    mixtures, likelihoods = jax.vmap(lambda means: vmf.fit_mixture(y, means, rounds=30))(starts)
    assert (np.diff(np.asarray(likelihoods)) > -1e-10).all()
    mixture = jax.tree.map(lambda a: a[jnp.argmax(likelihoods[:, -1])], mixtures)
    found = np.asarray(mixture.component.mean @ means.T)
    assert sorted(found.argmax(1)) == [0, 1, 2, 3]
    assert found.max(1).min() > 0.98
    np.testing.assert_allclose(mixture.weight, 1 / 4, atol=0.05)
    strangers = directions(8, 64, 32)
    assert float(mixture.log_prob(strangers).max()) < float(jnp.quantile(mixture.log_prob(y), 0.05))


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 8)])
def test_eight_devices_are_one(shape):
    """Samples over one axis of the mesh, features over the other."""
    y, _ = clusters()
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    axes = {"data_axis": "data", "feature_axis": "model"}
    of_one = VonMisesFisher(P("model"), P())
    split = jax.jit(
        jax.shard_map(functools.partial(vmf.fit, **axes), mesh=mesh, in_specs=P("data", "model"), out_specs=of_one)
    )
    for found, expected in zip(split(y), vmf.fit(y), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_a_mixture_on_eight_devices_is_that_of_one():
    y, means = clusters()
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    axes = {"data_axis": "data", "feature_axis": "model"}
    mixed = jax.jit(
        jax.shard_map(
            functools.partial(vmf.fit_mixture, rounds=5, **axes),
            mesh=mesh,
            in_specs=(P("data", "model"), P(None, "model")),
            out_specs=(Mixture(VonMisesFisher(P(None, "model"), P()), P()), P()),
        )
    )
    expected = vmf.fit_mixture(y, means, rounds=5)
    for a, b in zip(jax.tree.leaves(mixed(y, means)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
