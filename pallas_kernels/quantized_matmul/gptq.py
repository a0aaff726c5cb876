# SPDX-License-Identifier: Apache-2.0
"""Rounding that compensates errors: inputs in order, the error of each passed on to those that are still to be rounded.

Letters: K inputs, N outputs, x the inputs that are typical, H = x^T x with damping. What counts is the output's squared
error, (w - w^)^T H (w - w^) for each output. Once input k is rounded, the inputs after it do best to change by

    w[j] -= (w[k] - w^[k]) / U[k, k] * U[k, j]        j > k        U upper triangular, U^T U = H^-1

which holds for each k in turn with one U, since its last rows are those of the inverse of the last rows of H. All
outputs go together. Inputs are taken in blocks: within a block each error is passed on at once, and to all that come
after the block as one product, when it is done:

    rest [K, N]     | rounded | block of inputs | ... still to be rounded ... |
                                errors [b, N]  --->  rest -= U[block]^T errors

The grid of a group is fitted when its turn comes, to what its weights have become.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022,
sections 3 and 4; here without its order by sensitivity, for strips must stay together.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.quantized_matmul.fit import Fit

DAMPING = 0.01  # of the mean diagonal of x^T x, added to all of it
BLOCK = 64  # inputs, at most


def damped(hessian: np.ndarray) -> np.ndarray:
    """float64 [K, K]: x^T x over its mean diagonal, plus `DAMPING`. An input that was always 0 has nothing but the
    damping, so that it is rounded by itself; if all were, so are all."""
    identity = np.eye(len(hessian))
    mean = np.trace(hessian) / len(hessian)
    return hessian / mean + DAMPING * identity if mean > 0 else identity


def factor(hessian: np.ndarray) -> np.ndarray:
    """U of `damped(hessian)`, float64 [K, K].

    H = R R^T with R upper triangular is the Cholesky factorization from the other end; U = R^-1.

    Raises:
      ValueError: the matrix has a negative eigenvalue, which no sum of x^T x has.
    """
    try:
        R = np.linalg.cholesky(damped(hessian)[::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError:
        raise ValueError("quantize: hessian must be a sum of x^T x; it has negative eigenvalues.") from None
    return np.triu(np.linalg.inv(R))


def compensated(w: jax.Array, special: Any, fit: Fit, hessian: np.ndarray) -> tuple[jax.Array, Any]:
    """What `fit.plainly` returns, for w [groups, inputs, N'], rounded as above with the Hessian [K, K] of the first K
    inputs; others are padding."""
    K = w.shape[0] * w.shape[1]
    padded = np.eye(K)
    padded[: len(hessian), : len(hessian)] = factor(hessian)
    return _in_order(w, special, jnp.asarray(padded, jnp.float32), fit)


@functools.partial(jax.jit, static_argnames="fit")
def _in_order(w: jax.Array, special: Any, U: jax.Array, fit: Fit) -> tuple[jax.Array, Any]:
    groups, inputs, N = w.shape
    size = math.gcd(inputs, BLOCK)

    def one_group(rest: jax.Array, group: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        first, special = group
        grid, stored = fit(lax.dynamic_slice_in_dim(rest, first, inputs), special)

        def one_block(rest: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
            rows = lax.dynamic_slice_in_dim(U, start, size)  # [b, K], 0 before the diagonal
            within = lax.dynamic_slice_in_dim(rows, start, size, 1)

            def one_input(block: jax.Array, i: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
                codes = grid.encode(block[i])
                error = (block[i] - grid.decode(codes)) / within[i, i]
                return block - within[i][:, None] * error, (codes.astype(jnp.uint8), error)

            block = lax.dynamic_slice_in_dim(rest, start, size)
            _, (codes, errors) = lax.scan(one_input, block, jnp.arange(size))
            return rest - jnp.matmul(rows.T, errors, precision=lax.Precision.HIGHEST), codes

        rest, codes = lax.scan(one_block, rest, first + jnp.arange(0, inputs, size))
        return rest, (codes.reshape(inputs, N), stored)

    starts = jnp.arange(groups) * inputs
    return lax.scan(one_group, w.reshape(-1, N), (starts, special))[1]
