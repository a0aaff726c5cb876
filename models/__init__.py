# SPDX-License-Identifier: Apache-2.0
"""Models composed of the suite's functions, and what is needed to load, run and save them."""

from models.checkpoint import CheckpointError, load_model, save_checkpoint
from models.generate import generate
from models.llama import KVCache, Llama, LlamaConfig
from models.presets import PRESETS, preset
from models.tokenizer import Tokenizer

__all__ = [
    "PRESETS",
    "CheckpointError",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "Tokenizer",
    "generate",
    "load_model",
    "preset",
    "save_checkpoint",
]
