# SPDX-License-Identifier: Apache-2.0
"""Text from a language model: one prefill over the prompts, then token by token over a preallocated KV cache.

    prompts --encode, pad right--> tokens [B, T] --prefill--> cache [L, B, S, K, H], first token of each row
                                                                |
    text <--decode, cut at stops-- tokens [B, CHUNK] <--decode: a loop on the device, cache updated in place

Two programs, `_prefill` and `_decode`, are compiled once per bucket: the batch B, the padded prompt length T
and the cache size S are rounded up to powers of two. Sampling settings, stop tokens, lengths and the seed are
data; to change them compiles nothing. The host looks at the tokens once a chunk: it makes text of them,
streams it, and searches it for stop strings; within a chunk the device ends by itself when every row has met
a stop token.

`generate` is the short way; `Generator` keeps a model ready and also reports tokens, reasons and timings.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.continuation import Continuation, FinishReason
from models.llama import KVCache, Llama
from models.sampling import Sampling, is_integer, request_keys, sample, step_keys

if TYPE_CHECKING:
    from models.tokenizer import Tokenizer

type Stream = Callable[[int, str], object]

CHUNK = 32  # decode steps between two looks of the host at the tokens
STREAM_CHUNK = 4  # the same while streaming: few enough to read along
SMALLEST_PROMPT_BUCKET = 32
SMALLEST_CACHE_BUCKET = 64


def generate(
    model: Llama,
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
    """A model and its tokenizer, ready to generate, with the weights that the model has when this is made."""

    def __init__(self, model: Llama, tokenizer: Tokenizer):
        self.config = model.config
        self.tokenizer = tokenizer
        graphdef, self._weights = nnx.split(model)
        self._prefill_program, self._decode_program = _programs(graphdef)
        self.cache_dtype = jnp.dtype(model.dtype)
        # Ids beyond the tokenizer's only pad the embedding table; they have no text and are never drawn.
        self._drawable = min(self.config.vocab_size, tokenizer.vocab_size)
        self._weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self._weights))
        if not self.config.tie_embeddings:
            self._weight_bytes -= model.embedding.embedding[...].nbytes

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
        settings = _Settings(
            seed=_checked_seed(seed),
            request_ids=_padded_request_ids(request_ids, len(encoded), len(tokens)),
            sampling=(sampling or Sampling()).arrays(),
            stop_tokens=_padded_stop_tokens(stop_set),
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

    def _prefill(self, tokens, lengths, settings: _Settings, size: int, rows, timings: Timings) -> _State:
        """The state after the prompts; gives each row its first token."""
        call = functools.partial(self._prefill_program, self._weights, tokens, lengths, settings)
        call = functools.partial(call, cache_size=size, cache_dtype=self.cache_dtype, drawable=self._drawable)
        timings.compile_seconds += _compile(call)
        start = time.perf_counter()
        state = call()
        first = np.asarray(state.token)  # waits for the device
        timings.prefill_seconds += time.perf_counter() - start
        for row, token in zip(rows, first.tolist(), strict=False):
            row.extend([token])
        return state

    def _decode(self, state: _State, steps: int, settings: _Settings, rows, timings: Timings) -> _State:
        """The state after at most `steps` more tokens, which the rows are given. Uses up the old state."""
        done = np.ones(len(state.token), bool)
        done[: len(rows)] = [not row.live for row in rows]
        call = functools.partial(self._decode_program, self._weights, state, done, np.int32(steps), settings)
        call = functools.partial(call, drawable=self._drawable)
        if not timings.decode_seconds:  # the first of the call; the others have the same shapes
            timings.compile_seconds += _compile(call)
        start = time.perf_counter()
        state, drawn, ran = call()
        drawn, ran = np.asarray(drawn), int(ran)
        timings.decode_seconds += time.perf_counter() - start
        timings.decode_bytes += ran * self._weight_bytes
        for row, columns in zip(rows, drawn[:, :ran].tolist(), strict=False):
            if row.live:
                attended = row.length  # tokens that the first of these steps attends to
                taken = row.extend(columns)
                timings.decode_tokens += taken
                timings.decode_bytes += sum(map(self._attention_bytes, range(attended, attended + taken)))
        return state

    def _attention_bytes(self, tokens: int) -> int:
        """Bytes of keys and values that one token reads to attend to `tokens` tokens, itself among them."""
        config = self.config
        seen = min(tokens, config.sliding_window or tokens)
        numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim * seen
        return numbers * self.cache_dtype.itemsize

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Settings:
    """What the device must know of a call; all of it is data."""

    seed: jax.typing.ArrayLike  # uint32 []
    request_ids: jax.typing.ArrayLike  # int32 [B]
    sampling: dict[str, Any]  # arguments of `sample`
    stop_tokens: jax.typing.ArrayLike  # int32, padded with -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """A batch between two steps."""

    cache: KVCache
    token: jax.Array  # int32 [B], drawn last and not in the cache yet
    count: jax.Array  # int32 [], tokens drawn so far


def _prefill(graphdef, weights, tokens, lengths, settings, *, cache_size, cache_dtype, drawable) -> _State:
    """Runs right-padded prompts [B, T] into a new cache and draws the first token of each row."""
    model: Llama = nnx.merge(graphdef, weights)
    cache = KVCache.zeros(model.config, tokens.shape[0], cache_size, cache_dtype)
    hidden, cache = model.hidden(model.embed(tokens), cache=cache)
    # Only the last token of each row is asked for its logits: [B, T, V] would dwarf everything else.
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    token = _draw(model, last, settings, 0, drawable)
    return _State(dataclasses.replace(cache, lengths=lengths), token, jnp.ones((), jnp.int32))


def _decode(graphdef, weights, state, done, steps, settings, *, drawable) -> tuple[_State, jax.Array, jax.Array]:
    """Up to `steps` tokens more, fewer if every row is done: state, tokens [B, CHUNK], steps that ran."""

    def unfinished(carry):
        step, _, done, _ = carry
        return (step < steps) & ~jnp.all(done)

    def advance(carry):
        step, state, done, drawn = carry
        model: Llama = nnx.merge(graphdef, weights)
        hidden, cache = model.hidden(model.embed(state.token[:, None]), cache=state.cache)
        token = _draw(model, hidden, settings, state.count, drawable)
        done |= jnp.any(token[:, None] == settings.stop_tokens, axis=-1)
        return step + 1, _State(cache, token, state.count + 1), done, drawn.at[:, step].set(token)

    drawn = jnp.zeros((done.shape[0], CHUNK), jnp.int32)
    step, state, _, drawn = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), state, done, drawn))
    return state, drawn, step


def _draw(model: Llama, hidden: jax.Array, settings: _Settings, count, drawable: int) -> jax.Array:
    """Token number `count` of each row from its last hidden state [B, 1, D] -> int32 [B]."""
    logits = model.logits(hidden)[:, 0, :drawable]
    keys = step_keys(request_keys(settings.seed, settings.request_ids), count)
    return sample(logits, keys, **settings.sampling)


@functools.lru_cache(maxsize=8)
def _programs(graphdef: nnx.GraphDef) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`_prefill` and `_decode` jitted for models of one structure, shared by all Generators of such models.

    As a static argument the structure would be hashed at every call, which takes longer than some steps.
    """
    prefill = functools.partial(_prefill, graphdef)
    decode = functools.partial(_decode, graphdef)
    return (
        jax.jit(prefill, static_argnames=("cache_size", "cache_dtype", "drawable")),
        jax.jit(decode, static_argnames=("drawable",), donate_argnames=("state",)),
    )


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
