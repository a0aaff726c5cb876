# SPDX-License-Identifier: Apache-2.0
"""Small models: what has as many tokens, layers and heads as it takes, and random weights without the seconds that
compiling an initializer takes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import Llama, LlamaConfig
from models.layers import RopeScaling

SMALLEST = LlamaConfig(
    vocab_size=61,
    d_model=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=40,
    max_positions=64,
    rope_scaling=RopeScaling("yarn", 2.0, original_max_positions=16),
)
VARIANTS = {
    "window": dataclasses.replace(SMALLEST, sliding_window=5, tie_embeddings=True),
    "qwen": dataclasses.replace(SMALLEST, qk_norm=True, attention_bias=True, attention_output_bias=True),
}


def random_model(config: LlamaConfig, *, scale: float = 1.0, **options) -> Llama:
    """A Llama whose matrices keep the size of what they multiply, times `scale`; norms and biases are random too."""
    options = {"dtype": jnp.float32, "param_dtype": jnp.float32, **options}
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), **options)))
    random = np.random.default_rng(0)

    def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
        normal = random.standard_normal(shape)
        if name == "scale":
            return 1 + 0.1 * normal
        if name == "bias":
            return 0.1 * normal
        return scale * normal / np.sqrt(config.d_model if name == "embedding" else shape[-2])

    filled = [
        (path, leaf.replace(jnp.asarray(value(str(path[-1]), leaf.shape), leaf.dtype)))
        for path, leaf in nnx.to_flat_state(shapes)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))
