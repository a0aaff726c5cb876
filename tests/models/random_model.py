# SPDX-License-Identifier: Apache-2.0
"""Random models without the seconds that compiling an initializer takes."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import Llama, LlamaConfig


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
