# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: requests join and leave while others are being answered (Yu et al., "Orca", 2022).

    submit --> waiting --a row and all its pages are free: prefill--> running --stop, length--> done: pages are free
                 (first come, first served)                            |  ^
                                                                       v  |  a chunk of steps on the device, then
                                                                    the host looks: text, ends, who comes next

A fixed number of rows decodes; a row without a request costs no attention. All rows share a pool of cache pages
(paged_cache.py). A request gets the pages for its prompt and all of max_new_tokens when it joins, not one by one. That
keeps some pages idle, but whoever runs can finish: no two can wait for each other, nobody is put back in the queue, and
no answer is computed twice, or differently, because others were there. Each is what the request would get alone.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np

from models import checks, decode_loop
from models.continuation import Continuation, FinishReason
from models.decode_loop import (
    SMALLEST_PROMPT_BUCKET,
    Decoding,
    Settings,
    State,
    bucket,
    compile_seconds,
    pad_prompts,
    pad_stop_tokens,
)
from models.decoder import Decoder
from models.generate import Timings
from models.llama import Llama
from models.paged_cache import BlockAllocator, PagedCache
from models.sampling import Sampling, is_integer, stacked_arrays

if TYPE_CHECKING:
    from models.tokenizer import Tokenizer

CHUNK = 32  # decode steps between two looks of the host at the tokens, at most
STREAM_CHUNK = 4  # the same while streaming: few enough to read along
WAITING_CHUNK = 8  # steps between two looks while requests wait for a row that may become free
PREFILL_TOKENS = 4096  # prompts that join at the same time are run together up to so many tokens, padding included


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and what has been said to it so far; made by `ContinuousBatcher.submit`.

    Attributes:
      prompt: the text.
      max_new_tokens, sampling, seed, request_id: as submitted.
      status: "waiting", "running", "done" or "cancelled".
    """

    prompt: str
    max_new_tokens: int
    sampling: Sampling
    seed: int
    request_id: int
    status: Literal["waiting", "running", "done", "cancelled"] = dataclasses.field(default="waiting", init=False)
    _ids: list[int] = dataclasses.field(repr=False)
    _stop_tokens: set[int] = dataclasses.field(repr=False)
    _answer: Continuation = dataclasses.field(repr=False)
    _stream: Callable[[str], object] | None = dataclasses.field(repr=False)
    _pages: list[int] = dataclasses.field(default_factory=list, init=False, repr=False)
    _count: int = dataclasses.field(default=0, init=False, repr=False)  # tokens drawn
    _last: int = dataclasses.field(default=0, init=False, repr=False)  # the last of them

    @property
    def finished(self) -> bool:
        return self.status in ("done", "cancelled")

    @property
    def text(self) -> str:
        """The answer; "" until the request is finished."""
        return self._answer.text

    @property
    def tokens(self) -> list[int]:
        """What was drawn so far, without the stop token."""
        return list(self._answer.tokens)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer ends; None while it does not."""
        return self._answer.reason if self.finished else None


class ContinuousBatcher:
    """Answers many requests with one model, as many at a time as there are rows and pages.

    Not to be called from several threads at once. A callback may submit and cancel.

    >>> from flax import nnx
    >>> from models import ContinuousBatcher, Llama, Tokenizer, preset
    >>> model = Llama(preset("tiny"), rngs=nnx.Rngs(0))
    >>> batcher = ContinuousBatcher(model, Tokenizer.bytes(), max_rows=2, num_pages=8, page_size=16, max_tokens=64)
    >>> requests = [batcher.submit(prompt, max_new_tokens=8) for prompt in ("one", "two", "three")]
    >>> batcher.run()
    >>> [request.status for request in requests]
    ['done', 'done', 'done']
    """

    def __init__(
        self,
        model: Llama | Decoder,
        tokenizer: Tokenizer,
        *,
        max_rows: int = 8,
        num_pages: int | None = None,
        page_size: int = 64,
        max_tokens: int | None = None,
    ):
        """Takes the memory of the pool: 2 L num_pages page_size K H numbers in the model's dtype.

        Args:
          model: of a Llama a `Decoder` is made, which is a copy of its weights.
          tokenizer: the model's.
          max_rows: requests that run at the same time.
          num_pages: of the pool; None: enough for max_rows requests of max_tokens.
          page_size: tokens of a page; the kernels for NVIDIA GPUs take 16 to 256.
          max_tokens: of a request, prompt and answer; None: the model's max_positions.
        """
        self.decoder = model if isinstance(model, Decoder) else Decoder.from_model(model)
        self.tokenizer = tokenizer
        self.timings = Timings()
        positions = self.decoder.config.max_positions
        checks.check_count("max_rows", max_rows)
        checks.check_count("page_size", page_size)
        checks.check_count("num_pages", num_pages, optional=True)
        checks.check_count("max_tokens", max_tokens, optional=True)
        if max_tokens is not None and max_tokens > positions:
            raise ValueError(f"max_tokens={max_tokens} is more than the model's max_positions={positions}: lower it")
        self.max_tokens = max_tokens or positions
        self._page_size = page_size
        self._pages_per_row = -(-self.max_tokens // page_size)
        self._allocator = BlockAllocator(num_pages or max_rows * self._pages_per_row)
        cache = PagedCache.zeros(
            self.decoder.config,
            max_rows,
            num_pages=self._allocator.num_pages,
            page_size=page_size,
            pages_per_row=self._pages_per_row,
            dtype=self.decoder.dtype,
        )
        self._key, self._value = cache.key, cache.value
        self._rows: list[Request | None] = [None] * max_rows
        self._waiting: collections.deque[Request] = collections.deque()
        self._submitted = 0
        self._drawable = min(self.decoder.config.vocab_size, tokenizer.vocab_size)
        self._compiled: set[tuple] = set()
        self._heard: collections.deque[Request] = collections.deque()  # with tokens that were not streamed yet

    # --- Requests ------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        *,
        seed: int = 0,
        request_id: int | None = None,
        stop: str | Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        add_bos: bool = False,
        stream: Callable[[str], object] | None = None,
    ) -> Request:
        """Queues a request; `step` or `run` answer it.

        Args:
          prompt: raw text, as for `models.generate`.
          max_new_tokens: at most so many tokens are drawn.
          sampling: None is greedy.
          seed: in [0, 2**32); the request draws from (seed, request_id).
          request_id: an int32; None numbers the requests 0, 1, ... as they are submitted.
          stop, stop_tokens, add_bos: as for `models.generate`.
          stream: called as stream(piece) while text appears; the pieces concatenate to the answer.

        Raises:
          ValueError: a bad setting, an empty prompt, or more tokens than the model, a row or the whole pool can hold.
          TypeError: the prompt is not text.
        """
        config = self.decoder.config
        checks.check_count("max_new_tokens", max_new_tokens)
        stop_set = {*self.tokenizer.eos_ids, *checks.checked_stop_tokens(stop_tokens, config)}
        ids = checks.encoded_prompt(self.tokenizer, config, prompt, add_bos)
        self._check_fits(len(ids), max_new_tokens)
        request_id = self._submitted if request_id is None else request_id
        if not is_integer(request_id) or not -(2**31) <= request_id < 2**31:
            raise ValueError(f"request_id must be an integer in [-2**31, 2**31), or None, got {request_id!r}")
        request = Request(
            prompt,
            max_new_tokens,
            sampling or Sampling(),
            int(checks.checked_seed(seed)),
            request_id,
            ids,
            stop_set,
            Continuation(self.tokenizer, ids, stop_set, checks.checked_stop(stop)),
            stream,
        )
        self._submitted += 1
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request where it is; its pages are free at once. One that is finished already stays what it is."""
        if request.status == "waiting":
            self._waiting.remove(request)
        elif request.status == "running":
            self._release(request)
        else:
            return
        request._answer.finish("cancelled")
        request.status = "cancelled"

    @property
    def free_pages(self) -> int:
        """Pages of the pool that no request has."""
        return self._allocator.available

    # --- Work ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Works until no request is left."""
        while self.step():
            pass

    def step(self) -> bool:
        """Lets requests join, runs one chunk of steps, and streams what was said; whether work is left."""
        self._join()
        if any(self._rows):
            self._decode()
        while self._heard:
            request = self._heard.popleft()
            if request._stream and request.status != "cancelled" and (piece := request._answer.piece()):
                request._stream(piece)
        return bool(self._waiting) or any(self._rows)

    def _join(self) -> None:
        while group := self._next_group():
            try:
                self._prefill(group)
            except BaseException:
                # Nobody runs whose prompt is not in the cache.
                for request in reversed(group):
                    self._release(request)
                    request.status = "waiting"
                    self._waiting.appendleft(request)
                raise

    def _next_group(self) -> list[Request]:
        """Gives rows and pages to those who have waited longest; nobody overtakes one for whom there are too few."""
        group: list[Request] = []
        width = 0
        while self._waiting and None in self._rows:
            request = self._waiting[0]
            width = max(width, bucket(len(request._ids), SMALLEST_PROMPT_BUCKET))
            if group and width * bucket(len(group) + 1, 1) > PREFILL_TOKENS:
                break
            pages = self._allocator.allocate(self._pages_of(len(request._ids), request.max_new_tokens))
            if pages is None:
                break
            group.append(self._waiting.popleft())
            self._rows[self._rows.index(None)] = request
            request._pages, request.status = pages, "running"
        return group

    def _prefill(self, group: list[Request]) -> None:
        """Runs the prompts of a group, which draws their first tokens."""
        tokens, lengths = pad_prompts([request._ids for request in group], self.max_tokens)
        rows = [*group, *[None] * (len(lengths) - len(group))]
        cache = self._cache(rows)
        call = functools.partial(decode_loop.prefill_pages, self.decoder, tokens, lengths, _settings(rows), cache)
        start = self._compiled_by_now(call)
        state = call(drawable=self._drawable)
        self._key, self._value = state.cache.key, state.cache.value
        first = np.asarray(state.token).tolist()  # waits for the device
        self.timings.prefill_seconds += time.perf_counter() - start
        self.timings.prefill_tokens += int(lengths.sum())
        for request, token in zip(group, first, strict=False):
            self._hear(request, [token])

    def _decode(self) -> None:
        """One chunk of steps of the rows that have a request."""
        running = [request for request in self._rows if request]
        left = [request.max_new_tokens - request._count for request in running]
        # Whoever waits can come in when the first of these ends.
        steps = min(max(left), STREAM_CHUNK if any(request._stream for request in running) else CHUNK)
        if self._waiting:
            steps = min(steps, max(min(left), WAITING_CHUNK))
        token = jnp.asarray([request._last if request else 0 for request in self._rows], jnp.int32)
        count = jnp.asarray([request._count if request else 0 for request in self._rows], jnp.int32)
        done = np.asarray([request is None for request in self._rows])
        state = State(self._cache(self._rows), token, count)
        settings = _settings(self._rows)
        program = decode_loop.decode_program(self.decoder, state, done, settings, drawable=self._drawable)
        start = self._compiled_by_now(program)
        decoding = Decoding(program, steps)
        drawn = np.concatenate(list(decoding), axis=1)
        self._key, self._value = decoding.state.cache.key, decoding.state.cache.value
        self.timings.decode_seconds += time.perf_counter() - start
        self.timings.decode_bytes += drawn.shape[1] * self.decoder.weight_bytes
        for request, columns in zip(list(self._rows), drawn.tolist(), strict=True):
            if request:
                attended = request._answer.length
                taken = self._hear(request, columns[: request.max_new_tokens - request._count])
                self.timings.count_decoded(self.decoder, attended, taken)

    def _hear(self, request: Request, tokens: list[int]) -> int:
        """Takes what was drawn for a request, up to its end, which frees its row; how many tokens belong to it."""
        taken = request._answer.extend(tokens)
        request._count += len(tokens)
        request._last = tokens[-1]
        self._heard.append(request)
        if request._count >= request.max_new_tokens or not request._answer.live:
            request._answer.finish()
            self._release(request)
            request.status = "done"
        return taken

    def _release(self, request: Request) -> None:
        """Takes a row and its pages back."""
        self._rows[self._rows.index(request)] = None
        self._allocator.free(request._pages)
        request._pages = []

    def _cache(self, rows: Sequence[Request | None]) -> PagedCache:
        """The pool as these rows see it; the tables are small and come from the host each time."""
        table = np.zeros((len(rows), self._pages_per_row), np.int32)
        lengths = np.zeros(len(rows), np.int32)
        for row, request in enumerate(rows):
            if request:
                table[row, : len(request._pages)] = request._pages
                lengths[row] = max(0, len(request._ids) + request._count - 1)  # the last one drawn is not in it yet
        return PagedCache(self._key, self._value, jnp.asarray(table), jnp.asarray(lengths))

    def _compiled_by_now(self, call: functools.partial) -> float:
        """Compiles what was not compiled before; the time afterwards."""
        leaves, structure = jax.tree.flatten(call.args[1:])  # without the decoder, which is always the same
        program = (call.func, structure, tuple(map(np.shape, leaves)), tuple(call.keywords.items()))
        if program not in self._compiled:
            self._compiled.add(program)
            self.timings.compile_seconds += compile_seconds(functools.partial(call, drawable=self._drawable))
        return time.perf_counter()

    # --- Room ----------------------------------------------------------------------------------------------

    def _pages_of(self, length: int, max_new_tokens: int) -> int:
        """Pages of a prompt and its answer; the last token drawn is never stored."""
        return -(-(length + max_new_tokens - 1) // self._page_size)

    def _check_fits(self, length: int, max_new_tokens: int) -> None:
        total, positions = length + max_new_tokens, self.decoder.config.max_positions
        raised = f"raise max_tokens to {total}" if total <= positions else None
        room = (
            f"max_tokens={self.max_tokens}" if self.max_tokens < positions else f"the model's max_positions={positions}"
        )
        checks.check_fits(length, max_new_tokens, self.max_tokens, room, raised=raised)
        pages, pool = self._pages_of(length, max_new_tokens), self._allocator.num_pages
        if pages > pool:
            raise ValueError(
                f"the prompt has {length} tokens and with max_new_tokens={max_new_tokens} needs {pages} pages of "
                f"page_size={self._page_size}, more than the pool's num_pages={pool}: raise num_pages to {pages}, or "
                "shorten the prompt or its answer"
            )


def _settings(rows: Sequence[Request | None]) -> Settings:
    """What the device must know of each row; a row without a request is greedy and done."""
    return Settings(
        seeds=np.asarray([request.seed if request else 0 for request in rows], np.uint32),
        request_ids=np.asarray([request.request_id if request else 0 for request in rows], np.int32),
        sampling=stacked_arrays([request.sampling if request else Sampling() for request in rows]),
        stop_tokens=pad_stop_tokens([request._stop_tokens if request else set() for request in rows]),
        limits=np.asarray([request.max_new_tokens if request else 0 for request in rows], np.int32),
    )
