# SPDX-License-Identifier: Apache-2.0
"""Fits von Mises-Fisher distributions in many dimensions: how right two Newton steps are, and how long fits take.

    python -m benchmarks.vmf_fit                          markdown tables, some minutes on a CPU
    python -m benchmarks.vmf_fit --parts=concentration    without features

Features are those of 5000 MNIST digits, 28 x 28: random projections to 2048, 8192 and 32768 dimensions, rectified (no
package has a network trained on photographs), and of verses of the Bible, embedded by all-MiniLM-L6-v2 in 384.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import scipy.special

from benchmarks import timing
from benchmarks.arguments import some_of
from models import vmf
from models.bert import SentenceEncoder
from models.data import kjv_chapters
from models.images import load_images
from pallas_kernels.core import device

DIMENSIONS = (2048, 8192, 32768)
VERSES = 2048


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", type=some_of(list(PARTS)), default=list(PARTS))
    options = parser.parse_args(argv)
    print(f"{device.current()}, jax {jax.__version__}, float64\n")
    with jax.enable_x64(True):
        for part in options.parts:
            PARTS[part]()
    return 0


def concentrations() -> None:
    """Relative errors of kappa, of the length that it has at 40 digits."""
    print("| p | kappa | length | Banerjee | one step | two steps | four | SciPy's I of order p/2-1 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for p in DIMENSIONS:
        for kappa in (p / 20, p / 4, float(p), 5.0 * p):
            length = length_of(p, kappa)
            errors = [abs(float(vmf.concentration(p, jnp.asarray(length), n)) / kappa - 1) for n in (0, 1, 2, 4)]
            with np.errstate(all="ignore"):
                scaled = float(scipy.special.ive(p / 2 - 1, kappa))
            row = [f"{error:.1e}" for error in errors]
            print(f"| {p} | {kappa:g} | {length:.4f} | {' | '.join(row)} | {scaled:.1e} |", flush=True)
    print()


def features() -> None:
    print("| features | n | p | length of the mean | kappa | log likelihood | fit, ms | of it solving, ms |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, y in every_feature():
        fitted, seconds = jax.jit(vmf.fit)(y), timing.measure(vmf.fit, [y], method="wall").median
        length = jnp.linalg.norm(jnp.mean(y, axis=0))
        p = y.shape[1]
        solving = timing.measure(functools.partial(vmf.concentration, p), [length], method="wall").median
        likelihood = float(jnp.mean(fitted.log_prob(y)))
        figures = f"{float(length):.4f} | {float(fitted.kappa):.2f} | {likelihood:.2f}"
        print(f"| {name} | {len(y)} | {p} | {figures} | {1e3 * seconds:.2f} | {1e3 * solving:.3f} |", flush=True)


def every_feature() -> Any:
    pixels = load_images("mnist_5k").pixels.reshape(5000, -1).astype(np.float64) / 255
    for p in DIMENSIONS:
        projection = np.random.default_rng(0).standard_normal((pixels.shape[1], p))
        y = np.maximum(pixels @ projection, 0)
        yield "digits, rectified random projections", jnp.asarray(y / np.linalg.norm(y, axis=1, keepdims=True))
    verses = "\n".join(kjv_chapters()).split("\n")[:: 24408 // VERSES][:VERSES]
    embedded = SentenceEncoder.load("minilm").embed(verses).astype(np.float64)
    yield "verses, all-MiniLM-L6-v2", jnp.asarray(embedded / np.linalg.norm(embedded, axis=1, keepdims=True))


def length_of(p: int, kappa: float) -> float:
    """I_{p/2}(kappa) / I_{p/2-1}(kappa) by Gauss's continued fraction, from where its rest is nearly known."""
    with mpmath.workdps(40):
        v, x, depth = mpmath.mpf(p) / 2 - 1, mpmath.mpf(kappa), 4000
        ratio = x / (v + depth + mpmath.mpf(1) / 2 + mpmath.sqrt((v + depth + mpmath.mpf(3) / 2) ** 2 + x * x))
        for k in range(depth, 0, -1):
            ratio = x / (2 * (v + k) + x * ratio)
        return float(ratio)


PARTS = {"concentration": concentrations, "features": features}

if __name__ == "__main__":
    sys.exit(main())
