# SPDX-License-Identifier: Apache-2.0
"""LlamaConfig from and to the config.json of a Hugging Face folder.

Every key either is understood, has no influence on the computed function, or must hold the value that this
code implements; a config that asks for anything else is refused.
"""

from __future__ import annotations

import math
from typing import Any

from models.layers import RopeScaling
from models.llama import LlamaConfig


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message names the file, the tensor or key, and the fix."""


SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# Keys that change the computed function, and the only values that are implemented.
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "is_encoder_decoder": (False,),
}

# Keys of rope_scaling (rope_parameters since transformers 5) for each type.
_ROPE_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_ROPE_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


def config_from_hf(values: dict[str, Any], source: str) -> LlamaConfig:
    """Reads the contents of a config.json.

    Args:
      values: the parsed JSON object.
      source: what to call the file in errors.

    Raises:
      CheckpointError: for an unsupported architecture or feature, or a missing or impossible value.
    """
    model_type = values.get("model_type")
    architectures = values.get("architectures") or []
    if model_type not in SUPPORTED_MODEL_TYPES:
        supported = ", ".join(SUPPORTED_MODEL_TYPES)
        raise CheckpointError(f"{source}: unsupported architecture {model_type!r}; supported model types: {supported}")
    if any(not name.endswith("ForCausalLM") for name in architectures):
        raise CheckpointError(f"{source}: architectures {architectures} is not supported (only causal language models)")
    for key, allowed in _REQUIRED_VALUES.items():
        if key in values and values[key] not in allowed:
            implemented = " or ".join(map(repr, allowed))
            raise CheckpointError(f"{source}: {key} = {values[key]!r} is not supported (only {implemented})")

    def required(key: str) -> Any:
        if values.get(key) is None:
            raise CheckpointError(f"{source}: lacks {key!r}; copy config.json from the original model again")
        return values[key]

    d_model, num_heads = required("hidden_size"), required("num_attention_heads")
    theta, scaling = _rope_from_hf(values, source)
    biased = model_type == "qwen2" or bool(values.get("attention_bias", False))
    try:
        return LlamaConfig(
            vocab_size=required("vocab_size"),
            d_model=d_model,
            num_layers=required("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_heads
            if model_type == "llama" and values.get("num_key_value_heads") is None
            else required("num_key_value_heads"),
            # Qwen3's own default is 128; the others derive it.
            head_dim=values.get("head_dim") or (128 if model_type == "qwen3" else d_model // num_heads),
            d_ff=required("intermediate_size"),
            max_positions=values.get("max_position_embeddings", 2048),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=values.get("rms_norm_eps", 1e-6),
            tie_embeddings=values.get("tie_word_embeddings", False),
            attention_bias=biased,
            # Qwen2 has no bias here; attention_bias of the others means all four projections.
            attention_output_bias=biased and model_type != "qwen2",
            qk_norm=model_type == "qwen3",
            sliding_window=_sliding_window_from_hf(values, source),
        )
    except CheckpointError:
        raise
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source}: impossible configuration: {error}") from error


def _sliding_window_from_hf(values: dict[str, Any], source: str) -> int | None:
    model_type, num_layers = values["model_type"], values["num_hidden_layers"]
    window = values.get("sliding_window")
    if model_type == "llama":
        window = None
    elif model_type == "mistral":
        window = values.get("sliding_window", 4096)  # what transformers assumes when the key is absent
    elif not values.get("use_sliding_window", False):
        window = None
    elif window is not None:
        # In Qwen the first max_window_layers layers see everything.
        unlimited = min(values.get("max_window_layers", 28), num_layers)
        if unlimited == num_layers:
            window = None
        elif unlimited > 0:
            raise CheckpointError(
                f"{source}: max_window_layers = {unlimited} of {num_layers} layers: a sliding window in only some "
                "layers is not supported"
            )
    kinds = set(values.get("layer_types") or [])
    expected = "full_attention" if window is None else "sliding_attention"
    if kinds - {expected}:
        raise CheckpointError(f"{source}: layer_types {sorted(kinds)} are not supported (only all {expected!r} here)")
    return window


def _rope_from_hf(values: dict[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    """rope_theta and the scaling, from `rope_theta` + `rope_scaling` or, since transformers 5,
    `rope_parameters`."""
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    theta = float(rope.get("rope_theta") or values.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _ROPE_KEYS:
        raise CheckpointError(f"{source}: unsupported rope type {kind!r}; supported: {', '.join(_ROPE_KEYS)}")
    unknown = {key for key, value in rope.items() if value is not None} - _ROPE_COMMON - _ROPE_KEYS[kind]
    if unknown and kind != "default":
        raise CheckpointError(f"{source}: unsupported keys of the {kind!r} rope scaling: {', '.join(sorted(unknown))}")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise CheckpointError(
            f"{source}: partial_rotary_factor = {rope['partial_rotary_factor']} is not supported (only 1.0)"
        )
    if kind == "default":
        return theta, None

    max_positions = values.get("max_position_embeddings", 2048)
    original = rope.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
    factor = rope.get("factor")
    if factor is None and kind == "yarn" and original:
        factor = max_positions / original
    if factor is None:
        raise CheckpointError(f"{source}: the {kind!r} rope scaling lacks 'factor'")
    options: dict[str, Any] = {"factor": float(factor)}
    if kind != "linear":
        options["original_max_positions"] = original or max_positions
    if kind == "llama3":
        options["low_frequency_factor"] = rope.get("low_freq_factor", 1.0)
        options["high_frequency_factor"] = rope.get("high_freq_factor", 4.0)
    if kind == "yarn":
        options["beta_fast"] = float(rope.get("beta_fast") or 32)
        options["beta_slow"] = float(rope.get("beta_slow") or 1)
        options["truncate"] = rope.get("truncate", True)
        options["attention_factor"] = rope.get("attention_factor")
        mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        if options["attention_factor"] is None and mscale and mscale_all_dim:
            log = 0.1 * math.log(factor)
            options["attention_factor"] = (mscale * log + 1) / (mscale_all_dim * log + 1)
    try:
        return theta, RopeScaling(kind=kind, **options)
    except ValueError as error:
        raise CheckpointError(f"{source}: impossible rope scaling: {error}") from error


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """The config.json that `transformers` (4 and 5) reads as this model, dtype and token ids aside.

    Raises:
      CheckpointError: no supported architecture has this combination of features.
    """
    features = (config.qk_norm, config.attention_bias, config.attention_output_bias, config.sliding_window is not None)
    match features:
        case (True, bias, output_bias, _) if bias == output_bias:
            model_type, name = "qwen3", "Qwen3ForCausalLM"
        case (False, True, False, _):
            model_type, name = "qwen2", "Qwen2ForCausalLM"
        case (False, False, False, True):
            model_type, name = "mistral", "MistralForCausalLM"
        case (False, bias, output_bias, False) if bias == output_bias:
            model_type, name = "llama", "LlamaForCausalLM"
        case _:
            raise CheckpointError(
                "no Hugging Face architecture combines "
                f"qk_norm={features[0]}, attention_bias={features[1]}, attention_output_bias={features[2]} and "
                f"sliding_window={config.sliding_window}"
            )
    values: dict[str, Any] = {
        "architectures": [name],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling_to_hf(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if model_type in ("llama", "qwen3"):
        values["attention_bias"] = config.attention_bias
    if model_type == "llama":
        values["mlp_bias"] = False
    if model_type == "mistral":
        values["sliding_window"] = config.sliding_window
    if model_type in ("qwen2", "qwen3"):
        values["use_sliding_window"] = config.sliding_window is not None
        values["sliding_window"] = config.sliding_window
        values["max_window_layers"] = config.num_layers if config.sliding_window is None else 0
    return values


def _rope_scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        values["original_max_position_embeddings"] = scaling.original_max_positions
    if scaling.kind == "llama3":
        values["low_freq_factor"] = scaling.low_frequency_factor
        values["high_freq_factor"] = scaling.high_frequency_factor
    if scaling.kind == "yarn":
        values["beta_fast"] = scaling.beta_fast
        values["beta_slow"] = scaling.beta_slow
        values["truncate"] = scaling.truncate
        if scaling.attention_factor is not None:
            values["attention_factor"] = scaling.attention_factor
    return values
