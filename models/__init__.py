# SPDX-License-Identifier: Apache-2.0
"""Models composed of the suite's functions, and what is needed to load, run and save them."""

from models.batcher import ContinuousBatcher, Request
from models.cache import KVCache
from models.checkpoint import CheckpointError, load_model, save_checkpoint
from models.decoder import Decoder
from models.generate import Generator, generate
from models.llama import Llama, LlamaConfig
from models.presets import PRESETS, preset
from models.sampling import Sampling
from models.tokenizer import Tokenizer
from models.vit import VIT_PRESETS, ViT, ViTConfig, load_vit

__all__ = [
    "PRESETS",
    "VIT_PRESETS",
    "CheckpointError",
    "ContinuousBatcher",
    "Decoder",
    "Generator",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "Request",
    "Sampling",
    "Tokenizer",
    "ViT",
    "ViTConfig",
    "generate",
    "load_model",
    "load_vit",
    "preset",
    "save_checkpoint",
]
