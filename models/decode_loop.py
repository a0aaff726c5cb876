# SPDX-License-Identifier: Apache-2.0
"""What the device does between two looks of the host: the prefill of some rows, or some decode steps.

    prefill: prompts -> cache, first token of each row            decode: while some row is live and steps are left:
                                                                      queue STEPS times: logits = step(token),
                                                                                         token = draw(logits)

The prefill and some steps in a row are jitted; what they are given besides shapes is data, so that no request compiles
anything, but for the first that is not greedy. The arrays of a State are donated: the cache is updated in place, and
the State passed in is used up. Shapes are rounded up to few sizes by `bucket`; the functions that do so are below.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.cache import KVCache
from models.decoder import Decoder
from models.paged_cache import PagedCache
from models.sampling import greedy, request_keys, sample

# Steps of one program, by platform. For an accelerator a host takes milliseconds to hand over the arrays of all layers,
# more than a step of few bits takes. A CPU does what it is told at once, and what it does for nothing costs the most.
STEPS = {"cpu": 1, "gpu": 4, "tpu": 4}
AHEAD = 2  # programs that are queued while the tokens of one are looked at
SMALLEST_PROMPT_BUCKET = 32


# --- Programs ------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """What the device must know of the requests; each may be one for all rows where [B] is optional.

    Attributes:
      seeds: uint32 [] or [B].
      request_ids: int32 [B]; row b draws from (its seed, its id).
      sampling: arguments of `sample`, each [] or [B].
      stop_tokens: int32 [n] or [B, n], padded with -1.
      limits: int32 [] or [B], tokens that a row draws at most.
    """

    seeds: jax.typing.ArrayLike
    request_ids: jax.typing.ArrayLike
    sampling: dict[str, Any]
    stop_tokens: jax.typing.ArrayLike
    limits: jax.typing.ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A batch between two steps.

    Attributes:
      cache: of all rows.
      token: int32 [B], drawn last and not in the cache yet.
      count: int32 [B], tokens drawn so far.
    """

    cache: KVCache | PagedCache
    token: jax.Array
    count: jax.Array


@functools.partial(jax.jit, static_argnames=("cache_size", "drawable"))
def prefill(decoder: Decoder, tokens, lengths, settings: Settings, *, cache_size: int, drawable: int) -> State:
    """Runs right-padded prompts [B, T] into a new cache and draws the first token of each row.

    `drawable`: tokens of this id and beyond are never drawn.
    """
    cache = KVCache.zeros(decoder.config, len(tokens), cache_size, decoder.dtype)
    return _prefill(decoder, tokens, lengths, settings, cache, drawable)


@functools.partial(jax.jit, static_argnames="drawable", donate_argnames="cache")
def prefill_pages(decoder: Decoder, tokens, lengths, settings: Settings, cache: PagedCache, *, drawable: int) -> State:
    """The same into the pages of `cache`, which has a row for each prompt and is used up."""
    return _prefill(decoder, tokens, lengths, settings, cache, drawable)


def decode_program(decoder: Decoder, state: State, done, settings: Settings, *, drawable: int) -> functools.partial:
    """What `Decoding` calls again and again, ready to be compiled: some steps of the rows not `done`, bool [B]."""
    draws = bool(np.any(np.asarray(settings.sampling["temperature"]) > 0))
    (device, *_) = decoder.embedding.devices()
    options = {"drawable": drawable, "draws": draws, "steps": STEPS[device.platform]}
    # What does not change is brought to the device once, not by every call.
    return functools.partial(_decode_steps, decoder, state, *jax.device_put((done, settings)), **options)


@functools.partial(jax.jit, static_argnames=("drawable", "draws", "steps"), donate_argnames="state")
def _decode_steps(
    decoder: Decoder, state: State, done: jax.Array, settings: Settings, *, drawable: int, draws: bool, steps: int
) -> tuple[State, jax.Array, jax.Array, jax.Array]:
    """The new state, which rows are done, tokens [steps, B], and whether all rows are done.

    `draws`: whether some row is not greedy. Otherwise nothing is asked of the device that the host knows.
    """

    def step(carry: tuple[State, jax.Array], _: None) -> tuple[tuple[State, jax.Array], jax.Array]:
        state, done = carry
        cache: Any = state.cache
        logits, cache = decoder.step(state.token, cache, live=~done)
        logits = logits[:, :drawable]
        if draws:
            keys = request_keys(settings.seeds, settings.request_ids)
            token = sample(logits, keys, state.count, **settings.sampling)
        else:
            token = greedy(logits)
        count = state.count + 1
        done |= jnp.any(token[:, None] == settings.stop_tokens, axis=-1) | (count >= settings.limits)
        return (State(cache, token, count), done), token

    # A loop of a known length: the device runs it without asking.
    (state, done), tokens = jax.lax.scan(step, (state, jnp.asarray(done)), None, length=steps)
    return state, done, tokens, jnp.all(done)


def _prefill(decoder: Decoder, tokens, lengths, settings: Settings, cache, drawable: int) -> State:
    hidden, cache = decoder.prefill(tokens, lengths, cache)
    # Only the last token of each row is asked for its logits: [B, T, V] would dwarf everything else.
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    keys = request_keys(settings.seeds, settings.request_ids)
    token = sample(decoder.logits(last)[:, :drawable], keys, 0, **settings.sampling)
    return State(cache, token, jnp.ones_like(token))


def compile_seconds(call: functools.partial) -> float:
    """Compiles a jitted call, if that was not done before, so that the call itself only runs; how long it took."""
    start = time.perf_counter()
    call.func.lower(*call.args, **call.keywords).compile()
    return time.perf_counter() - start


# --- Running ahead -------------------------------------------------------------------------------------------


class Decoding:
    """Tokens that are drawn one program after the other, as they come: int32 [B, steps of a program], of which a row's
    own end where it met a stop token or its limit.

    Programs are queued ahead of the device, which never waits for the host: a loop that asks whether all rows are done
    would, on GPUs. That they are is known AHEAD programs late, so that as many may be for nothing.

    Attributes:
      state: after all programs that were queued.
    """

    def __init__(self, program: functools.partial, steps: int):
        """`program` is of `decode_program`; steps are rounded up to whole programs, fewer if all rows end before."""
        _, self.state, self._done, self._settings = program.args
        self._program, self._steps = program, steps

    def __iter__(self) -> Iterator[np.ndarray]:
        queued: collections.deque[tuple[jax.Array, jax.Array]] = collections.deque()
        for _ in range(-(-self._steps // self._program.keywords["steps"])):
            queued.append(self._queue())
            if len(queued) > AHEAD:
                tokens, all_done = queued.popleft()
                yield np.asarray(tokens).T
                if all_done:
                    return
        for tokens, _ in queued:
            yield np.asarray(tokens).T

    def _queue(self) -> tuple[jax.Array, jax.Array]:
        """One program more: its tokens, and whether all rows are done."""
        program, decoder = self._program, self._program.args[0]
        called = program.func(decoder, self.state, self._done, self._settings, **program.keywords)
        self.state, self._done, tokens, all_done = called
        return tokens, all_done


# --- Shapes --------------------------------------------------------------------------------------------------


def bucket(size: int, smallest: int) -> int:
    """The smallest power of two that is at least `size` and at least `smallest`, itself a power of two."""
    return max(smallest, 1 << (size - 1).bit_length())


def pad_prompts(encoded: list[list[int]], cache_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Token lists as int32 [B, T], padded to a bucket on both axes, and their lengths int32 [B]; a row that only fills
    the bucket has length 0."""
    width = min(bucket(max(map(len, encoded)), SMALLEST_PROMPT_BUCKET), cache_size)
    tokens = np.zeros((bucket(len(encoded), 1), width), np.int32)
    lengths = np.zeros(len(tokens), np.int32)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)] = ids
        lengths[row] = len(ids)
    return tokens, lengths


def pad_stop_tokens(stop_tokens: Sequence[set[int]]) -> np.ndarray:
    """int32 [B, n], n bucketed so that one stop token more rarely compiles anything; -1 is no token."""
    padded = np.full((len(stop_tokens), bucket(max(1, *map(len, stop_tokens)), 8)), -1, np.int32)
    for row, tokens in enumerate(stop_tokens):
        padded[row, : len(tokens)] = sorted(tokens)
    return padded
