# SPDX-License-Identifier: Apache-2.0
"""What is scored was neither trained nor calibrated on, and the table is that of the numbers of all seeds."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import quantization_quality
from benchmarks.quantization_quality import Subject, mean_loss, read, table, write
from models import Decoder, Llama, preset
from models.checkpoint import save_checkpoint
from models.data import DataError, load_documents
from models.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
CONFIG = preset("tiny")


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Two corpora of 40 documents each, of 144 bytes and an end of text, that repeat a word of their own."""
    for name in quantization_quality.TEXTS:
        lines = [f"{name[0]}{i:06d} " * 18 for i in range(40)]
        (tmp_path / name).with_suffix(".jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))

    def load(names: str, *arguments, **options):
        return load_documents(",".join(f"{tmp_path / name}.jsonl" for name in names.split(",")), *arguments, **options)

    monkeypatch.setattr(quantization_quality, "load_documents", load)
    return load("kjv,python", BYTES)


@pytest.fixture
def run(tmp_path, texts):
    """What train.py writes, without the training."""
    folder = tmp_path / "run"
    save_checkpoint(folder / "export", Llama(CONFIG, rngs=nnx.Rngs(0)), BYTES)
    settings = {"preset": "tiny", "checkpoint": None, "data": "kjv,python", "eval_fraction": 0.4, "seed": 7}
    settings |= {"data_fingerprint": texts.fingerprint(), "model": {"vocab_size": CONFIG.vocab_size}}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_a_run_is_given_only_what_it_held_out(run, texts):
    subject = Subject.load(str(run), rows=4, length=48)
    assert (subject.name, subject.seed, len(subject.calibration)) == ("tiny", "7", 4)

    def documents(rows) -> set[str]:
        return {BYTES.decode(row["tokens"][:7]) for row in rows}

    trained, held_out = texts.split(0.4)
    trained = documents({"tokens": document} for document in trained)
    scored = {name: documents(rows) for name, rows in subject.scored.items()}
    assert not (documents(subject.calibration) | scored["kjv"] | scored["python"]) & trained
    assert not documents(subject.calibration) & (scored["kjv"] | scored["python"])
    # All of every other document that was held out: three rows of 48 tokens each.
    assert abs(len(held_out) / 2 - len(scored["kjv"] | scored["python"])) <= 1
    assert {name: len(rows) for name, rows in subject.scored.items()} == {
        name: 3 * len(scored[name]) for name in scored
    }


def test_other_text_than_the_run_was_trained_on_is_refused(run):
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"data_fingerprint": "0123456789abcdef"}))
    with pytest.raises(DataError, match="the text is not what the model was trained on"):
        Subject.load(str(run), rows=4, length=48)


def test_the_loss_is_the_mean_over_rows_of_the_models():
    model = Llama(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32)
    tokens = np.random.default_rng(0).integers(256, size=(5, 24))  # a batch, and one row more
    logits = np.asarray(model(jnp.asarray(tokens)), np.float64)[:, :-1]
    log_sums = np.log(np.sum(np.exp(logits), -1))
    expected = np.mean(log_sums - np.take_along_axis(logits, tokens[:, 1:, None], 2)[..., 0])
    found = mean_loss(Decoder.from_model(model, fold_norms=False), [{"tokens": row} for row in tokens])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_measured_rows_are_written_beside_those_of_other_seeds(run, tmp_path, capsys):
    file = tmp_path / "rows.csv"
    there = dict.fromkeys(quantization_quality.COLUMNS, "1") | {"variant": "int8", "seed": "2"}
    write(file, {("int8", "2"): there})
    command = [f"--checkpoint={run}", "--rows=4", "--length=48", "--variants=bfloat16,int8", f"--out={file}"]
    assert quantization_quality.main(command) == 0
    found = read(file)
    assert list(found) == [("bfloat16", "7"), ("int8", "2"), ("int8", "7")]
    assert found["int8", "2"] == there
    assert found["bfloat16", "7"]["bits"] == "16.000"
    assert abs(float(found["int8", "7"]["nats_more"])) < 0.01
    assert "| `int8` |" in capsys.readouterr().out


def test_the_table_has_mean_and_range_over_seeds(tmp_path):
    numbers = dict.fromkeys(quantization_quality.COLUMNS, "") | {"bits": "2.375", "stored_bits": "2.875"}
    rows = {}
    for name, losses in {"int2": ("7.5", "9.0", "8.4"), "int4": ("0.5", "0.75", "0.25")}.items():
        for seed, loss in enumerate(losses):
            row = {"variant": name, "seed": str(seed), "kjv": f"{1000 * float(loss):.4g}", "python": "3"}
            rows[name, str(seed)] = numbers | row | {"nats_more": loss}
    write(tmp_path / "rows.csv", rows)
    assert table(read(tmp_path / "rows.csv")).splitlines()[2:] == [
        "| `int4` | 2.375 | 2.875 | 500 (250 to 750) | 3 | 0.50 (0.25 to 0.75) |",
        "| `int2` | 2.375 | 2.875 | 8300 (7500 to 9000) | 3 | 8.3 (7.5 to 9.0) |",
    ]
