# SPDX-License-Identifier: Apache-2.0
"""Named model shapes. `tiny` and `small` have a byte-level vocabulary (Tokenizer.bytes()) and are meant to be
trained from scratch; the others are the shapes of published models."""

from __future__ import annotations

import difflib

from models.layers import RopeScaling
from models.llama import LlamaConfig

# 256 bytes and 3 special tokens, padded to a multiple of 64 so that the logits tile well.
_BYTE_VOCABULARY = 320

PRESETS: dict[str, LlamaConfig] = {
    # 1.0 million parameters: seconds to train on a CPU.
    "tiny": LlamaConfig(
        vocab_size=_BYTE_VOCABULARY,
        d_model=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        d_ff=512,
        max_positions=2048,
        tie_embeddings=True,
    ),
    # 30 million parameters: minutes to hours on one GPU.
    "small": LlamaConfig(
        vocab_size=_BYTE_VOCABULARY,
        d_model=512,
        num_layers=10,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        d_ff=1408,
        max_positions=4096,
        tie_embeddings=True,
    ),
    "smollm2_135m": LlamaConfig(
        vocab_size=49_152,
        d_model=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        d_ff=1536,
        max_positions=8192,
        rope_theta=100_000.0,
        tie_embeddings=True,
    ),
    "qwen3_0_6b": LlamaConfig(
        vocab_size=151_936,
        d_model=1024,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        d_ff=3072,
        max_positions=40_960,
        rope_theta=1_000_000.0,
        norm_eps=1e-6,
        qk_norm=True,
        tie_embeddings=True,
    ),
    # Llama-3.2-1B.
    "llama_1b": LlamaConfig(
        vocab_size=128_256,
        d_model=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        d_ff=8192,
        max_positions=131_072,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling("llama3", factor=32.0, original_max_positions=8192),
        tie_embeddings=True,
    ),
    "llama2_7b": LlamaConfig(
        vocab_size=32_000,
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        d_ff=11_008,
        max_positions=4096,
    ),
    # Mistral-7B-v0.1, the release with a sliding window.
    "mistral_7b": LlamaConfig(
        vocab_size=32_000,
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        d_ff=14_336,
        max_positions=32_768,
        sliding_window=4096,
    ),
    "llama3_8b": LlamaConfig(
        vocab_size=128_256,
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        d_ff=14_336,
        max_positions=8192,
        rope_theta=500_000.0,
    ),
}


def preset(name: str) -> LlamaConfig:
    """The configuration of that name; ValueError with the nearest names if there is none."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"unknown preset {name!r}; {hint}known presets: {', '.join(PRESETS)}")
