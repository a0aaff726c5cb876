# SPDX-License-Identifier: Apache-2.0
"""A sentence encoder against what `transformers` computed (golden/make_golden.py)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from models.bert import SentenceEncoder, load_bert
from models.hf_config import CheckpointError

GOLDEN = Path(__file__).parent / "golden"


def test_golden_hidden_states():
    """Of sentences of two lengths; what follows a sentence's end changes nothing."""
    golden = np.load(GOLDEN / "bert" / "hidden.npz")
    bert, config = load_bert(GOLDEN / "bert")
    assert (config.d_model, config.num_layers, config.num_heads, config.max_length) == (32, 2, 4, 16)
    there = np.arange(12) < golden["lengths"][:, None]
    hidden = np.asarray(bert(golden["tokens"], golden["lengths"]))
    np.testing.assert_allclose(hidden[there], golden["hidden"][there], rtol=0, atol=1e-5)
    others = np.where(there, golden["tokens"], 3)
    np.testing.assert_array_equal(np.asarray(bert(others, golden["lengths"]))[there], hidden[there])


def test_golden_embeddings():
    """Of the published weights, at 1e-6; alone or among others."""
    encoder, golden = SentenceEncoder.load("minilm"), np.load(GOLDEN / "minilm.npz")
    sentences = list(golden["sentences"])
    embedded = encoder.embed(sentences)
    np.testing.assert_allclose(embedded, golden["embedded"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(encoder.embed(sentences[2:3], batch=1), embedded[2:3], rtol=0, atol=1e-6)


def test_what_cannot_be_loaded(tmp_path):
    folder = shutil.copytree(GOLDEN / "bert", tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(CheckpointError, match=r"config.json: hidden_act is 'relu'; models/bert.py has 'gelu' alone"):
        load_bert(folder)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(CheckpointError, match=r"output.dense.weight has shape \[32, 48\] but the .* \[32, 64\]"):
        load_bert(folder)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "hidden_size"}))
    with pytest.raises(CheckpointError, match="hidden_size is missing"):
        load_bert(folder)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: no such file; copy it beside the weights"):
        SentenceEncoder.load(folder)
