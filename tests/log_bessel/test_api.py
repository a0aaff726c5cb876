# SPDX-License-Identifier: Apache-2.0
"""log_iv, log_kv and the ratios against the reference values (make_golden.py), identities, and the table of edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import PartitionSpec as P

from pallas_kernels import UnsupportedError, bessel_ratio_i, bessel_ratio_k, explain, log_iv, log_kv
from pallas_kernels.log_bessel import xla
from tests.log_bessel import make_golden
from tests.log_bessel.accuracy import (
    FUNCTIONS,
    GOLDEN,
    V,
    X,
    assert_double_precision,
    assert_gradients,
    assert_single_precision,
)

pytestmark = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.fixture(autouse=True)
def doubles():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_double_precision(name, implementation):
    assert_double_precision(name, implementation)


@pytest.mark.parametrize("kind", [jnp.float32, jnp.bfloat16])
def test_single_precision(name, kind):
    assert_single_precision(name, "xla", kind)


def test_first_derivatives(name):
    assert_gradients(name, "xla")


def test_more_elements_than_a_block(name):
    """A CPU goes through them block by block; the last is not whole."""
    v, x = (np.resize(a, 2 * xla.BLOCK + 5) for a in (V, X))
    np.testing.assert_allclose(FUNCTIONS[name][0](v, x), np.resize(FUNCTIONS[name][0](V, X), len(v)), rtol=1e-14)


def test_identities(name):
    """Wronskian and recurrence, where orders and arguments are largest."""
    v, x = np.meshgrid(np.logspace(-2, 6, 40), np.logspace(-8, 6, 40))
    log, ratio, sign = FUNCTIONS[name]
    wronskian = np.asarray(
        log_iv(v, x) + log_kv(v, x) + jnp.log(x) + jnp.log(bessel_ratio_i(v, x) + bessel_ratio_k(v, x))
    )
    assert (np.abs(wronskian) <= 1e-14 * (1 + np.abs(log(v, x)))).all()
    # I_v - I_{v+2} = 2 (v+1)/x I_{v+1}, K_{v+2} - K_v the same of K: of positive terms.
    one, two = (np.asarray(ratio(v + i, x)) for i in range(2))
    term = 2 * (v + 1) / x
    left, right = (1 / one, two + term) if sign > 0 else (two, 1 / one + term)
    np.testing.assert_allclose(left, right, rtol=3e-14)
    # Between two orders only the ratio lies.
    close = np.asarray(log(v + 1, x)) - np.asarray(log(v, x)) - np.log(one)
    assert (np.abs(close) <= 1e-14 * (1 + np.abs(log(v, x)))).all()


def test_arguments_that_are_tiny(name):
    log, ratio, _ = FUNCTIONS[name]
    exact = {"i": make_golden.of_i, "k": make_golden.of_k}[name]
    for v in (0.0, 1e-9, 1e-4, 0.009, 0.3, 0.95, 2.5, 30.0):
        for x in (9e-9, 1e-20, 1e-300):
            wanted = exact(v, x)
            error = abs(float(log(v, x)) - float(wanted.log))
            assert error <= 5e-15 * max(1, abs(float(wanted.log))), (v, x)
            if wanted.ratio < 1e300:
                assert abs(float(ratio(v, x)) / float(wanted.ratio) - 1) <= 1e-12, (v, x)


def test_edges(name):
    log, ratio, _ = FUNCTIONS[name]
    nan, inf = np.nan, np.inf
    table = {  # (v, x): log I, log K, ratio of I, ratio of K
        (0.0, 0.0): (0, inf, 0, inf),
        (2.5, 0.0): (-inf, inf, 0, inf),
        (1.0, -1.0): (nan, nan, nan, nan),
        (-0.5, 1.0): (nan, float(np.log(scipy.special.kv(0.5, 1.0))), nan, nan),
        (-3.0, 2.0): (float(np.log(scipy.special.iv(3, 2.0))), float(np.log(scipy.special.kv(3, 2.0))), nan, nan),
        (nan, 1.0): (nan, nan, nan, nan),
        (1.0, nan): (nan, nan, nan, nan),
        (1.0, inf): (inf, -inf, 1, 1),
        (inf, 1.0): (-inf, inf, 0, inf),
        (inf, inf): (nan, nan, nan, nan),
    }
    place = list(FUNCTIONS).index(name)
    v, x = np.array(list(table)).T
    np.testing.assert_allclose(log(v, x), [row[place] for row in table.values()], rtol=1e-14)
    np.testing.assert_allclose(ratio(v, x), [row[2 + place] for row in table.values()], rtol=1e-14)


def test_orders_that_are_known_are_the_same_and_less_work(name):
    log, _, _ = FUNCTIONS[name]
    x = jnp.asarray([0.0, 1e-8, 3.0, 1e5])
    for v in (0, 5.5, 1023.0):
        np.testing.assert_array_equal(log(v, x), log(jnp.full(4, float(v)), x))
    known = jax.jit(functools.partial(log, 1023.0)).lower(x).as_text()
    assert len(known) < 0.8 * len(jax.jit(log).lower(x, x).as_text())


def test_the_published_method(name):
    """As accurate as it was measured to be in double precision: Rothwell's integral 6.1e-10, the rest 6.8e-13."""
    log, ratio, _ = FUNCTIONS[name]
    exact = GOLDEN[f"{name}_log"]
    mixed = np.abs(np.asarray(log(V, X, mode="paper")) - exact) / np.maximum(1, np.abs(exact))
    mixed = mixed - 8 * np.finfo(float).eps * make_golden.condition(GOLDEN, name)  # near logarithms that are 0
    fallback = (V < 12.7) & (X < 30)
    assert mixed[~fallback].max() < 1e-12
    assert mixed[fallback].max() < (2e-14 if name == "i" else 7e-10)
    if name == "k":
        assert mixed[fallback].max() > 1e-10  # it is not ours under another name
    assert np.isfinite(ratio(V, X, mode="paper")).all()
    # By SciPy's own functions, where they are finite and no expression of ours is used.
    v, x = np.array([0.0, 2.0, 20.0, 60.0]), np.array([1.0, 12.0, 70.0, 200.0])
    scaled = scipy.special.ive(v, x) if name == "i" else scipy.special.kve(v, x)
    expected = np.log(scaled) + (x if name == "i" else -x)
    np.testing.assert_allclose(log(v, x, mode="paper"), expected, rtol=1e-9)
    gradients = [jax.vmap(jax.grad(functools.partial(log, mode=mode), 1))(v, x) for mode in ("paper", "accurate")]
    np.testing.assert_allclose(*gradients, rtol=1e-6)
    with pytest.raises(ValueError, match=r'mode must be "accurate" or "paper", got \'fast\''):
        log(1.0, 1.0, mode="fast")


def test_transformations(name):
    log, ratio, _ = FUNCTIONS[name]
    v, x = np.array([0.0, 3.0, 40.0]), np.array([0.5, 8.0])
    expected = log(v[:, None], x)
    assert expected.shape == (3, 2)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.vmap(log, (None, 0)), (0, None)))(v, x), expected, rtol=1e-15)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(log, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    np.testing.assert_array_equal(split(3.0, jnp.asarray(x)), log(3.0, x))
    assert log(np.ones((0, 1)), x).shape == (0, 2)
    gradient = jax.grad(lambda x: ratio(v[:, None], x).sum())(x)
    assert np.isfinite(gradient).all()


def test_bad_arguments_are_named(name):
    log, _, _ = FUNCTIONS[name]
    with pytest.raises(TypeError, match=rf"log_{name}v: x must be real numbers, got complex128"):
        log(1.0, np.array(1j))
    with pytest.raises(TypeError, match=rf"log_{name}v: v must be real numbers, got bool"):
        log(np.array(True), 1.0)
    with pytest.raises(ValueError, match="Incompatible shapes"):
        log(np.ones(3), np.ones(2))
    with pytest.raises(UnsupportedError, match="it is for NVIDIA GPUs of Ampere, Ada and Hopper, and this is cpu"):
        log(1.0, 1.0, implementation="mosaic_gpu")
    assert "xla" in str(explain(log, 1.0, 1.0))
