"""Tokenizers: bytes, chat templates, files. Tokens of a real model are compared with transformers in test_golden.py."""

import json
import re

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies

from models import CheckpointError, Tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_template(template: str | None) -> Tokenizer:
    return Tokenizer(Tokenizer.bytes().backend, bos_id=256, eos_ids=[257], chat_template=template)


@hypothesis.given(strategies.text(strategies.characters(exclude_categories=["Cs"])))
def test_bytes_are_utf8(text):
    hypothesis.assume("<|" not in text)
    tokenizer = Tokenizer.bytes()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_of_bytes():
    tokenizer = Tokenizer.bytes()
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (259, 256, (257,), 258)
    assert tokenizer.encode("a<|eos|>b", add_bos=True) == [256, 97, 257, 98]
    assert tokenizer.decode([256, 97, 257, 98]) == "ab"
    assert tokenizer.decode([256, 97, 257, 98], skip_special_tokens=False) == "<|bos|>a<|eos|>b"


def test_half_a_character_decodes_to_the_replacement_character():
    assert Tokenizer.bytes().decode("é".encode()[:1]) == "\ufffd"


def test_add_bos_without_bos():
    with pytest.raises(ValueError, match="add_bos=True, but this tokenizer has no beginning-of-sequence token"):
        Tokenizer(Tokenizer.bytes().backend).encode("a", add_bos=True)


def test_files_round_trip(tmp_path):
    tokenizer = Tokenizer(
        Tokenizer.bytes().backend, bos_id=256, eos_ids=[257, 10], pad_id=258, chat_template=CHATML + "é"
    )
    tokenizer.save(tmp_path)
    loaded = Tokenizer.from_folder(tmp_path)
    for attribute in ("bos_id", "eos_ids", "pad_id", "chat_template", "vocab_size"):
        assert getattr(loaded, attribute) == getattr(tokenizer, attribute)
    assert loaded.encode("naïve <|eos|>\n") == tokenizer.encode("naïve <|eos|>\n")


def test_special_tokens_as_published_models_write_them(tmp_path):
    """A token written as an object in tokenizer_config.json, and a list of stop tokens in generation_config.json."""
    Tokenizer.bytes().backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": {"content": "<|bos|>", "special": True}, "eos_token": "<|eos|>", "chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 257]}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (256, (257, 258))
    (tmp_path / "chat_template.jinja").write_text("the file wins")
    assert Tokenizer.from_folder(tmp_path).chat_template == "the file wins"


def test_special_tokens_from_ids_alone(tmp_path):
    Tokenizer.bytes().backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 256, "eos_token_id": 257}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (256, (257,))


def test_vocab_size_counts_gaps():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 7}, merges=[]))
    assert Tokenizer(backend).vocab_size == 8


def test_chat_template():
    messages = [{"role": "user", "content": "<b>Hi</b>"}]
    tokenizer = with_template(CHATML)
    prompt = "<|im_start|>user\n<b>Hi</b><|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages) == prompt
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == prompt.removesuffix(
        "<|im_start|>assistant\n"
    )
    special = with_template("{{ bos_token }}{{ tools | tojson }}{{ eos_token }}")
    assert special.apply_chat_template(messages, tools=[{"é": "<"}]) == '<|bos|>[{"é": "<"}]<|eos|>'


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, [], "this tokenizer has no chat template; pass the prompt as plain text instead"),
        ("x", [{"role": "user"}], "messages[0] must have 'role' and 'content', got {'role': 'user'}"),
        ("x", ["Hi"], "messages[0] must have 'role' and 'content', got 'Hi'"),
        (
            "{{ raise_exception('roles must alternate') }}",
            [],
            "the chat template rejects this conversation: roles must alternate",
        ),
        ("{% oops %}", [], "the chat template rejects this conversation: Encountered unknown tag 'oops'"),
        # Templates come with downloaded files and must not reach the interpreter.
        ("{{ messages.__class__.__mro__ }}", [], "access to attribute '__class__' of 'list' object is unsafe"),
    ],
)
def test_bad_conversations(template, messages, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        with_template(template).apply_chat_template(messages)


def test_unreadable_files(tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path}: has no tokenizer.json; pass tokenizer=... to")):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=re.escape("convert tokenizer.model with transformers")):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    with pytest.raises(CheckpointError, match=re.escape("tokenizer.json: is not a readable tokenizer")):
        Tokenizer.from_folder(tmp_path)
    Tokenizer.bytes().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=re.escape("tokenizer_config.json: is not valid JSON")):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=re.escape("tokenizer_config.json: must hold a JSON object, got list")):
        Tokenizer.from_folder(tmp_path)
