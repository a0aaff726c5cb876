# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: a thin layer over the `tokenizers` library that also knows the special tokens
and the chat template, and reads and writes the tokenizer files of a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from models.hf_config import CheckpointError

_BYTE_SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>")


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      backend: the `tokenizers.Tokenizer` that does the work.
      bos_id: the token that begins a sequence, or None.
      eos_ids: the tokens that end generation, perhaps none.
      pad_id: the token that the model was padded with, or None.
      chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        pad_id: int | None = None,
        chat_template: str | None = None,
    ):
        self.backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.pad_id = pad_id
        self.chat_template = chat_template
        # Ids may have gaps, and what an embedding must cover is the largest one.
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @classmethod
    def bytes(cls) -> Tokenizer:
        """One token per UTF-8 byte (ids 0 to 255), then <|bos|> 256, <|eos|> 257 and <|pad|> 258.

        It needs no training and loses nothing: meant for models trained from scratch.
        """
        vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
        # A byte-pair vocabulary without merges: each byte stays its own token.
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in _BYTE_SPECIALS])
        return cls(backend, bos_id=256, eos_ids=(257,), pad_id=258)

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Token ids of `text`. Special tokens written out in the text become their ids.

        Args:
          text: any string.
          add_bos: put the beginning-of-sequence token first; ValueError if the tokenizer has none.
        """
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if not add_bos:
            return ids
        if self.bos_id is None:
            raise ValueError("add_bos=True, but this tokenizer has no beginning-of-sequence token")
        return [self.bos_id, *ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD. Ids outside the vocabulary are
        dropped."""
        return self.backend.decode(list(map(int, ids)), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text that the model was taught to see for a conversation.

        Args:
          messages: [{"role": "user", "content": "..."}, ...].
          add_generation_prompt: end with the header of the assistant's answer.
          **variables: further variables of this model's template (such as `tools`).

        Raises:
          ValueError: there is no chat template, or it rejects the conversation.
        """
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template; pass the prompt as plain text instead")
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
                raise ValueError(f"messages[{index}] must have 'role' and 'content', got {message!r}")
        # Templates come with downloaded models: run them in the sandbox.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        special = {"bos_token": self._token(self.bos_id), "eos_token": self._token(next(iter(self.eos_ids), None))}
        try:
            template = environment.from_string(self.chat_template)
            return template.render(
                **special, messages=list(messages), add_generation_prompt=add_generation_prompt, **variables
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template rejects this conversation: {error}") from error

    def _token(self, id: int | None) -> str:
        return "" if id is None else self.backend.id_to_token(id) or ""

    # --- Files of a Hugging Face folder ---------------------------------------------------------------------

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Reads tokenizer.json and what tokenizer_config.json, generation_config.json, config.json and
        chat_template.jinja say about special tokens and chat.

        Raises:
          CheckpointError: tokenizer.json is missing, or a file cannot be read.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            hint = "pass tokenizer=... to load_model"
            if (folder / "tokenizer.model").is_file():
                hint = (
                    "convert tokenizer.model with transformers: "
                    "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
                )
            raise CheckpointError(f"{folder}: has no tokenizer.json; {hint}")
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises nothing more specific
            raise CheckpointError(f"{path}: is not a readable tokenizer ({error}); copy it again") from error

        settings = read_json(folder / "tokenizer_config.json", optional=True)
        generation = read_json(folder / "generation_config.json", optional=True)
        model = read_json(folder / "config.json", optional=True)

        def token_id(role: str) -> int | None:
            """Of the token that tokenizer_config.json names, else of the id in the other two files."""
            token = settings.get(f"{role}_token")
            if isinstance(token, dict):
                token = token.get("content")
            if token is not None:
                return backend.token_to_id(token)
            for values in (generation, model):
                if isinstance(values.get(f"{role}_token_id"), int):
                    return values[f"{role}_token_id"]
            return None

        # Chat models list every token that ends a turn in generation_config.json.
        stops = generation.get("eos_token_id", model.get("eos_token_id"))
        stops = [stops] if isinstance(stops, int) else list(stops or [])
        eos = token_id("eos")
        return cls(
            backend,
            bos_id=token_id("bos"),
            eos_ids=([] if eos is None else [eos]) + stops,
            pad_id=token_id("pad"),
            chat_template=_read_chat_template(folder, settings),
        )

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and generation_config.json into an existing folder."""
        folder = Path(folder)
        self.backend.save(str(folder / "tokenizer.json"))
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "chat_template": self.chat_template,
            "bos_token": self._token(self.bos_id) or None,
            "eos_token": self._token(next(iter(self.eos_ids), None)) or None,
            "pad_token": self._token(self.pad_id) or None,
        }
        settings = {key: value for key, value in settings.items() if value is not None}
        write_json(folder / "tokenizer_config.json", settings)
        write_json(folder / "generation_config.json", self.special_token_ids())

    def special_token_ids(self) -> dict[str, Any]:
        """The keys that config.json and generation_config.json have for special tokens."""
        eos = list(self.eos_ids)
        ids = {
            "bos_token_id": self.bos_id,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            "pad_token_id": self.pad_id,
        }
        return {key: value for key, value in ids.items() if value is not None}


def byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte 0..255 (Radford et al. 2019, GPT-2):
    printable Latin-1 stands for itself, the others are numbered from U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """A JSON object; with `optional`, {} if there is no such file. CheckpointError if it cannot be read."""
    if not path.is_file():
        if optional:
            return {}
        raise CheckpointError(f"{path}: no such file; a Hugging Face folder needs it")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes HTML, which would change the prompt.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
