# SPDX-License-Identifier: Apache-2.0
"""Sorts verses of the Bible by what they are about, and finds what is none: a mixture of directions.

    python examples/cluster_verses.py clusters.png [verses, default 4096]

Sentences become unit vectors in 384 dimensions (all-MiniLM-L6-v2). A mixture of von Mises-Fisher distributions is
fitted; each component's most typical verses are printed. Left in the picture, the verses on the two axes along which
they vary most, in the color of their component; right, the log densities of verses that were fitted, of some that were
held back, and of the docstrings of jax.numpy: what is like no verse has a low one.
"""

import inspect
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from models import vmf
from models.bert import SentenceEncoder
from models.data import kjv_chapters

COMPONENTS, ROUNDS, STARTS = 10, 60, 4


def docstrings() -> list[str]:
    """First lines of what jnp's functions say of themselves."""
    functions = (value for _, value in sorted(vars(jnp).items()) if callable(value))
    lines = ((inspect.getdoc(function) or "").split("\n")[0] for function in functions)
    return [line for line in lines if len(line) > 20]


def main(argv: Sequence[str]) -> None:
    file, count = argv[0], int(argv[1]) if len(argv) > 1 else 4096
    jax.config.update("jax_enable_x64", True)
    encoder = SentenceEncoder.load("minilm")
    every = [verse for chapter in kjv_chapters() for verse in chapter.split("\n") if len(verse) > 40]
    chosen = [every[i] for i in np.random.default_rng(0).permutation(len(every))[: count + count // 4]]
    fitted, held_back, others = (
        jnp.asarray(encoder.embed(sentences, progress=True), jnp.float64)
        for sentences in (chosen[:count], chosen[count:], docstrings())
    )

    # The best of several starts: a likelihood has many maxima.
    starts = jnp.stack([vmf.spread(jax.random.key(i), fitted, COMPONENTS) for i in range(STARTS)])
    fits = jax.jit(jax.vmap(lambda means: vmf.fit_mixture(fitted, means, rounds=ROUNDS)))(starts)
    best = jnp.argmax(fits[1][:, -1])
    mixture: vmf.Mixture = jax.tree.map(lambda a: a[best], fits[0])
    share = jax.nn.softmax(mixture.log_joint(fitted), axis=-1)
    for i in np.argsort(-np.asarray(mixture.weight)):
        print(f"\n{mixture.weight[i]:.0%} of the verses, kappa {mixture.component.kappa[i]:.0f}")
        typical = np.argsort(-np.asarray(share[:, i] * (fitted @ mixture.component.mean[i])))[:3]
        print("".join(f"  {chosen[row][:110]}\n" for row in typical), end="")

    scores = [np.asarray(mixture.log_prob(y)) for y in (fitted, held_back, others)]
    limit = np.quantile(scores[1], 0.05)
    found = np.mean(scores[2] < limit)
    print(f"\nOf docstrings {found:.1%} are less likely than 95 % of the verses held back.")

    figure = Figure(figsize=(12, 5), layout="constrained")
    places, densities = figure.subplots(1, 2)
    centered = fitted - fitted.mean(0)
    axes = jnp.linalg.svd(centered, full_matrices=False)[2][:2]
    places.scatter(*(centered @ axes.T).T, c=np.asarray(share.argmax(1)), cmap="tab10", s=4)
    places.set(title=f"{count} verses, {COMPONENTS} components", xlabel="first axis", ylabel="second axis")
    for score, label in zip(scores, ("verses, fitted", "verses, held back", "docstrings"), strict=True):
        densities.hist(score, bins=60, density=True, alpha=0.6, label=label)
    densities.axvline(limit, color="black", linewidth=1)
    densities.set(title=f"{found:.0%} of docstrings are found at 5 % of verses", xlabel="log density", ylabel="share")
    densities.legend()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
