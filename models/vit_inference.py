# SPDX-License-Identifier: Apache-2.0
"""A vision transformer made ready to classify, in one program: matrices of layers apart, so that none is copied out of
a stack; what is small stays stacked, as each array that a program is given costs its caller microseconds.

classify = Classifier(model)                                        as it is
classify = Classifier(*load_compressed_vit("runs/int8/export"))     integers
classify(images)                                                    float32 logits [B, classes]
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from models.arithmetic import FLOATING, Pair
from models.vit import ViT

_SMALL = 16384  # elements of a layer that may be copied


class Classifier:
    """Calls a model; compiled once for each size of a batch.

    Attributes:
      arguments: what the program reads: the rest of the model, arrays of its layers, and arithmetic of its ends.
    """

    def __init__(self, model: ViT, arithmetic: Pair = FLOATING):
        self._block, stacked = nnx.split(model.blocks)
        self._graphdef, rest = nnx.split(model)
        rest["blocks"] = jax.tree.map(lambda x: x[:0], stacked)  # those of `layers`; nothing is held twice
        leaves, self._structure = jax.tree.flatten((stacked, arithmetic.blocks))
        layers = [list(x) if x.size > _SMALL * len(x) else x for x in leaves]
        self.arguments = (rest, layers, arithmetic.ends)
        # A program within the program: layers are alike, and lowered once.
        self._run_block = jax.jit(lambda layer, x: nnx.merge(self._block, layer[0])(x, layer[1]))
        self.program = jax.jit(self._classify)

    def __call__(self, images: jax.Array) -> jax.Array:
        """float32 logits of images [B, I, I, C], normalized."""
        return self.program(self.arguments, images)

    def _classify(self, arguments: Any, images: jax.Array) -> jax.Array:
        rest, layers, ends = arguments
        model = nnx.merge(self._graphdef, rest)
        x = model.embed(images, ends)
        for leaves in zip(*layers, strict=True):
            x = self._run_block(jax.tree.unflatten(self._structure, leaves), x)
        return model.logits(model.final_norm(x), ends)
