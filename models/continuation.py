# SPDX-License-Identifier: Apache-2.0
"""The text of a row while its tokens arrive: cut where it has to stop, streamed as far as it is certain."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from models.tokenizer import Tokenizer

type FinishReason = Literal["stop_token", "stop_string", "length", "cancelled"]

# Tokens of the prompt that are decoded along with the continuation: some tokenizers write a token without its
# leading space where a text begins.
_CONTEXT = 8


class Continuation:
    """What a model says after one prompt.

    Attributes:
      tokens: drawn so far, without the stop token.
      live: whether more tokens are wanted.
      text, reason: complete once the row is not live.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop_tokens: set[int], stop: tuple[str, ...]):
        self.tokens: list[int] = []
        self.text = ""
        self.reason: FinishReason = "length"
        self.live = True
        self._tokenizer = tokenizer
        self._prompt_length = len(prompt)
        self._context = prompt[-_CONTEXT:]
        self._context_text = tokenizer.decode(self._context)
        self._stop_tokens = stop_tokens
        self._stop = stop
        self._streamed = 0  # characters

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the continuation."""
        return self._prompt_length + len(self.tokens)

    def extend(self, tokens: list[int]) -> int:
        """Takes tokens up to the row's end; returns how many of them belong to it, a stop token included."""
        before = len(self.tokens)
        end = next((i for i, token in enumerate(tokens) if token in self._stop_tokens), None)
        self.tokens += tokens[:end]
        if self._stop and self._find_stop(len(self.tokens)) is not None:
            # The fewest tokens that hold a stop string: the result must not depend on how many come at a time.
            counts = range(len(self.tokens) + 1)
            found = bisect.bisect_left(counts, True, before, key=lambda n: self._find_stop(n) is not None)
            self.tokens = self.tokens[:found]
            self._end("stop_string", self._decode(found)[: self._find_stop(found)])
            return found - before
        if end is not None:
            self._end("stop_token", self._decode(len(self.tokens)))
            return end + 1
        return len(tokens)

    def finish(self, reason: FinishReason = "length") -> None:
        """Ends the row where it is, if nothing else did."""
        if self.live:
            self._end(reason, self._decode(len(self.tokens)))

    def piece(self) -> str:
        """The text that has become certain since the last call."""
        text = self.text
        if self.live:
            text = self._decode(len(self.tokens))
            text = text[: certain_length(text, self._stop)]
        piece = text[self._streamed :]
        self._streamed += len(piece)
        return piece

    def _end(self, reason: FinishReason, text: str) -> None:
        self.live, self.reason, self.text = False, reason, text

    def _decode(self, count: int) -> str:
        """Text of the first `count` tokens."""
        text = self._tokenizer.decode([*self._context, *self.tokens[:count]])
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        return self._tokenizer.decode(self.tokens[:count])

    def _find_stop(self, count: int) -> int | None:
        """Where the first stop string begins in the text of the first `count` tokens, or None."""
        text = self._decode(count)
        return min((at for at in map(text.find, self._stop) if at >= 0), default=None)


def certain_length(text: str, stop: tuple[str, ...]) -> int:
    """How many characters of a growing text no later token can change or make part of a stop string."""
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # what the bytes of an unfinished character decode to
    longest = max(map(len, stop), default=0)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(string.startswith(text[start:]) for string in stop):
            return start
    return len(text)
