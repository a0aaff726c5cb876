# SPDX-License-Identifier: Apache-2.0
"""What the device does between two looks of the host: the prefill of some rows, or a chunk of decode steps.

    prefill: prompts -> cache, first token of each row            decode: while some row is live and steps are left:
                                                                      logits = step(token), token = draw(logits)

Both are jitted; what they are given besides shapes is data, so that no request compiles anything. The arrays of a State
are donated: the cache is updated in place, and the State passed in is used up.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from models.cache import KVCache
from models.decoder import Decoder
from models.sampling import request_keys, sample

CHUNK = 32  # decode steps between two looks of the host at the tokens, at most


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
      cache: a KVCache or a PagedCache.
      token: int32 [B], drawn last and not in the cache yet.
      count: int32 [B], tokens drawn so far.
    """

    cache: Any
    token: jax.Array
    count: jax.Array


@functools.partial(jax.jit, static_argnames=("cache_size", "drawable"))
def prefill(decoder: Decoder, tokens, lengths, settings: Settings, *, cache_size: int, drawable: int) -> State:
    """Runs right-padded prompts [B, T] into a new cache and draws the first token of each row.

    `drawable`: tokens of this id and beyond are never drawn.
    """
    cache = KVCache.zeros(decoder.config, len(tokens), cache_size, decoder.dtype)
    return _prefill(decoder, tokens, lengths, settings, cache, drawable)


@functools.partial(jax.jit, static_argnames="drawable", donate_argnames="state")
def decode(
    decoder: Decoder, state: State, done: jax.Array, steps: jax.Array, settings: Settings, *, drawable: int
) -> tuple[State, jax.Array, jax.Array]:
    """Up to `steps` tokens more of the rows that are not done, fewer if all become so.

    Returns:
      the new state; tokens, int32 [B, CHUNK], of which a row's own end where it met a stop token or its limit; how many
      steps ran.
    """
    keys = request_keys(settings.seeds, settings.request_ids)

    def unfinished(carry):
        step, _, done, _ = carry
        return (step < steps) & ~jnp.all(done)

    def advance(carry):
        step, state, done, drawn = carry
        logits, cache = decoder.step(state.token, state.cache, live=~done)
        token = sample(logits[:, :drawable], keys, state.count, **settings.sampling)
        count = state.count + 1
        done |= jnp.any(token[:, None] == settings.stop_tokens, axis=-1) | (count >= settings.limits)
        return step + 1, State(cache, token, count), done, drawn.at[:, step].set(token)

    drawn = jnp.zeros((len(done), CHUNK), jnp.int32)
    step, state, _, drawn = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), state, done, drawn))
    return state, drawn, step


def _prefill(decoder: Decoder, tokens, lengths, settings: Settings, cache, drawable: int) -> State:
    hidden, cache = decoder.prefill(tokens, lengths, cache)
    # Only the last token of each row is asked for its logits: [B, T, V] would dwarf everything else.
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    keys = request_keys(settings.seeds, settings.request_ids)
    token = sample(decoder.logits(last)[:, :drawable], keys, 0, **settings.sampling)
    return State(cache, token, jnp.ones_like(token))
