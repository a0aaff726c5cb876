# SPDX-License-Identifier: Apache-2.0
"""Activations, and what kernels make of them, against SciPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from pallas_kernels.core.activations import ACTIVATIONS, activate_parts

Z = np.concatenate([np.linspace(-30, 30, 20001), [0.0, 1e-30, -1e-30, 1e4, -1e4]])
BY_SCIPY = {
    None: lambda z: z,
    "silu": lambda z: z * scipy.special.expit(z),
    "gelu": lambda z: z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    "gelu_exact": lambda z: z * scipy.special.ndtr(z),
}


@pytest.mark.parametrize("name", BY_SCIPY)
def test_activations_are_what_they_are_called(name):
    z = Z.astype(np.float32)
    expected = BY_SCIPY[name](z.astype(np.float64))
    for found in (ACTIVATIONS[name](jnp.asarray(z)), activate_parts([jnp.asarray(z)], name)):
        error = np.abs(np.asarray(found, np.float64) - expected) / np.maximum(np.abs(z), 1e-30)
        assert error.max() < 3e-7
