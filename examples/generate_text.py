# SPDX-License-Identifier: Apache-2.0
"""Loads SmolLM2 and lets it speak: a batch of raw prompts, then a chat question that streams its answer.

python -m examples.generate_text
"""

import jax.numpy as jnp

from models import generate, load_model

model, tokenizer = load_model("smollm2", dtype=jnp.float32)

prompts = ["The capital of France is", "Water boils at", "def fibonacci(n):"]
for prompt, continuation in zip(prompts, generate(model, tokenizer, prompts, max_new_tokens=24), strict=True):
    print(f"{prompt!r} -> {continuation!r}")

question = tokenizer.apply_chat_template([{"role": "user", "content": "Name three primary colors."}])
generate(
    model,
    tokenizer,
    question,
    48,
    temperature=0.7,
    top_p=0.9,
    seed=1,
    stream=lambda row, text: print(text, end="", flush=True),
)
print()
