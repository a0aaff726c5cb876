# SPDX-License-Identifier: Apache-2.0
"""Text from a language model: one prefill over the prompts, then token by token over a preallocated KV cache.

    prompts --encode, pad right--> tokens [B, T] --prefill--> cache L x [B, S, K, H], first token of each row
                                                                |
    text <--decode, cut at stops-- tokens of a few steps <--decode: queued ahead of the host, cache in place

Two programs, the prefill and the steps of decode_loop.py, are compiled once per bucket: the batch B, the padded prompt
length T and the cache size S are rounded up to powers of two. Sampling settings, stop tokens, lengths and the seed are
data; to change them compiles nothing, but that a greedy step is a program of its own. The host makes text of tokens
while the device draws the next, streams it, and searches it for stop strings; no more steps are queued once every row
has ended.

`generate` is the short way; `Generator` keeps a model ready and also reports tokens, reasons and timings. Requests that
come and go are for batcher.py.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from models import checks, decode_loop
from models.continuation import Continuation, FinishReason
from models.decode_loop import (
    Decoding,
    Settings,
    State,
    bucket,
    compile_seconds,
    pad_prompts,
    pad_stop_tokens,
)
from models.decoder import Decoder
from models.llama import Llama
from models.sampling import Sampling

if TYPE_CHECKING:
    from models.tokenizer import Tokenizer

type Stream = Callable[[int, str], object]

SMALLEST_CACHE_BUCKET = 64


def generate(
    model: Llama | Decoder,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    stop_tokens: Sequence[int] = (),
    cache_size: int | None = None,
    add_bos: bool = False,
    stream: Stream | None = None,
) -> list[str]:
    """Continues each prompt; returns the continuations only, in the order of the prompts.

    Prompts are raw text: no chat template is applied, and no beginning-of-text token is added unless
    `add_bos`. A row ends at one of the tokenizer's end-of-text tokens, at a token of `stop_tokens`, before the
    first occurrence of a string of `stop`, or after `max_new_tokens`.

    Args:
      model: of a Llama a `Decoder` is made in every call, which copies its weights; pass a Decoder to call this often.
      temperature, top_k, top_p, min_p: see `models.sampling`; the default is greedy.
      seed: in [0, 2**32). The same call with the same seed gives the same text, bit for bit. Row i draws from
        (seed, i), so its randomness does not depend on the rest of the batch.
      cache_size: tokens of prompt and continuation that a row can hold; None: what the longest row needs.
      stream: called as stream(row, piece) while text appears. The pieces of a row concatenate to its result;
        no piece holds a part of an unfinished character or the beginning of a stop string.

    Raises:
      ValueError: a prompt is empty or does not fit the cache or the model's positions; a bad setting.
      TypeError: a prompt is not text.

    Example:
      >>> model, tokenizer = load_model("smollm2")
      >>> generate(model, tokenizer, "The capital of France is", max_new_tokens=8)
    """
    result = Generator(model, tokenizer).generate(
        prompts,
        max_new_tokens,
        Sampling(temperature, top_k, top_p, min_p),
        seed=seed,
        stop=stop,
        stop_tokens=stop_tokens,
        cache_size=cache_size,
        add_bos=add_bos,
        stream=stream,
    )
    return result.texts


@dataclasses.dataclass
class Timings:
    """Where the time went. Compiling is apart; the host's handling of text is in none of the seconds.

    `prefill_tokens` are the prompts' own, without padding. `decode_tokens` leave out the first token of each
    row, which the prefill gives. `decode_bytes` is the least that decoding can read: in each step every
    weight once (of an embedding table that is not also the output projection, next to nothing), and the keys
    and values that each live row attends to. Padding and activations are not counted, so the rate is a lower
    bound of the traffic.
    """

    compile_seconds: float = 0.0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    decode_bytes: int = 0

    def count_decoded(self, decoder: Decoder, attended: int, taken: int) -> None:
        """Counts `taken` tokens of a row, of which the first attended to `attended` tokens."""
        self.decode_tokens += taken
        self.decode_bytes += sum(map(decoder.attention_bytes, range(attended, attended + taken)))

    @property
    def prefill_tokens_per_second(self) -> float:
        return _rate(self.prefill_tokens, self.prefill_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        """Of all rows together; 0 if the tokens of the prefill were all there was."""
        return _rate(self.decode_tokens, self.decode_seconds)

    @property
    def decode_bytes_per_second(self) -> float:
        return _rate(self.decode_bytes, self.decode_seconds)

    def __add__(self, other: Timings) -> Timings:
        """Two calls as one."""
        names = [field.name for field in dataclasses.fields(self)]
        return Timings(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """What each row said, why it ended, and how long it all took. `tokens` are without the stop token."""

    texts: list[str]
    tokens: list[list[int]]
    finish_reasons: list[FinishReason]
    timings: Timings


class Generator:
    """A model and its tokenizer, ready to generate, with the weights that the model has when this is made.

    Of a Llama a `Decoder` is made: a copy of the weights, as large as the model is in its compute dtype. The Llama
    itself is not kept; drop it to have its memory back.
    """

    def __init__(self, model: Llama | Decoder, tokenizer: Tokenizer):
        self.decoder = model if isinstance(model, Decoder) else Decoder.from_model(model)
        self.config = self.decoder.config
        self.tokenizer = tokenizer
        # Ids beyond the tokenizer's only pad the embedding table; they have no text and are never drawn.
        self._drawable = min(self.config.vocab_size, tokenizer.vocab_size)

    def generate(
        self,
        prompts: str | Sequence[str],
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        *,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        cache_size: int | None = None,
        add_bos: bool = False,
        request_ids: Sequence[int] | None = None,
        stream: Stream | None = None,
    ) -> GenerationResult:
        """As the function `generate`, with all that there is to know about the outcome.

        Args:
          sampling: None is greedy.
          request_ids: an integer for each prompt; a row draws from (seed, its id). None numbers the rows 0,
            1, ...
        """
        stop_set = {*self.tokenizer.eos_ids, *checks.checked_stop_tokens(stop_tokens, self.config)}
        stop = checks.checked_stop(stop)
        encoded = self.encode([prompts] if isinstance(prompts, str) else prompts, add_bos)
        size = self._cache_size([len(ids) for ids in encoded], max_new_tokens, cache_size)
        tokens, lengths = pad_prompts(encoded, size)
        settings = Settings(
            seeds=checks.checked_seed(seed),
            request_ids=_padded_request_ids(request_ids, len(encoded), len(tokens)),
            sampling=(sampling or Sampling()).arrays(),
            stop_tokens=pad_stop_tokens([stop_set])[0],
            limits=np.int32(max_new_tokens),
        )
        rows = [Continuation(self.tokenizer, ids, stop_set, stop) for ids in encoded]
        timings = Timings(prefill_tokens=sum(map(len, encoded)))

        state = self._prefill(tokens, lengths, settings, size, rows, timings)
        _emit(rows, stream)
        if max_new_tokens > 1 and any(row.live for row in rows):
            for _ in self._decode(state, max_new_tokens - 1, settings, rows, timings):
                _emit(rows, stream)
        for row in rows:
            row.finish()
        _emit(rows, stream)
        return GenerationResult(
            texts=[row.text for row in rows],
            tokens=[row.tokens for row in rows],
            finish_reasons=[row.reason for row in rows],
            timings=timings,
        )

    def encode(self, prompts: Sequence[str], add_bos: bool = False) -> list[list[int]]:
        """Token ids of each prompt; ValueError for a prompt without any, or with ids beyond the model's."""
        if not len(prompts):
            raise ValueError("prompts is empty: pass a string, or a sequence of at least one string")
        return [
            checks.encoded_prompt(self.tokenizer, self.config, prompt, add_bos, f"prompt {row}")
            for row, prompt in enumerate(prompts)
        ]

    def _prefill(self, tokens, lengths, settings: Settings, size: int, rows, timings: Timings) -> State:
        """The state after the prompts; gives each row its first token."""
        call = functools.partial(decode_loop.prefill, self.decoder, tokens, lengths, settings)
        call = functools.partial(call, cache_size=size, drawable=self._drawable)
        timings.compile_seconds += compile_seconds(call)
        start = time.perf_counter()
        state = call()
        first = np.asarray(state.token)  # waits for the device
        timings.prefill_seconds += time.perf_counter() - start
        for row, token in zip(rows, first.tolist(), strict=False):
            row.extend([token])
        return state

    def _decode(self, state: State, left: int, settings: Settings, rows, timings: Timings) -> Iterator[None]:
        """Gives the rows at most `left` tokens more, some at a time. Uses up the state."""
        done = np.ones(len(state.token), bool)
        done[: len(rows)] = [not row.live for row in rows]
        program = decode_loop.decode_program(self.decoder, state, done, settings, drawable=self._drawable)
        timings.compile_seconds += compile_seconds(program)
        start = time.perf_counter()
        for drawn in Decoding(program, left):
            timings.decode_seconds += time.perf_counter() - start
            drawn = drawn[:, :left]
            left -= drawn.shape[1]
            timings.decode_bytes += drawn.shape[1] * self.decoder.weight_bytes
            for row, columns in zip(rows, drawn.tolist(), strict=False):
                if row.live:
                    attended = row.length  # tokens that the first of these steps attends to
                    timings.count_decoded(self.decoder, attended, row.extend(columns))
            yield
            if not any(row.live for row in rows):
                return
            start = time.perf_counter()

    def _cache_size(self, lengths: list[int], max_new_tokens: int, requested: int | None) -> int:
        """S: what was asked for, or the bucket of the longest row. ValueError if a row does not fit."""
        checks.check_count("max_new_tokens", max_new_tokens)
        checks.check_count("cache_size", requested, optional=True)
        positions = self.config.max_positions
        limit = min(requested or positions, positions)
        room = f"cache_size={limit}" if limit < positions else f"the model's max_positions={limit}"
        for row, length in enumerate(lengths):
            total = length + max_new_tokens
            raised = f"raise cache_size to {total}" if total <= positions else None
            checks.check_fits(length, max_new_tokens, limit, room, raised=raised, name=f"prompt {row}")
        if requested:
            return limit
        return min(bucket(max(lengths) + max_new_tokens, SMALLEST_CACHE_BUCKET), limit)


def _emit(rows: list[Continuation], stream: Stream | None) -> None:
    if stream is None:
        return
    for index, row in enumerate(rows):
        if piece := row.piece():
            stream(index, piece)


def _padded_request_ids(request_ids: Sequence[int] | None, count: int, batch: int) -> np.ndarray:
    ids = range(count) if request_ids is None else request_ids
    if len(ids) != count:
        raise ValueError(f"request_ids must give one id to each of the {count} prompts, got {len(ids)}")
    return np.resize(np.asarray(ids, np.int32), batch)


def _rate(amount: int, seconds: float) -> float:
    return amount / seconds if seconds else 0.0
