# SPDX-License-Identifier: Apache-2.0
"""What may be asked of a model that generates; every refusal is a ValueError with the value and the fix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from models.llama import LlamaConfig
from models.sampling import is_integer

if TYPE_CHECKING:
    from models.tokenizer import Tokenizer


def encoded_prompt(
    tokenizer: Tokenizer, config: LlamaConfig, prompt: str, add_bos: bool, name: str = "the prompt"
) -> list[int]:
    """Token ids; refuses a prompt without any, or with ids beyond the model's (TypeError for what is not text)."""
    if not isinstance(prompt, str):
        raise TypeError(f"a prompt must be a string, but {name} is {prompt!r}")
    ids = list(tokenizer.encode(prompt, add_bos=add_bos))
    if not ids:
        raise ValueError(
            f"{name} is empty ({prompt!r}), but a model needs one token to begin with: "
            "pass some text, or add_bos=True if the tokenizer has a beginning-of-text token"
        )
    if max(ids) >= config.vocab_size:
        raise ValueError(
            f"{name} encodes to token {max(ids)}, but the model has vocab_size="
            f"{config.vocab_size}: this tokenizer does not belong to this model"
        )
    return ids


def check_count(name: str, value: int | None, *, optional: bool = False) -> None:
    """Refuses what is not an integer of at least 1 (nor None, where that is an option)."""
    if value is None and optional:
        return
    if value is None or not is_integer(value) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1{', or None' if optional else ''}, got {value!r}")


def check_fits(
    length: int, max_new_tokens: int, limit: int, room: str, *, raised: str | None, name: str = "the prompt"
) -> None:
    """Refuses a prompt of `length` tokens whose continuation ends beyond `limit` tokens.

    `room` names the limit, and `raised` how it can be raised, if it can.
    """
    total = length + max_new_tokens
    if total <= limit:
        return
    fixes = []
    if max_new_tokens < limit:
        fixes.append(f"shorten the prompt to {limit - max_new_tokens} tokens")
    if length < limit:
        fixes.append(f"lower max_new_tokens to {limit - length}")
    if raised is not None:
        fixes.append(raised)
    raise ValueError(
        f"{name} has {length} tokens and with max_new_tokens={max_new_tokens} needs {total}, "
        f"more than {room}: {', or '.join(fixes) or 'shorten the prompt and lower max_new_tokens'}"
    )


def checked_stop_tokens(stop_tokens: Sequence[int], config: LlamaConfig) -> Sequence[int]:
    for token in stop_tokens:
        if not (is_integer(token) and 0 <= token < config.vocab_size):
            raise ValueError(f"stop_tokens must be ids in [0, {config.vocab_size}), got {token!r}")
    return stop_tokens


def checked_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    for string in stop:
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop must hold strings of at least one character, got {string!r}")
    return stop


def checked_seed(seed: int) -> np.uint32:
    if not (is_integer(seed) and 0 <= seed < 2**32):
        raise ValueError(f"seed must be an integer in [0, 2**32), got {seed!r}")
    return np.uint32(seed)
