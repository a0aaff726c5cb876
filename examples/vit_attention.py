# SPDX-License-Identifier: Apache-2.0
"""Draws where a vision transformer looks before and after it was compressed.

    python train.py --task=vit --stage=dense --out=runs/dense
    python train.py --task=vit --stage=prune --start=runs/dense --out=runs/pruned
    python train.py --task=vit --stage=quantize --start=runs/pruned --out=runs/int8
    python examples/vit_attention.py runs/int8 attention.png

A row is a digit that training did not see: itself, and the attention of the class token in the last block, mean over
heads, of the dense model, of the compressed one, and their difference.
"""

import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from models.arithmetic import FLOATING, Pair
from models.images import load_images, normalized
from models.vit import ViT, ViTConfig
from models.vit_stages import Run

IMAGES = 5


def attention(config: ViTConfig, params: dict, arithmetic: Pair, pixels: np.ndarray) -> np.ndarray:
    """[B, S, S]: shares of patches in the class token's attention, of the last block."""
    graphdef = nnx.split(nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0), dtype=jnp.float32)))[0]
    seen, _ = nnx.merge(graphdef, params).observed(jnp.asarray(pixels), arithmetic)
    side = config.image_size // config.patch_size
    return np.asarray(seen["p"][-1].mean(1)[:, 0, config.extra_tokens :]).reshape(-1, side, side)


def main(argv: Sequence[str]) -> None:
    folder, file = argv
    run = Run.load(folder)
    test = load_images("mnist_5k").split(per_class=100, seed=0)[1].resized(run.config.image_size)
    chosen = np.arange(0, len(test), len(test) // IMAGES)[:IMAGES]
    pixels = normalized(test.pixels[chosen])
    params, dense, arithmetic = jax.tree.map(lambda x: x[0], (run.params, run.dense, run.arithmetic()))
    before = attention(run.config, dense, FLOATING, pixels)
    after = attention(run.config, params, arithmetic, pixels)

    figure = Figure(figsize=(8, 2 * IMAGES), layout="constrained")
    axes = figure.subplots(IMAGES, 4, squeeze=False)
    for row, image, *maps in zip(axes, test.pixels[chosen, ..., 0], before, after, after - before, strict=True):
        row[0].imshow(image, cmap="gray")
        for place, shares in zip(row[1:3], maps[:2], strict=True):
            place.imshow(shares, vmin=0, vmax=before.max())
        row[3].imshow(maps[2], cmap="coolwarm", vmin=-before.max(), vmax=before.max())
    kind = f"{run.pattern or 'dense'}, {run.bits or 32} bits"
    for place, title in zip(axes[0], ("image", "dense", kind, "difference"), strict=True):
        place.set_title(title)
    for place in axes.flat:
        place.set_axis_off()
    figure.savefig(file, dpi=120)
    print(f"Wrote {file}; the largest difference of a share is {np.abs(after - before).max():.4f}.")


if __name__ == "__main__":
    main(sys.argv[1:])
