# SPDX-License-Identifier: Apache-2.0
"""models/batcher.py against the Generator: whoever comes and goes, an answer is the one to the request alone."""

import numpy as np
import pytest

from models import ContinuousBatcher, Decoder, Generator, Sampling, Tokenizer, preset
from models import batcher as batcher_lib
from models.sampling import stacked_arrays
from tests.models.random_model import random_model

TOKENIZER = Tokenizer.bytes()
DRAWN = Sampling(1.0, top_p=0.9)
REQUESTS = 200


@pytest.fixture(scope="module")
def decoder():
    # Large weights, so that the most likely token changes from step to step.
    return Decoder.from_model(random_model(preset("tiny"), scale=2.0))


@pytest.fixture(scope="module")
def generator(decoder):
    return Generator(decoder, TOKENIZER)


def alone(generator, prompt, count, sampling, request_id, **options):
    # One cache size, so that few programs are compiled; what it is changes nothing.
    return generator.generate(prompt, count, sampling, request_ids=[request_id], cache_size=96, **options)


# All tests share one shape of pool, so that its programs are compiled once.
POOL = {"max_rows": 4, "num_pages": 14, "page_size": 16, "max_tokens": 96}


@pytest.fixture
def batcher(decoder):
    return ContinuousBatcher(decoder, TOKENIZER, **POOL)


def random_prompts(count):
    random = np.random.default_rng(2)
    letters = [random.integers(ord("a"), ord("z") + 1, random.integers(1, 33)) for _ in range(count)]
    return [bytes(word.astype(np.uint8)).decode() for word in letters], random.integers(1, 41, count).tolist()


def test_200_requests_get_the_answers_that_they_would_get_alone(batcher, generator):
    """Greedy and drawn, with stop strings and without, in a pool that is too small for four long ones."""
    prompts, counts = random_prompts(REQUESTS)
    samplings = [DRAWN if number % 4 == 3 else Sampling() for number in range(REQUESTS)]
    stops = ["e" if number % 5 == 4 else () for number in range(REQUESTS)]
    requests = []
    most_running = 0
    for prompt, count, sampling, stop in zip(prompts, counts, samplings, stops, strict=True):
        requests.append(batcher.submit(prompt, count, sampling, seed=7, stop=stop))
        if len(requests) % 20 == 0:  # others are at work already when the next ones come
            batcher.step()
            most_running = max(most_running, sum(request.status == "running" for request in requests))
    batcher.run()

    assert {request.status for request in requests} == {"done"}
    assert batcher.free_pages == 14
    assert most_running > 2
    for number, request in enumerate(requests):
        single = alone(
            generator, prompts[number], counts[number], samplings[number], number, seed=7, stop=stops[number]
        )
        assert (request.tokens, request.text) == (single.tokens[0], single.texts[0]), number
        assert request.finish_reason == single.finish_reasons[0]
    assert {request.finish_reason for request in requests} >= {"length", "stop_string"}
    assert len({request.text for request in requests if len(request.tokens) > 3}) > REQUESTS // 2
    assert batcher.timings.prefill_tokens == sum(map(len, prompts))


def test_first_come_first_served_and_a_full_pool_queues(batcher):
    """Two requests of 6 pages leave 2, too few for a third; a small fourth one does not overtake it."""
    large = [batcher.submit("a" * 20, 76) for _ in range(3)]
    small = batcher.submit("b", 2)
    batcher.step()
    assert [request.status for request in [*large, small]] == ["running", "running", "waiting", "waiting"]
    assert batcher.free_pages == 14 - 2 * 6
    batcher.run()
    assert [request.status for request in [*large, small]] == ["done"] * 4
    assert batcher.free_pages == 14


def test_cancelling_frees_pages_at_once_and_lets_the_next_one_in(batcher, generator):
    running = [batcher.submit("a" * 20, 76) for _ in range(2)]
    waiting, last = batcher.submit("c" * 20, 76), batcher.submit("d" * 20, 76)
    batcher.step()
    batcher.cancel(running[1])
    assert batcher.free_pages == 2 + 6
    assert (running[1].status, running[1].finish_reason) == ("cancelled", "cancelled")
    said = running[1].tokens
    assert 0 < len(said) < 76
    batcher.cancel(last)  # not begun: there is nothing to free
    assert (last.text, last.status, batcher.free_pages) == ("", "cancelled", 8)
    batcher.cancel(last)
    batcher.step()
    assert waiting.status == "running"
    batcher.run()
    assert running[1].tokens == said == running[0].tokens[: len(said)]  # the same prompt
    assert waiting.tokens == alone(generator, "c" * 20, 76, Sampling(), 2).tokens[0]
    batcher.cancel(waiting)  # finished: it stays what it is
    assert (waiting.status, batcher.free_pages) == ("done", 14)


def test_pieces_that_stream_make_the_answer(batcher):
    pieces: dict[int, list[str]] = {number: [] for number in range(5)}
    requests = [batcher.submit("hello", 20, DRAWN, seed=number, stream=pieces[number].append) for number in range(5)]
    batcher.run()
    assert ["".join(each) for each in pieces.values()] == [request.text for request in requests]
    assert max(map(len, pieces.values())) > 2


def test_a_callback_may_cancel_and_submit(batcher):
    more = []

    def hear(piece):
        batcher.cancel(talker)
        more.append(batcher.submit("and", 3))

    talker = batcher.submit("hello", 40, DRAWN, stream=hear)
    batcher.run()
    assert talker.status == "cancelled"
    assert [request.status for request in more] == ["done"]
    assert batcher.free_pages == 14


def test_whoever_cannot_be_prefilled_waits_on(batcher, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("the device is gone")

    requests = [batcher.submit(prompt, 3) for prompt in ("one", "two")]
    with monkeypatch.context() as patch:
        patch.setattr(batcher_lib, "compile_seconds", lambda call: 0.0)
        patch.setattr(batcher_lib.decode_loop, "prefill_pages", fails)
        with pytest.raises(RuntimeError, match="the device is gone"):
            batcher.step()
    assert [request.status for request in requests] == ["waiting"] * 2
    assert batcher.free_pages == 14
    batcher.run()
    assert [request.status for request in requests] == ["done"] * 2


def test_stop_tokens_are_a_requests_own(batcher, generator):
    single = alone(generator, "a", 12, Sampling(), 0)
    full = single.tokens[0]
    stop = full[len(full) // 2]
    stopping, other = batcher.submit("a", 12, stop_tokens=[stop]), batcher.submit("a", 12)
    batcher.run()
    assert (stopping.tokens, stopping.finish_reason) == (full[: full.index(stop)], "stop_token")
    assert (other.tokens, other.finish_reason) == (full, single.finish_reasons[0])


def test_nothing_is_compiled_again(decoder, compilations):
    def serve():
        batcher = ContinuousBatcher(decoder, TOKENIZER, **POOL)
        for number in range(4):
            batcher.submit("a" * (number + 1), 9 + number)
        batcher.run()

    serve()
    compilations.clear()
    serve()
    assert compilations == []


def test_rows_with_and_without_filters_share_arrays():
    plain = stacked_arrays([Sampling(), Sampling(2.0)])
    assert plain["temperature"].tolist() == [0.0, 2.0]
    assert (plain["top_k"], plain["top_p"], plain["min_p"]) == (None, None, None)
    mixed = stacked_arrays([Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.5)])
    assert mixed["top_k"].tolist() == [3, np.iinfo(np.int32).max]
    assert (mixed["top_p"].tolist(), mixed["min_p"].tolist()) == ([1.0, 0.5], [0.0, 0.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, r"the prompt is empty \(''\), but a model needs one token"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
        (
            {"prompt": "a" * 90, "max_new_tokens": 10},
            "the prompt has 90 tokens and with max_new_tokens=10 needs 100, more than max_tokens=96: shorten the "
            "prompt to 86 tokens, or lower max_new_tokens to 6, or raise max_tokens to 100",
        ),
        ({"prompt": "a" * 3000}, "more than the model's max_positions=2048|more than max_tokens=96"),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\*\*32\), got -1"),
        ({"request_id": 2**31}, r"request_id must be an integer in .*, got 2147483648"),
        ({"stop": [""]}, "stop must hold strings of at least one character, got ''"),
        ({"stop_tokens": [320]}, r"stop_tokens must be ids in \[0, 320\), got 320"),
    ],
)
def test_bad_requests_are_refused_and_leave_no_trace(batcher, arguments, message):
    with pytest.raises(ValueError, match=message):
        batcher.submit(**{"prompt": "a", **arguments})
    assert (batcher.free_pages, batcher.step()) == (14, False)


def test_a_request_that_the_pool_could_never_hold_is_refused(decoder):
    batcher = ContinuousBatcher(decoder, TOKENIZER, max_rows=2, num_pages=3, page_size=16, max_tokens=96)
    batcher.submit("a" * 40, 9)  # 48 tokens are stored
    expected = (
        "the prompt has 40 tokens and with max_new_tokens=10 needs 4 pages of page_size=16, more than the pool's "
        "num_pages=3: raise num_pages to 4, or shorten the prompt or its answer"
    )
    with pytest.raises(ValueError, match=expected):
        batcher.submit("a" * 40, 10)


@pytest.mark.parametrize("name", ["max_rows", "num_pages", "page_size", "max_tokens"])
def test_bad_sizes_are_refused(decoder, name):
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1.*, got 0"):
        ContinuousBatcher(decoder, TOKENIZER, **{name: 0})


def test_a_row_is_no_longer_than_the_model(decoder):
    with pytest.raises(ValueError, match="max_tokens=4000 is more than the model's max_positions=2048: lower it"):
        ContinuousBatcher(decoder, TOKENIZER, max_tokens=4000)


def test_a_prompt_must_be_text(batcher):
    with pytest.raises(TypeError, match="the prompt is 3"):
        batcher.submit(3)
