# SPDX-License-Identifier: Apache-2.0
"""The committed reference values, and what an implementation must make of them."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import bessel_ratio_i, bessel_ratio_k, log_iv, log_kv
from tests.log_bessel import make_golden

GOLDEN = np.load(Path(__file__).parent / "golden.npz")
V, X = GOLDEN["v"], GOLDEN["x"]
FUNCTIONS = {"i": (log_iv, bessel_ratio_i, 1), "k": (log_kv, bessel_ratio_k, -1)}
Points = slice | np.ndarray
EVERY: Points = slice(None)


def assert_double_precision(name: str, implementation: str, points: Points = EVERY) -> None:
    log, ratio, _ = FUNCTIONS[name]
    v, x, expected = V[points], X[points], GOLDEN[f"{name}_log"][points]
    error = np.abs(np.asarray(log(v, x, implementation=implementation)) - expected - GOLDEN[f"{name}_left"][points])
    mixed = error / np.maximum(1, np.abs(expected))
    # Without the conditioning of the arguments, also where the logarithm is near 0.
    assert mixed.max() <= 1e-14
    found = np.asarray(ratio(v, x, implementation=implementation))
    assert np.abs(found / GOLDEN[f"{name}_ratio"][points] - 1).max() <= 4e-15


def assert_single_precision(name: str, implementation: str, kind=jnp.float32, points: Points = EVERY) -> None:
    """bfloat16 goes in, and is computed in float32. The truth is that of the rounded arguments, in double precision."""
    log, ratio, _ = FUNCTIONS[name]
    v, x = jnp.asarray(V[points], kind), jnp.asarray(X[points], kind)
    wide = v.astype(jnp.float64), x.astype(jnp.float64)
    found = log(v, x, implementation=implementation)
    assert found.dtype == jnp.float32
    exact = np.asarray(log(*wide, implementation="reference"))
    mixed = np.abs(np.asarray(found) - exact) / np.maximum(1, np.abs(exact))
    kappa = make_golden.condition({key: GOLDEN[key][points] for key in GOLDEN}, name)
    assert (mixed <= 1e-6 + 4 * np.finfo(np.float32).eps * kappa).all()
    exact = np.asarray(ratio(*wide, implementation="reference"))
    assert np.abs(np.asarray(ratio(v, x, implementation=implementation)) / exact - 1).max() <= 1.5e-6


def assert_gradients(name: str, implementation: str, points: Points = EVERY) -> None:
    log = functools.partial(FUNCTIONS[name][0], implementation=implementation)
    v, x = V[points], X[points]
    of_v, of_x = jax.jit(jax.vmap(jax.grad(log, (0, 1))))(v, x)
    by_x = make_golden.by_x({key: GOLDEN[key][points] for key in GOLDEN}, name)
    assert np.abs(np.asarray(of_x) / by_x - 1).max() <= 1e-12
    expected, zero = GOLDEN[f"{name}_by_v"][points], v == 0
    assert np.abs(np.asarray(of_v)[~zero] / expected[~zero] - 1).max() <= 1e-9
    np.testing.assert_allclose(np.asarray(of_v)[zero], expected[zero], atol=1e-14)
