# SPDX-License-Identifier: Apache-2.0
"""Calibration of the asynchronous softmax; what logits are is written out anew in NumPy, in float64."""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import calibrate
from models.cache import KVCache
from models.calibrate import Calibration, CalibrationError, LayerLogits, attention_inputs, measure
from models.data import Documents, PackedRows
from models.decoder import Decoder
from models.llama import Llama, LlamaConfig
from models.presets import preset
from models.tokenizer import Tokenizer
from pallas_kernels import flash_attention
from pallas_kernels.core.softmax import HIGHEST

# Grouped heads, a window, and norms of queries and keys: everything that moves a logit.
CONFIG = dataclasses.replace(preset("tiny"), num_layers=2, d_model=48, head_dim=16, qk_norm=True, sliding_window=40)


@pytest.fixture(scope="module")
def model() -> Llama:
    model = Llama(CONFIG, rngs=nnx.Rngs(3), dtype=jnp.float32)
    # Scales of norms other than 1, so that logits spread and differ by layer.
    norm: Any = model.blocks.attention.query_norm
    scales = norm.scale
    scales[...] = scales[...] * jnp.asarray([[3.0], [8.0]])
    return model


@pytest.fixture(scope="module")
def rows() -> list[dict[str, np.ndarray]]:
    """Three rows of 150 tokens, the last one not full, with documents that end inside."""
    random = np.random.default_rng(0)
    documents = Documents.join(random.integers(0, 256, size) for size in (70, 200, 130))
    return [PackedRows(documents, 150)[i] for i in range(3)]


def logits_in_numpy(model: Llama, row: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Of each layer, the visible logits of each head, in float64: a Llama written out by hand."""
    config = model.config
    weights = {
        ".".join(map(str, path)): np.asarray(value[...], np.float64)
        for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    N, K, H, window = config.num_heads, config.num_kv_heads, config.head_dim, config.sliding_window
    assert window is not None

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_eps) * scale

    def rotate(x):
        angle = row["positions"][:, None] * config.rope_theta ** -(np.arange(0, H, 2) / H)
        cos, sin, (first, second) = np.cos(angle)[:, None], np.sin(angle)[:, None], np.split(x, 2, -1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    x, index, found = weights["embedding.embedding"][row["tokens"]], np.arange(len(row["tokens"])), []
    seen = (index <= index[:, None]) & (index > index[:, None] - window)
    seen &= (row["segment_ids"] == row["segment_ids"][:, None]) & (row["segment_ids"] > 0)
    for layer in range(config.num_layers):
        w = {
            name.removeprefix("blocks."): value[layer] for name, value in weights.items() if name.startswith("blocks.")
        }
        h = norm(x, w["attention_norm.scale"])
        q, k, v = ((h @ w[f"attention.{name}.kernel"]).reshape(len(x), -1, H) for name in ("query", "key", "value"))
        q, k = rotate(norm(q, w["attention.query_norm.scale"])), rotate(norm(k, w["attention.key_norm.scale"]))
        k, v = np.repeat(k, N // K, 1), np.repeat(v, N // K, 1)
        logits = np.einsum("tnh,snh->nts", q, k) / np.sqrt(H)
        found.append(logits[:, seen])
        p = np.where(seen, np.exp(logits), 0)
        total = np.maximum(p.sum(-1, keepdims=True), 1e-300)  # padding sees nothing
        out = np.einsum("nts,snh->tnh", p / total, v).reshape(len(x), -1)
        x = x + out @ w["attention.out.kernel"]
        h = norm(x, w["mlp_norm.scale"])
        gate = h @ w["mlp.gate.kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["mlp.up.kernel"])) @ w["mlp.down.kernel"]
    return found


@pytest.fixture(scope="module")
def logits(model, rows) -> list[np.ndarray]:
    """Of each layer [N, all pairs of all rows]."""
    return [np.concatenate(parts, 1) for parts in zip(*(logits_in_numpy(model, row) for row in rows), strict=True)]


@pytest.fixture(scope="module")
def calibration(model, rows) -> Calibration:
    return measure(model, rows, "random tokens")


def test_the_range_is_that_of_the_logits(calibration, logits):
    for layer, expected in zip(calibration.layers, logits, strict=True):
        np.testing.assert_allclose(layer.lowest, expected.min(1), rtol=1e-4)
        np.testing.assert_allclose(layer.highest, expected.max(1), rtol=1e-4)
        # To a bin: half of 0.01 % of all logits lie below the interval, and half above.
        (low, high), tail = layer.interval, 0.00005 * expected.size
        assert np.sum(expected < low - 1e-3) <= tail <= np.sum(expected < low + calibrate.BIN + 1e-3)
        assert np.sum(expected > high + 1e-3) <= tail <= np.sum(expected > high - calibrate.BIN - 1e-3)
    assert calibration.tokens == 400
    assert calibration.layers[1].widest > 2 * calibration.layers[0].widest


def test_phi_leaves_the_same_room_on_both_sides(calibration, logits):
    for number, expected in enumerate(logits):
        unified_max = calibration.unified_max(number)
        assert unified_max is not None
        assert (unified_max.low, unified_max.high) == (-HIGHEST, HIGHEST)
        beyond = expected - np.asarray(unified_max.phi)[:, None]
        np.testing.assert_allclose(beyond.max(1), -beyond.min(1), rtol=1e-3)


def test_attention_inputs_are_those_of_the_forward_pass(model, rows):
    """The last block's output, from them, is what the model computes."""
    row = rows[1]
    seen = []
    with_spy = calibrate._run_block

    def spy(*arguments):
        x, inputs = with_spy(*arguments)
        seen.append(x)
        return x, inputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "_run_block", spy)
        assert len(list(attention_inputs(model, row))) == CONFIG.num_layers
    tokens, positions, segments = (jnp.asarray(row[name])[None] for name in ("tokens", "positions", "segment_ids"))
    assert np.all(row["segment_ids"] > 0)
    expected = model.hidden(model.embed(tokens), positions=positions, segment_ids=segments)
    np.testing.assert_allclose(model.final_norm(seen[-1]), expected, rtol=1e-4, atol=1e-5)


def wide(span: float, N: int = CONFIG.num_heads) -> LayerLogits:
    return LayerLogits((-span / 2,) * N, (*((1.0,) * (N - 1)), span / 2), (-span / 2, span / 2))


def test_a_wide_layer_keeps_the_online_softmax(calibration):
    """The paper's OPT-6.7B has logits from -496.8 to 363.5. One head is enough."""
    layers = (wide(2 * (HIGHEST - calibrate.MARGIN) + 1), wide(90))
    both = dataclasses.replace(calibration, layers=layers)
    assert both.unified_max(0) is None
    assert both.unified_max(1) is not None
    assert "online softmax: too wide" in both.table().splitlines()[1]
    assert both.table().endswith("1 of 2 layers take the asynchronous softmax (400 tokens)")


def test_round_trip(calibration, tmp_path):
    file = calibration.save(tmp_path)
    assert file == tmp_path / "calibration.json"
    assert Calibration.load(tmp_path, CONFIG) == calibration == Calibration.load(file, CONFIG)
    assert json.loads(file.read_text())["layers"][0]["phi"] == list(calibration.layers[0].phi)
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]


def test_a_checkpoint_without_one_has_none(calibration, tmp_path):
    assert Calibration.beside(tmp_path, CONFIG) is None
    assert Calibration.beside(tmp_path / "model.gguf", CONFIG) is None
    calibration.save(tmp_path)
    assert Calibration.beside(tmp_path, CONFIG) == calibration
    assert Calibration.beside(tmp_path / "model.gguf", CONFIG) == calibration  # beside the file
    assert Calibration.beside("smollm2", CONFIG) is None


def test_a_decoder_with_one_says_the_same(model, calibration):
    """Up to rounding; what the bounds are is not what the result is."""
    tokens, lengths = jnp.asarray([[3, 1, 4, 1, 5]]), jnp.asarray([5])
    hidden = []
    for given in (None, calibration):
        decoder = Decoder.from_model(model, calibration=given)
        assert (decoder.unified_max is None) == (given is None)
        _, cache = decoder.prefill(tokens, lengths, KVCache.zeros(CONFIG, 1, 8, decoder.dtype))
        hidden.append(decoder.step(jnp.asarray([9]), cache)[0])
    np.testing.assert_allclose(hidden[1], hidden[0], rtol=1e-4, atol=1e-5)


def test_a_file_is_replaced_whole_or_not_at_all(calibration, tmp_path, monkeypatch):
    calibration.save(tmp_path)
    before = (tmp_path / "calibration.json").read_bytes()
    monkeypatch.setattr(calibrate.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        dataclasses.replace(calibration, tokens=1).save(tmp_path)
    assert (tmp_path / "calibration.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "is of version 99, and this is version 1; run python -m models.calibrate again"),
        ({"layers": None}, "is missing or malformed"),
        ({"layers": [{"lowest": [0.0]}] * 2}, "the key 'highest' is missing or malformed"),
        ({"layers": [{"lowest": [0.0], "highest": [1.0], "interval": [0, 1]}] * 2}, "lowest must be 4 finite numbers"),
        ({"layers": []}, "has 0 layers and the model 2"),
        ({"source": ...}, "the key 'source' is missing"),
    ],
)
def test_a_damaged_file_says_what_is_wrong(calibration, tmp_path, change, message):
    file = calibration.save(tmp_path)
    values = json.loads(file.read_text()) | change
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))
    with pytest.raises(CalibrationError) as caught:
        Calibration.load(file, CONFIG)
    assert str(caught.value).startswith(str(file))
    assert message in str(caught.value)


def test_a_file_of_another_model_is_refused(calibration, tmp_path):
    other: LlamaConfig = dataclasses.replace(CONFIG, num_heads=8, d_ff=64)
    with pytest.raises(CalibrationError, match="is of another model: num_heads is 4 and must be 8; run"):
        Calibration.load(calibration.save(tmp_path), other)


def test_files_that_are_none(tmp_path):
    with pytest.raises(
        CalibrationError, match=r"calibration.json: no such file; python -m models.calibrate writes one"
    ):
        Calibration.load(tmp_path, CONFIG)
    (tmp_path / "calibration.json").write_text("{")
    with pytest.raises(CalibrationError, match="is not valid JSON"):
        Calibration.load(tmp_path, CONFIG)


def test_logits_that_are_not_numbers_are_an_error(model, rows):
    broken = nnx.clone(model)
    norm: Any = broken.blocks.attention.key_norm
    scales = norm.scale
    scales[...] = scales[...].at[1, 0].set(jnp.nan)
    with pytest.raises(CalibrationError, match="the logits of layer 1 are not all finite"):
        measure(broken, rows[:1], "random tokens")


def test_the_program(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "load_model", lambda name: (model, Tokenizer.bytes()))
    text = tmp_path / "text.txt"
    text.write_text("In the beginning God created the heaven and the earth.\n" * 20)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    arguments = [f"--checkpoint={folder}", f"--data={text}", "--tokens=300", "--length=100"]
    assert calibrate.main(arguments) == 0
    assert "2 of 2 layers take the asynchronous softmax (300 tokens)" in capsys.readouterr().out
    assert Calibration.load(folder, CONFIG).source == str(text)
    assert calibrate.main(["--checkpoint=smollm2", f"--data={text}"]) == 2
    assert "smollm2 is an installed package, which is left alone: say where by --out=FILE" in capsys.readouterr().err


def test_rows_that_are_recomputed_are_those_beyond_the_bounds(model, rows, calibration):
    """None as calibrated; with a narrow lower bound, as many as hold a lower logit."""
    unified_max, (*arrays, mask) = calibration.unified_max(1), list(attention_inputs(model, rows[0]))[1]
    narrow = dataclasses.replace(unified_max, low=-8.0)
    query, key, _ = (np.asarray(x[0], np.float64) for x in arrays)
    key = np.repeat(key, CONFIG.num_heads // CONFIG.num_kv_heads, 1)
    x = np.einsum("tnh,snh->nts", query, key) / np.sqrt(CONFIG.head_dim) - np.asarray(unified_max.phi)[:, None, None]
    count = np.sum((np.asarray(mask.as_array(150, 150))[0] & (x <= -8.0)).any(-1))
    assert 0 < count < x[..., 0].size
    for bounds, expected in ((unified_max, 0), (narrow, count)):
        _, stats = flash_attention(*arrays, mask=mask, unified_max=bounds, return_stats=True, implementation="xla")
        assert stats.recomputed_rows.tolist() == [expected]
