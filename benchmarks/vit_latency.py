# SPDX-License-Identifier: Apache-2.0
"""How fast vision transformers are with 2:4 weights, with int8, and with both: one image, and a large batch.

    python -m benchmarks.vit_latency                                    ViT-B/16 and DeiT-S, on the device here
    python -m benchmarks.vit_latency --models=deit_ti16_224 --batches=1 --variants=bfloat16,int8

Each variant is the whole model in one program, on weights that were drawn at random and pruned, checked against the
same computation in float32. `busy` is the time of its kernels, `wall` from the call until the logits are there. Rows go
to benchmarks/results/<device>_vit.csv. On a GPU float32 products are TF32.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import arguments, rows, timing
from benchmarks.rows import VitRow, number
from models.arithmetic import FLOATING, Pair
from models.qat import apply_masks
from models.vit import VIT_PRESETS, ViT, ViTConfig
from models.vit_compress import calibrated, integers, pruning_masks, sparse
from models.vit_inference import Classifier

VARIANTS = ("float32", "bfloat16", "bfloat16_2_4", "int8", "int8_2_4")
CALIBRATION = 4  # images


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    out = options.out or rows.RESULTS / f"{rows.device_name()}_vit.csv"
    for name in options.models:
        prepared = Prepared(VIT_PRESETS[name])
        for variant in options.variants:
            classifier = prepared.classifier(variant)
            for batch in options.batches:
                row = VitRow(model=name, variant=variant, **measure(prepared, classifier, batch))
                print(", ".join(f"{key} {value}" for key, value in dataclasses.asdict(row).items()), flush=True)
                rows.append(out, [row])
    return 0


class Prepared:
    """A model whose blocks are pruned, and what its variants compute with."""

    def __init__(self, config: ViTConfig):
        self.config = config
        self.graphdef, state = nnx.split(ViT(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
        params = nnx.to_pure_dict(state)
        self.params = apply_masks(params, pruning_masks(params, "2:4"))
        random = np.random.default_rng(0)
        size = config.image_size
        self.images = jnp.asarray(random.uniform(-1, 1, (CALIBRATION, size, size, config.channels)), jnp.float32)
        self.expected = np.asarray(Classifier(self.model(jnp.float32))(self.images))

    def model(self, dtype: jnp.dtype) -> ViT:
        """Computing in a type, on parameters in it."""
        graphdef, state = nnx.split(
            nnx.eval_shape(lambda: ViT(self.config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype))
        )
        nnx.replace_by_pure_dict(state, jax.tree.map(lambda x: x.astype(dtype), self.params))
        return nnx.merge(graphdef, state)

    def classifier(self, variant: str) -> Classifier:
        kind = jnp.float32 if variant == "float32" else jnp.bfloat16
        return Classifier(self.model(kind), self._arithmetic(variant))

    def _arithmetic(self, variant: str) -> Pair:
        if variant == "bfloat16_2_4":
            return sparse(self.params, jnp.bfloat16)
        if not variant.startswith("int8"):
            return FLOATING
        fake = calibrated(self.graphdef, self.params, np.asarray(self.images), bits=8)
        return integers(self.params, fake, "2:4" if variant == "int8_2_4" else None, floating_attention=True)


def measure(prepared: Prepared, classifier: Classifier, batch: int) -> dict[str, str]:
    """Medians of a classifier, and its largest error over the largest logit: the other fields of a row."""
    error = np.abs(np.asarray(classifier(prepared.images)) - prepared.expected).max() / np.abs(prepared.expected).max()
    images = jnp.asarray(np.resize(prepared.images, (batch, *prepared.images.shape[1:])))
    arguments = (classifier.arguments, images)
    wall = timing.measure(classifier.program, arguments, method="wall")
    busy = timing.measure(classifier.program, arguments)
    return {
        "batch": str(batch),
        "wall_us": number(1e6 * wall.median),
        "busy_us": number(1e6 * busy.median),
        "images_per_s": number(batch / wall.median),
        "error": f"{error:.4f}",
        "timing": busy.method,
        **rows.environment(),
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", type=arguments.some_of(tuple(VIT_PRESETS)), default=["vit_b16_224", "deit_s16_224"])
    parser.add_argument("--variants", type=arguments.some_of(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--batches", type=arguments.integers, default=[1, 256])
    parser.add_argument("--out", type=Path, help="CSV file; default: benchmarks/results/<device>_vit.csv")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
