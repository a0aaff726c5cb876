# SPDX-License-Identifier: Apache-2.0
"""Compressing a small model: Hessians against NumPy, the folder and back, every caller of a decoder, refusals."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import infer
from models import CheckpointError, ContinuousBatcher, Generator, KVCache, Tokenizer, load_model, save_checkpoint
from models import compress as compress_lib
from models.compress import Recipe, compress, summary
from models.compressed import MATRICES, load_decoder, save_compressed
from models.data import Documents, PackedRows
from models.decoder import Decoder
from models.presets import preset
from tests.models.random_model import random_model

# Its weights have two shapes, so that little is compiled.
CONFIG = dataclasses.replace(preset("tiny"), num_layers=2, d_model=64, num_heads=2, num_kv_heads=1, d_ff=64)
RECIPES = {
    "mixed": Recipe("mixed_2_4", options={"strips": "hessian", "outlier_fraction": 0.01}),
    "int4": Recipe("int4"),
    "int8": Recipe("int8", compensate=False, options={"activation_bits": 8}),
}


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.from_model(random_model(CONFIG), fold_norms=False)


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(0)
    documents = Documents.join(random.integers(0, 256, size) for size in (70, 130))
    return [PackedRows(documents, 120)[i] for i in range(2)]  # the second is padded


@pytest.fixture(scope="module")
def compressed(decoder, rows):
    return {name: compress(decoder, rows, recipe) for name, recipe in RECIPES.items()}


@jax.jit
def prefill(decoder, tokens):
    cache = KVCache.zeros(decoder.config, len(tokens), tokens.shape[1], decoder.dtype)
    hidden, _ = decoder.prefill(tokens, jnp.full(len(tokens), tokens.shape[1]), cache)
    return decoder.logits(hidden)


def dense(decoder):
    """The same decoder with arrays, which flat_gemm multiplies."""
    layers = tuple(
        dataclasses.replace(layer, **{name: getattr(layer, name).dequantize().T for name in MATRICES})
        for layer in decoder.layers
    )
    return dataclasses.replace(decoder, layers=layers)


@pytest.mark.parametrize("name", ["mixed", "int4"])
def test_a_quantized_decoder_computes_what_its_weights_say(compressed, name):
    tokens = jax.random.randint(jax.random.key(0), (2, 30), 0, 256)
    want = prefill(dense(compressed[name]), tokens)
    np.testing.assert_allclose(prefill(compressed[name], tokens), want, atol=2e-5 * float(jnp.abs(want).max()))


def test_hessians_are_of_the_inputs_behind_quantized_weights(decoder, rows, monkeypatch):
    """x^T x of real tokens only: of the second layer's qkv, from a decoder whose first layer is quantized."""
    hessians = []

    def make(recipe, w, hessian):
        hessians.append(hessian)
        return compress_lib.quantize(w, "int2", group_size=16)

    monkeypatch.setattr(Recipe, "make", make)
    quantized = dense(compress(decoder, rows, Recipe()))
    first = dataclasses.replace(quantized, layers=quantized.layers[:1], final_norm=quantized.layers[1].attention_norm)
    want = np.zeros((64, 64))
    for row in rows:
        for segment in range(1, 1 + row["segment_ids"].max()):  # documents do not see each other
            tokens = jnp.asarray(row["tokens"][row["segment_ids"] == segment])[None]
            shape = dataclasses.replace(CONFIG, num_layers=1)
            hidden, _ = dataclasses.replace(first, config=shape).prefill(
                tokens, jnp.asarray([tokens.shape[1]]), KVCache.zeros(shape, 1, tokens.shape[1], jnp.float32)
            )
            x = np.asarray(hidden[0], np.float64)
            want += x.T @ x
    assert len(hessians) == 8
    np.testing.assert_allclose(hessians[4], want, rtol=1e-3, atol=1e-3)


def test_compensation_brings_logits_nearer(decoder, rows):
    tokens = jnp.asarray(rows[0]["tokens"])[None, :70]
    want = prefill(decoder, tokens)

    def error(compensate):
        return float(jnp.mean((prefill(compress(decoder, rows, Recipe("int4", compensate)), tokens) - want) ** 2))

    assert error(True) < error(False)


@pytest.mark.parametrize("name", RECIPES)
def test_a_folder_gives_back_the_decoder(compressed, name, tmp_path):
    save_compressed(tmp_path / "new", compressed[name], Tokenizer.bytes(), {"scheme": name}, dtype=jnp.float32)
    again, tokenizer = load_decoder(tmp_path / "new")
    assert tokenizer.vocab_size == 259
    assert jax.tree.structure(again) == jax.tree.structure(compressed[name])
    jax.tree.map(np.testing.assert_array_equal, again, compressed[name])
    assert load_decoder(tmp_path / "new", dtype=jnp.bfloat16)[0].dtype == jnp.bfloat16
    with pytest.raises(CheckpointError, match="holds quantized weights, which cannot be trained; use load_decoder"):
        load_model(tmp_path / "new")


def test_biases_and_norms_of_heads_are_kept(tmp_path):
    config = dataclasses.replace(CONFIG, num_layers=1, qk_norm=True, attention_bias=True, attention_output_bias=True)
    whole = Decoder.from_model(random_model(config), fold_norms=False)
    rows = [PackedRows(Documents.join([np.arange(50) % 256]), 50)[0]]
    small = compress(whole, rows, Recipe("int8"))
    save_compressed(tmp_path / "new", small, Tokenizer.bytes(), {}, dtype=jnp.float32)
    again, _ = load_decoder(tmp_path / "new")
    jax.tree.map(np.testing.assert_array_equal, again, small)
    want = prefill(whole, jnp.arange(20)[None])
    assert float(jnp.abs(prefill(again, jnp.arange(20)[None]) - want).max()) < 0.1 * float(jnp.abs(want).max())


@pytest.fixture(scope="module")
def folder(compressed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compress") / "small"
    save_compressed(folder, compressed["mixed"], Tokenizer.bytes(), {})
    return folder


def test_infer_and_the_batcher_run_it(folder, capsys, tmp_path):
    small, tokenizer = load_decoder(folder)
    prompts = ["In the beginning", "And"]
    texts = Generator(small, tokenizer).generate(prompts, 6).texts
    batcher = ContinuousBatcher(small, tokenizer, max_rows=2, max_tokens=64)
    requests = [batcher.submit(prompt, max_new_tokens=6, request_id=i) for i, prompt in enumerate(prompts)]
    while not all(request.finished for request in requests):
        batcher.step()
    assert [request.text for request in requests] == texts
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts))
    assert infer.main(["infer.py", f"--checkpoint={folder}", f"--prompt_file={file}", "--max_new_tokens=6"]) == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == texts


def change(folder, to, edit):
    """A copy of a folder with edit(tensors, metadata) done to its file."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    file = to / "model.safetensors"
    with safetensors.safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    tensors = safetensors.numpy.load_file(file)
    edit(tensors, metadata)
    safetensors.numpy.save_file(tensors, file, metadata=metadata)
    return to


def flip(tensors, _):
    tensors["model.layers.1.down.main.words"][3, 0] ^= 4


def test_damaged_files_are_refused_by_the_tensor(folder, tmp_path):
    words = "model.layers.1.down.main.words"
    cases = [
        (flip, f"tensor {words} is damaged: its checksum is another"),
        (lambda tensors, _: tensors.pop(words), f"tensor {words} is missing"),
        (lambda tensors, _: tensors.pop("model.norm.weight"), "tensor model.norm.weight is missing"),
        (lambda tensors, _: tensors.update(extra=np.ones(1)), "tensor extra is unexpected"),
        (lambda _, metadata: metadata.pop("crc32"), "has no checksums"),
    ]
    for number, (edit, message) in enumerate(cases):
        with pytest.raises(CheckpointError, match=message):
            load_decoder(change(folder, tmp_path / str(number), edit))


def test_a_truncated_file_and_another_version_are_refused(folder, tmp_path):
    cut = change(folder, tmp_path / "cut", lambda *_: None)
    (cut / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="file is truncated: tensor model"):
        load_decoder(cut)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (cut / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is of version 2, and this is version 1"):
        load_decoder(cut)


def test_the_program(tmp_path, capsys):
    save_checkpoint(tmp_path / "model", random_model(CONFIG), Tokenizer.bytes())
    text = tmp_path / "text.txt"
    text.write_text("In the beginning God created the heaven and the earth.\n" * 8)
    arguments = [f"--checkpoint={tmp_path / 'model'}", f"--calibration={text}", f"--out={tmp_path / 'out'}"]
    arguments += ["--scheme=int8", "--length=100", "--tokens=200"]
    assert compress_lib.main(arguments) == 0
    decoder, _ = load_decoder(tmp_path / "out")
    assert summary(decoder) in capsys.readouterr().out
    recipe = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (recipe["scheme"], recipe["compensated"], recipe["tokens"]) == ("int8", True, 200)
    assert compress_lib.main(arguments) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert compress_lib.main([*arguments, "--overwrite", "--strips=range", "--four_bit_fraction=2"]) == 2
    assert "layer 0, qkv: quantize: four_bit_fraction cannot be given" in capsys.readouterr().err
    assert (tmp_path / "out" / "config.json").is_file()


def test_norms_that_are_part_of_the_weights_are_refused(rows):
    with pytest.raises(ValueError, match=r"must be apart: Decoder.from_model\(model, fold_norms=False\)"):
        compress(Decoder.from_model(random_model(CONFIG)), rows, Recipe())


def test_the_count_of_bits(compressed):
    """int4 of [64, 128] and so on, whose words are padded to 128 inputs: by hand for one layer, twice."""
    small = compressed["int4"]
    size = sum(getattr(small.layers[0], name).nbytes for name in MATRICES)
    count = 64 * 128 + 64 * 64 + 64 * 128 + 64 * 64
    assert summary(small).startswith(f"{8 * size / count:.3f} bits a weight in the layers ({2 * count:,} weights")
