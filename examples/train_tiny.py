# SPDX-License-Identifier: Apache-2.0
"""Trains a tiny language model with the Python API in about a minute on a CPU: python examples/train_tiny.py"""

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from models.data import PackedRows, batches, evaluation_batches, load_documents
from models.llama import Llama
from models.presets import preset
from models.tokenizer import Tokenizer
from models.training import (
    initial_state,
    make_evaluate,
    make_optimizer,
    make_schedule,
    make_train_step,
    microbatches,
)

DATA = Path(__file__).parents[1] / "data" / "genesis.txt"


def main(steps: int = 100, batch_size: int = 8, seq_len: int = 128) -> float:
    """Returns the perplexity per byte of text that the model was not trained on."""
    config, tokenizer = preset("tiny"), Tokenizer.bytes()
    train, evaluation = load_documents(DATA, tokenizer, vocab_size=config.vocab_size).split(0.1)
    assert evaluation is not None
    data = batches(PackedRows(train, seq_len), batch_size, seed=0)

    optimizer = make_optimizer("adamw", make_schedule("cosine", 3e-3, steps, warmup=steps // 10))
    graphdef, state = initial_state(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=jnp.float32), optimizer)
    train_step = make_train_step(graphdef, optimizer)
    with tqdm(total=steps) as progress:
        for _ in range(steps):
            # One microbatch; more of them would save memory.
            state, metrics = train_step(state, microbatches(next(data), 1))
            progress.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
            progress.update()

    held_out = evaluation_batches(PackedRows(evaluation, seq_len), batch_size)
    perplexity = float(jnp.exp(make_evaluate(graphdef)(state.params, map(jax.device_put, held_out))))
    print(f"perplexity {perplexity:.2f} per byte")
    return perplexity


if __name__ == "__main__":
    main()
