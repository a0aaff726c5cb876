# SPDX-License-Identifier: Apache-2.0
"""GGUF files (llama.cpp's format): metadata to LlamaConfig and Tokenizer, tensors dequantized under their
Hugging Face names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from tokenizers import pre_tokenizers

from models.hf_config import CheckpointError
from models.layers import RopeScaling, rope_frequencies
from models.llama import LlamaConfig
from models.tokenizer import Tokenizer

SUPPORTED_ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral is stored as llama

_HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"

# How text is cut before byte-pair merging. The patterns are part of each tokenizer's definition.
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


class GgufFile:
    """One GGUF file, opened.

    Attributes:
      config: the architecture.
      path: the file.
    """

    def __init__(self, path: str | Path):
        """Reads all metadata; tensors are read when asked for.

        Raises:
          CheckpointError: not a GGUF file, truncated, or not a supported architecture.
        """
        self.path = Path(path)
        self._reader = _open(self.path)
        architecture = self._metadata("general.architecture")
        if architecture not in SUPPORTED_ARCHITECTURES:
            supported = ", ".join(SUPPORTED_ARCHITECTURES)
            raise CheckpointError(f"{self.path}: unsupported architecture {architecture!r}; supported: {supported}")
        self._architecture: str = architecture
        tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        factors = tensors.pop(_ROPE_FACTORS, None)
        self._tensors = {_hf_name(name): tensor for name, tensor in tensors.items()}
        self.config = self._read_config(None if factors is None else np.asarray(factors.data, np.float64))

    # --- Tensors --------------------------------------------------------------------------------------------

    def names(self) -> Iterable[str]:
        """Hugging Face names of all tensors; a tensor unknown to them keeps its own name."""
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def where(self, name: str) -> str:
        tensor = self._tensors.get(name)
        return f"{self.path}: tensor {name}" + ("" if tensor is None else f" ({tensor.name})")

    def read(self, name: str) -> np.ndarray:
        """The tensor in float32."""
        tensor = self._tensors[name]
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise CheckpointError(f"{self.where(name)}: quantization {kind} is not supported by gguf") from error
        if self._architecture == "llama" and re.search(r"\.[qk]_proj\.", name):
            # llama.cpp rotates neighboring dimensions: its converter interleaved the two halves of each head.
            heads = self.config.num_heads if ".q_proj." in name else self.config.num_kv_heads
            halves = values.reshape(heads, self.config.head_dim // 2, 2, -1).swapaxes(1, 2)
            values = halves.reshape(values.shape)
        return values

    # --- Configuration --------------------------------------------------------------------------------------

    def _metadata(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _required(self, key: str) -> Any:
        value = self._metadata(key)
        if value is None:
            fix = "convert the model again with a newer llama.cpp"
            raise CheckpointError(f"{self.path}: metadata lacks {key!r}; {fix}")
        return value

    def _read_config(self, rope_factors: np.ndarray | None) -> LlamaConfig:
        prefix = self._architecture + "."
        d_model = self._required(prefix + "embedding_length")
        num_heads = self._required(prefix + "attention.head_count")
        head_dim = self._metadata(prefix + "attention.key_length", d_model // num_heads)
        only = {
            prefix + "attention.value_length": head_dim,
            prefix + "rope.dimension_count": head_dim,
            prefix + "expert_count": 0,
        }
        for key, implemented in only.items():
            value = self._metadata(key, implemented)
            if value != implemented:
                raise CheckpointError(f"{self.path}: {key} = {value} is not supported (only {implemented} here)")
        # Float32 in the file; the shortest decimal that rounds to it is what the author wrote.
        theta = float(str(np.float32(self._metadata(prefix + "rope.freq_base", 10_000.0))))
        max_positions = self._required(prefix + "context_length")
        scaling = self._rope_scaling(max_positions)
        if rope_factors is not None:
            scaling = self._rope_scaling_of_factors(rope_factors, head_dim, theta)
        try:
            return LlamaConfig(
                vocab_size=self.shape("model.embed_tokens.weight")[0],
                d_model=d_model,
                num_layers=self._required(prefix + "block_count"),
                num_heads=num_heads,
                num_kv_heads=self._metadata(prefix + "attention.head_count_kv", num_heads),
                head_dim=head_dim,
                d_ff=self._required(prefix + "feed_forward_length"),
                max_positions=max_positions,
                rope_theta=theta,
                rope_scaling=scaling,
                norm_eps=float(str(np.float32(self._required(prefix + "attention.layer_norm_rms_epsilon")))),
                tie_embeddings="lm_head.weight" not in self._tensors,
                attention_bias="model.layers.0.self_attn.q_proj.bias" in self._tensors,
                attention_output_bias="model.layers.0.self_attn.o_proj.bias" in self._tensors,
                qk_norm="model.layers.0.self_attn.q_norm.weight" in self._tensors,
                sliding_window=self._metadata(prefix + "attention.sliding_window") or None,
            )
        except KeyError as error:
            raise CheckpointError(f"{self.path}: tensor {error} is missing; copy or convert the file again") from error
        except ValueError as error:
            raise CheckpointError(f"{self.path}: impossible configuration: {error}") from error

    def _rope_scaling(self, max_positions: int) -> RopeScaling | None:
        prefix = f"{self._architecture}.rope.scaling."
        kind = self._metadata(prefix + "type", "none")
        if kind == "none":
            return None
        if kind not in ("linear", "yarn"):
            raise CheckpointError(f"{self.path}: unsupported {prefix}type {kind!r}; supported: none, linear, yarn")
        factor = float(self._required(prefix + "factor"))
        if kind == "linear":
            return RopeScaling("linear", factor)
        unsupported = self._metadata(prefix + "yarn_ext_factor", 1.0)
        if unsupported != 1.0:
            raise CheckpointError(f"{self.path}: {prefix}yarn_ext_factor = {unsupported} is not supported (only 1.0)")
        return RopeScaling(
            "yarn",
            factor,
            original_max_positions=self._metadata(prefix + "original_context_length", max_positions),
            beta_fast=self._metadata(prefix + "yarn_beta_fast", 32.0),
            beta_slow=self._metadata(prefix + "yarn_beta_slow", 1.0),
            attention_factor=self._metadata(prefix + "yarn_attn_factor"),
        )

    def _rope_scaling_of_factors(self, factors: np.ndarray, head_dim: int, theta: float) -> RopeScaling:
        """Llama 3.1's scaling, which GGUF stores as the divisor of each frequency (H/2 numbers)."""
        scaling = RopeScaling("llama3", float(factors.max()), original_max_positions=8192)
        plain, _ = rope_frequencies(head_dim, theta)
        scaled, _ = rope_frequencies(head_dim, theta, scaling)
        if factors.shape != plain.shape or not np.allclose(plain / factors, scaled, rtol=1e-4, atol=0):
            raise CheckpointError(
                f"{self.path}: tensor {_ROPE_FACTORS} is not the Llama 3 scaling of an 8192-token context, "
                "and other frequency factors are not supported"
            )
        return scaling

    # --- Tokenizer ------------------------------------------------------------------------------------------

    def tokenizer(self) -> Tokenizer:
        """The tokenizer stored in the metadata.

        Raises:
          CheckpointError: it is not byte-level BPE, or its way of cutting text is not known here.
        """
        model = self._required("tokenizer.ggml.model")
        if model != "gpt2":
            raise CheckpointError(
                f"{self.path}: tokenizer.ggml.model {model!r} is not supported (only 'gpt2', byte-level BPE); "
                "pass tokenizer=Tokenizer.from_folder(...) with the model's tokenizer.json to load_model"
            )
        tokens: list[str] = self._required("tokenizer.ggml.tokens")
        kinds = self._metadata("tokenizer.ggml.token_type", [gguf.TokenType.NORMAL] * len(tokens))
        merges = [tuple(merge.split(" ", 1)) for merge in self._required("tokenizer.ggml.merges")]
        style = self._metadata("tokenizer.ggml.pre", "default")
        vocabulary = {token: id for id, token in enumerate(tokens)}
        try:
            # Llama 3 takes a word that is a token as it is, even where its merges would not arrive there.
            bpe = tokenizers.models.BPE(vocabulary, merges, ignore_merges=style == "llama-bpe")
        except Exception as error:  # tokenizers raises nothing more specific
            raise CheckpointError(
                f"{self.path}: tokenizer.ggml.tokens and merges do not fit together ({error}); "
                "copy or convert the file again"
            ) from error
        backend = tokenizers.Tokenizer(bpe)
        if style == "qwen2":
            backend.normalizer = tokenizers.normalizers.NFC()
        backend.pre_tokenizer = self._pre_tokenizer(style)
        backend.decoder = tokenizers.decoders.ByteLevel()
        added = []
        for token, kind in zip(tokens, kinds, strict=True):
            if kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
                special = kind == gguf.TokenType.CONTROL
                added.append(tokenizers.AddedToken(token, special=special, normalized=False))
        backend.add_tokens(added)
        ends = (self._metadata(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom"))
        return Tokenizer(
            backend,
            bos_id=self._metadata("tokenizer.ggml.bos_token_id"),
            eos_ids=[id for id in ends if id is not None],
            pad_id=self._metadata("tokenizer.ggml.padding_token_id"),
            chat_template=self._metadata("tokenizer.chat_template"),
        )

    def _pre_tokenizer(self, style: str) -> pre_tokenizers.PreTokenizer:
        if style == "gpt-2":
            return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        if style == "smollm":
            return pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
                ]
            )
        patterns = {"llama-bpe": _LLAMA3_PATTERN, "qwen2": _QWEN2_PATTERN}
        if style in patterns:
            return pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(tokenizers.Regex(patterns[style]), behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        raise CheckpointError(
            f"{self.path}: tokenizer.ggml.pre {style!r} is not supported (only gpt-2, smollm, llama-bpe, qwen2); "
            "pass tokenizer=Tokenizer.from_folder(...) with the model's tokenizer.json to load_model"
        )


def _hf_name(name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _HF_NAMES:
        return name
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{_HF_NAMES[match[2]]}.{match[3]}"


class _Reader(gguf.GGUFReader):
    """gguf.GGUFReader, three times as fast, that names the first tensor which a truncated file does not
    hold."""

    # GGUFReader cuts a string out of `data` for every token; a plain array slices much faster than a memmap.
    @property
    def data(self) -> np.ndarray:
        return self._bytes

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._bytes = mapped.view(np.ndarray)

    def _build_tensors(self, start_offs: int, fields: list[gguf.ReaderField]) -> None:
        for field in fields:
            _, _, _, dims, kind, offset = field.parts
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind[0])]
            end = int(start_offs) + int(offset[0]) + int(np.prod(dims)) // block * size
            if end > len(self.data):
                raise CheckpointError(
                    f"file is truncated: tensor {field.name} ends at byte {end:,}, the file at {len(self.data):,}; "
                    "copy or download it again"
                )
        super()._build_tensors(start_offs, fields)


def _open(path: Path) -> gguf.GGUFReader:
    try:
        return _Reader(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise CheckpointError(
            f"{path}: is not a complete GGUF file, its metadata cannot be read ({error}); copy or download it again"
        ) from error
