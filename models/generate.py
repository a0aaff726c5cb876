# SPDX-License-Identifier: Apache-2.0
"""Text from a language model: one prefill over the prompts, then token by token over a preallocated KV cache.

    prompts --encode, pad right--> tokens [B, T] --prefill--> cache L x [B, S, K, H], first token of each row
                                                                |
    text <--decode, cut at stops-- tokens [B, CHUNK] <--decode: a loop on the device, cache updated in place

Two programs, the prefill and the loop of decode_loop.py, are compiled once per bucket: the batch B, the padded prompt
length T and the cache size S are rounded up to powers of two. Sampling settings, stop tokens, lengths and the seed are
data; to change them compiles nothing. The host looks at the tokens once a chunk: it makes text of them,
streams it, and searches it for stop strings; within a chunk the device ends by itself when every row has met
a stop token.

`generate` is the short way; `Generator` keeps a model ready and also reports tokens, reasons and timings. Requests that
come and go are for batcher.py.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from models import decode_loop
from models.continuation import Continuation, FinishReason
from models.decode_loop import CHUNK, Settings, State
from models.decoder import Decoder
from models.llama import Llama
from models.sampling import Sampling, is_integer

if TYPE_CHECKING:
    from models.tokenizer import Tokenizer

type Stream = Callable[[int, str], object]

STREAM_CHUNK = 4  # decode steps between two looks of the host while streaming: few enough to read along
SMALLEST_PROMPT_BUCKET = 32
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
        stop_set = {*self.tokenizer.eos_ids, *self._checked_stop_tokens(stop_tokens)}
        stop = _checked_stop(stop)
        encoded = self.encode(_checked_prompts(prompts), add_bos)
        size = self._cache_size([len(ids) for ids in encoded], max_new_tokens, cache_size)
        tokens, lengths = _padded(encoded, size)
        settings = Settings(
            seeds=_checked_seed(seed),
            request_ids=_padded_request_ids(request_ids, len(encoded), len(tokens)),
            sampling=(sampling or Sampling()).arrays(),
            stop_tokens=_padded_stop_tokens(stop_set),
            limits=np.int32(max_new_tokens),
        )
        rows = [Continuation(self.tokenizer, ids, stop_set, stop) for ids in encoded]
        timings = Timings(prefill_tokens=sum(map(len, encoded)))

        state = self._prefill(tokens, lengths, settings, size, rows, timings)
        _emit(rows, stream)
        left = max_new_tokens - 1
        while left and any(row.live for row in rows):
            steps = min(left, CHUNK if stream is None else STREAM_CHUNK)
            state = self._decode(state, steps, settings, rows, timings)
            left -= steps
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
        encoded = [list(self.tokenizer.encode(prompt, add_bos=add_bos)) for prompt in prompts]
        for row, ids in enumerate(encoded):
            if not ids:
                raise ValueError(
                    f"prompt {row} is empty ({prompts[row]!r}), but a model needs one token to begin with: "
                    "pass some text, or add_bos=True if the tokenizer has a beginning-of-text token"
                )
            if max(ids) >= self.config.vocab_size:
                raise ValueError(
                    f"prompt {row} encodes to token {max(ids)}, but the model has vocab_size="
                    f"{self.config.vocab_size}: this tokenizer does not belong to this model"
                )
        return encoded

    def _prefill(self, tokens, lengths, settings: Settings, size: int, rows, timings: Timings) -> State:
        """The state after the prompts; gives each row its first token."""
        call = functools.partial(decode_loop.prefill, self.decoder, tokens, lengths, settings)
        call = functools.partial(call, cache_size=size, drawable=self._drawable)
        timings.compile_seconds += _compile(call)
        start = time.perf_counter()
        state = call()
        first = np.asarray(state.token)  # waits for the device
        timings.prefill_seconds += time.perf_counter() - start
        for row, token in zip(rows, first.tolist(), strict=False):
            row.extend([token])
        return state

    def _decode(self, state: State, steps: int, settings: Settings, rows, timings: Timings) -> State:
        """The state after at most `steps` more tokens, which the rows are given. Uses up the old state."""
        done = np.ones(len(state.token), bool)
        done[: len(rows)] = [not row.live for row in rows]
        call = functools.partial(decode_loop.decode, self.decoder, state, done, np.int32(steps), settings)
        call = functools.partial(call, drawable=self._drawable)
        if not timings.decode_seconds:  # the first of the call; the others have the same shapes
            timings.compile_seconds += _compile(call)
        start = time.perf_counter()
        state, drawn, ran = call()
        drawn, ran = np.asarray(drawn), int(ran)
        timings.decode_seconds += time.perf_counter() - start
        timings.decode_bytes += ran * self.decoder.weight_bytes
        for row, columns in zip(rows, drawn[:, :ran].tolist(), strict=False):
            if row.live:
                attended = row.length  # tokens that the first of these steps attends to
                taken = row.extend(columns)
                timings.decode_tokens += taken
                timings.decode_bytes += sum(map(self.decoder.attention_bytes, range(attended, attended + taken)))
        return state

    def _cache_size(self, lengths: list[int], max_new_tokens: int, requested: int | None) -> int:
        """S: what was asked for, or the bucket of the longest row. ValueError if a row does not fit."""
        if not is_integer(max_new_tokens) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be an integer >= 1, got {max_new_tokens!r}")
        if requested is not None and (not is_integer(requested) or requested < 1):
            raise ValueError(f"cache_size must be an integer >= 1, or None, got {requested!r}")
        positions = self.config.max_positions
        limit = min(requested or positions, positions)
        for row, length in enumerate(lengths):
            total = length + max_new_tokens
            if total <= limit:
                continue
            fixes = []
            if max_new_tokens < limit:
                fixes.append(f"shorten the prompt to {limit - max_new_tokens} tokens")
            if length < limit:
                fixes.append(f"lower max_new_tokens to {limit - length}")
            if total <= positions:
                fixes.append(f"raise cache_size to {total}")
            room = f"cache_size={limit}" if limit < positions else f"the model's max_positions={limit}"
            raise ValueError(
                f"prompt {row} has {length} tokens and with max_new_tokens={max_new_tokens} needs {total}, "
                f"more than {room}: {', or '.join(fixes) or 'shorten the prompt and lower max_new_tokens'}"
            )
        if requested:
            return limit
        return min(_bucket(max(lengths) + max_new_tokens, SMALLEST_CACHE_BUCKET), limit)

    def _checked_stop_tokens(self, stop_tokens: Sequence[int]) -> Sequence[int]:
        for token in stop_tokens:
            if not (is_integer(token) and 0 <= token < self.config.vocab_size):
                raise ValueError(f"stop_tokens must be ids in [0, {self.config.vocab_size}), got {token!r}")
        return stop_tokens


def _compile(call: functools.partial) -> float:
    """Compiles a jitted call, if that was not done before, so that the call itself only runs; the seconds."""
    start = time.perf_counter()
    call.func.lower(*call.args, **call.keywords).compile()
    return time.perf_counter() - start


def _emit(rows: list[Continuation], stream: Stream | None) -> None:
    if stream is None:
        return
    for index, row in enumerate(rows):
        if piece := row.piece():
            stream(index, piece)


def _bucket(size: int, smallest: int) -> int:
    """The smallest power of two that is at least `size` and at least `smallest`, itself a power of two."""
    return max(smallest, 1 << (size - 1).bit_length())


def _padded(encoded: list[list[int]], cache_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Token lists as int32 [B, T], padded to a bucket on both axes, and their lengths int32 [B]."""
    width = min(_bucket(max(map(len, encoded)), SMALLEST_PROMPT_BUCKET), cache_size)
    tokens = np.zeros((_bucket(len(encoded), 1), width), np.int32)
    lengths = np.ones(len(tokens), np.int32)  # a row that only fills the bucket counts as one token
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)] = ids
        lengths[row] = len(ids)
    return tokens, lengths


def _padded_request_ids(request_ids: Sequence[int] | None, count: int, batch: int) -> np.ndarray:
    ids = range(count) if request_ids is None else request_ids
    if len(ids) != count:
        raise ValueError(f"request_ids must give one id to each of the {count} prompts, got {len(ids)}")
    return np.resize(np.asarray(ids, np.int32), batch)


def _padded_stop_tokens(stop_tokens: set[int]) -> np.ndarray:
    """int32 of bucketed length, so that one stop token more rarely compiles anything; -1 is no token."""
    padded = np.full(_bucket(max(1, len(stop_tokens)), 8), -1, np.int32)
    padded[: len(stop_tokens)] = sorted(stop_tokens)
    return padded


def _checked_prompts(prompts: str | Sequence[str]) -> list[str]:
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("prompts is empty: pass a string, or a sequence of at least one string")
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts must be a string or a sequence of strings, but prompt {row} is {prompt!r}")
    return prompts


def _checked_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    for string in stop:
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop must hold strings of at least one character, got {string!r}")
    return stop


def _checked_seed(seed: int) -> np.uint32:
    if not (is_integer(seed) and 0 <= seed < 2**32):
        raise ValueError(f"seed must be an integer in [0, 2**32), got {seed!r}")
    return np.uint32(seed)


def _rate(amount: int, seconds: float) -> float:
    return amount / seconds if seconds else 0.0
