"""models/generate.py on tiny random models, against the model itself run without a cache."""

import collections
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import decode_loop
from models.continuation import Continuation, certain_length
from models.generate import Generator, generate
from models.llama import Llama, LlamaConfig
from models.sampling import Sampling

CONFIG = LlamaConfig(
    vocab_size=64,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=64,
    max_positions=256,
    tie_embeddings=True,
)


class PieceTokenizer:
    """Token i stands for PIECES[i]: letters, two-letter pieces, and single bytes of multi-byte characters."""

    PIECES = (
        [chr(code).encode() for code in range(ord("a"), ord("z") + 1)]
        + [first + second for first in (b"S", b"T", b"O") for second in (b"a", b"O", b"P", b" ")]
        + [bytes([byte]) for byte in "é€🙂".encode()]
        + [b" ", b".", b"\n"]
    )

    def __init__(self, eos_ids=(), bos_id=None):
        self.vocab_size = len(self.PIECES)
        self.eos_ids = eos_ids
        self.bos_id = bos_id

    def encode(self, text, add_bos=False):
        return [self.bos_id] * add_bos + [self.PIECES.index(letter.encode()) for letter in text]

    def decode(self, ids):
        return b"".join(self.PIECES[i] for i in ids).decode(errors="replace")

    def ids(self, *pieces):
        return [self.PIECES.index(piece if isinstance(piece, bytes) else piece.encode()) for piece in pieces]


TOKENIZER = PieceTokenizer()
# Compiling takes nearly all of the time here, so most tests share two shapes: these prompts with at most 40 new tokens,
# or one of them alone.
NORMS = 2 * CONFIG.num_layers * CONFIG.d_model * 4  # scales that are part of the weights behind them
PROMPTS = ["a", "the quick brown fox", "jumps over the lazy dog.", "hello"]


@pytest.fixture(scope="module")
def model():
    # Large weights, so that the most likely token changes from step to step.
    model = Llama(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32)
    state = jax.tree.map(lambda leaf: leaf * 3.0, nnx.state(model))
    nnx.update(model, state)
    return model


@pytest.fixture(scope="module")
def windowed_model():
    config = dataclasses.replace(CONFIG, sliding_window=6, tie_embeddings=False)
    return Llama(config, rngs=nnx.Rngs(1), dtype=jnp.float32)


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model, TOKENIZER)


def greedy_without_cache(model, prompt, count):
    """Argmax over the full forward pass, one token after the other; causal, so what follows does not matter."""
    forward = jax.jit(lambda weights, tokens: nnx.merge(graphdef, weights)(tokens))
    graphdef, weights = nnx.split(model)
    tokens = TOKENIZER.encode(prompt)
    for _ in range(count):
        padded = np.zeros((1, CONFIG.max_positions), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = forward(weights, padded)[0, len(tokens) - 1]
        tokens.append(int(jnp.argmax(logits[: TOKENIZER.vocab_size])))
    return tokens[-count:]


def test_decoding_with_a_cache_is_the_full_forward_pass(model, generator):
    prompts = [*PROMPTS[:2], "so it goes. " * 16]
    result = generator.generate(prompts, 64)  # the longest row ends at the model's last position
    expected = [greedy_without_cache(model, prompt, 64) for prompt in prompts]
    assert result.tokens == expected
    assert result.texts == [TOKENIZER.decode(tokens) for tokens in expected]
    assert result.finish_reasons == ["length"] * 3
    assert all(len(set(tokens)) > 3 for tokens in expected)  # the model does say something


def test_decoding_with_a_sliding_window_is_the_full_forward_pass(windowed_model):
    expected = greedy_without_cache(windowed_model, PROMPTS[2], 20)
    result = Generator(windowed_model, TOKENIZER).generate(PROMPTS[2], 20, cache_size=44)  # full at the end
    assert result.tokens == [expected]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=20, top_p=0.95, min_p=0.01)])
def test_a_row_does_not_depend_on_its_batch(generator, sampling):
    together = generator.generate(PROMPTS, 40, sampling, seed=3)
    for row, prompt in enumerate(PROMPTS):
        alone = generator.generate(prompt, 40, sampling, seed=3, request_ids=[row])
        assert alone.texts == [together.texts[row]]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)])
def test_several_steps_a_program_change_no_answer(generator, sampling, monkeypatch):
    """As accelerators run them. Rows end within a program: by limit, stop token, stop string, the cache's end."""
    one_by_one = generator.generate(PROMPTS, 38, sampling)
    stop = one_by_one.tokens[0][9]
    calls = [
        functools.partial(generator.generate, PROMPTS, 38, sampling),
        functools.partial(generator.generate, PROMPTS, 38, sampling, stop_tokens=[stop]),
        functools.partial(
            generator.generate, PROMPTS[0], 7, sampling, cache_size=len(TOKENIZER.encode(PROMPTS[0])) + 7
        ),
        functools.partial(generator.generate, PROMPTS, 38, sampling, stop=one_by_one.texts[1][5:7]),
    ]
    expected = [call() for call in calls]
    monkeypatch.setitem(decode_loop.STEPS, "cpu", 4)
    for call, result in zip(calls, expected, strict=True):
        pieces = collections.defaultdict(str)
        found = call(stream=lambda row, piece, to=pieces: to.__setitem__(row, to[row] + piece))
        assert (found.tokens, found.texts, found.finish_reasons) == (result.tokens, result.texts, result.finish_reasons)
        assert [pieces[row] for row in range(len(found.texts))] == found.texts
        assert found.timings.decode_tokens == result.timings.decode_tokens


def test_a_seed_gives_the_same_text_again(model):
    def run(seed, prompts=PROMPTS):
        return generate(model, TOKENIZER, prompts, 40, temperature=1.0, seed=seed)

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert len(set(run(1, ["same"] * 4))) == 4  # each row has randomness of its own


def test_only_tokens_with_a_text_are_drawn(generator):
    assert TOKENIZER.vocab_size < CONFIG.vocab_size
    result = generator.generate(PROMPTS, 40, Sampling(50.0))  # nearly uniform
    drawn = set(itertools.chain(*result.tokens))
    assert max(drawn) < TOKENIZER.vocab_size
    assert len(drawn) > TOKENIZER.vocab_size // 2


def test_nothing_is_compiled_twice_inside_a_bucket(model, generator, compilations):
    for temperature in (0.0, 1.0):  # a greedy step is a program of its own
        Generator(model, TOKENIZER).generate(PROMPTS, 40, Sampling(temperature, 5, 0.9, 0.1))
    compilations.clear()
    first = ["d" * 20, "e" * 7, "f"]
    generator.generate(first, 44, Sampling(0.0, 9, 0.5, 0.2), seed=7, stop_tokens=[3])
    second = ["g" * 24, "h", "i", "j"]
    generator.generate(second, 37, Sampling(2.0, 1, 1.0, 0.0), stop="zz", stream=lambda row, piece: None)
    Generator(model, TOKENIZER).generate(["a", "b", "c"], 60, Sampling(0.5, 5, 0.9, 0.1))
    assert compilations == []


def test_timings_count_tokens_and_bytes(model):
    result = Generator(model, TOKENIZER).generate(["abc", "de", "f"], 5)
    timings = result.timings
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))) - NORMS
    token = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 4  # key and value in float32
    assert (timings.prefill_tokens, timings.decode_tokens) == (6, 3 * 4)
    assert timings.decode_bytes == 4 * weights + token * ((4 + 5 + 6 + 7) + (3 + 4 + 5 + 6) + (2 + 3 + 4 + 5))
    assert timings.prefill_seconds > 0 < timings.decode_seconds
    assert timings.decode_tokens_per_second == pytest.approx(12 / timings.decode_seconds)
    twice = timings + timings
    assert twice.decode_bytes == 2 * timings.decode_bytes
    assert twice.decode_bytes_per_second == pytest.approx(timings.decode_bytes_per_second)


def test_bytes_leave_out_an_untied_embedding_table_and_what_a_window_hides(windowed_model):
    timings = Generator(windowed_model, TOKENIZER).generate(PROMPTS[2], 20, cache_size=44).timings
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(windowed_model))) - NORMS
    table = CONFIG.vocab_size * CONFIG.d_model * 4
    token = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 4
    assert timings.decode_bytes == 19 * (weights - table + 6 * token)


# Stop tokens and stop strings


def test_stop_tokens_end_a_row_and_are_not_part_of_it(model, generator):
    full = generator.generate(PROMPTS, 40, Sampling(1.0)).tokens
    stop = full[0][10]
    cut = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in full]
    result = generator.generate(PROMPTS, 40, Sampling(1.0), stop_tokens=[stop])
    assert result.tokens == cut
    assert result.finish_reasons[0] == "stop_token"
    # The tokenizer's own end-of-text token does the same, and the device stops when every row is done.
    ending = Generator(model, PieceTokenizer(eos_ids=(stop,))).generate(PROMPTS[0], 40, Sampling(1.0))
    assert ending.tokens == cut[:1]
    assert ending.timings.decode_tokens == len(cut[0])  # the first from the prefill, the stop token included


def test_the_first_token_may_be_the_last(generator):
    first = generator.generate("a", 1).tokens[0][0]
    result = generator.generate("a", 10, stop_tokens=[first])
    assert (result.texts, result.tokens, result.finish_reasons) == ([""], [[]], ["stop_token"])
    assert result.timings.decode_tokens_per_second == 0


@pytest.mark.parametrize("streaming", [False, True])
def test_text_ends_before_a_stop_string(generator, streaming):
    full = generator.generate(PROMPTS, 40, Sampling(1.0)).texts
    stop = (full[0][15:19], full[1][25:27], "never said")
    expected = [text[: min((at for at in map(text.find, stop) if at >= 0), default=None)] for text in full]
    pieces = [[] for _ in PROMPTS]
    stream = (lambda row, piece: pieces[row].append(piece)) if streaming else None
    result = generator.generate(PROMPTS, 40, Sampling(1.0), stop=stop, stream=stream)
    assert result.texts == expected
    assert "stop_string" in result.finish_reasons
    for text, reason, tokens in zip(result.texts, result.finish_reasons, result.tokens, strict=True):
        if reason == "stop_string":  # not one token more than the stop string needs
            assert TOKENIZER.decode(tokens).startswith(text)
            assert not any(string in TOKENIZER.decode(tokens[:-1]) for string in stop)
    if streaming:
        assert ["".join(row) for row in pieces] == expected


def test_one_stop_string_need_not_be_in_a_list(model):
    text = generate(model, TOKENIZER, "a", 30)[0]
    assert generate(model, TOKENIZER, "a", 30, stop=text[5]) == [text[: text.index(text[5])]]


def feed(row, ids, at_a_time):
    """Pieces that stream while tokens arrive in groups."""
    pieces = []
    for group in itertools.batched(ids, at_a_time):
        if row.live:
            row.extend(list(group))
            pieces.append(row.piece())
    row.finish()
    return [*pieces, row.piece()]


@pytest.mark.parametrize("at_a_time", [1, 2, 3, 8])
def test_a_stop_string_may_be_split_over_tokens(at_a_time):
    ids = TOKENIZER.ids("a", "S ", "b", "Sa", "TO", "c", "S ", "TO", "OP", "z", "z")
    row = Continuation(TOKENIZER, [0], set(), ("S TOO", "zz"))
    pieces = feed(row, ids, at_a_time)
    assert (row.text, row.reason) == ("aS bSaTOc", "stop_string")
    assert "".join(pieces) == row.text
    assert row.tokens == ids[:9]


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_decided():
    row = Continuation(TOKENIZER, [0], set(), ("STOP",))
    ids = TOKENIZER.ids("a", "b", b"Sa", "x")
    assert feed(row, ids, 1) == ["a", "b", "Sa", "x", ""]
    assert certain_length("abST", ("STOP",)) == 2
    assert certain_length("abSTO", ("STOP", "Ox")) == 2
    assert certain_length("abSTx", ("STOP",)) == 5
    assert certain_length("ST", ("STOP",)) == 0
    assert certain_length("text", ()) == 4


@pytest.mark.parametrize("at_a_time", [1, 2, 5])
def test_streamed_pieces_hold_whole_characters(at_a_time):
    text = "aé€b🙂🙂c€"
    ids = TOKENIZER.ids(*itertools.chain(*([bytes([byte]) for byte in letter.encode()] for letter in text)))
    row = Continuation(TOKENIZER, [0], set(), ())
    pieces = feed(row, ids, at_a_time)
    assert "".join(pieces) == row.text == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_streamed_pieces_make_the_result_even_of_broken_characters(generator):
    pieces = [""] * len(PROMPTS)

    def stream(row, piece):
        pieces[row] += piece

    result = generator.generate(PROMPTS, 40, Sampling(30.0), stream=stream)
    assert pieces == result.texts == generator.generate(PROMPTS, 40, Sampling(30.0)).texts
    assert "\N{REPLACEMENT CHARACTER}" in result.texts[0]  # this model knows no UTF-8


def test_a_stop_token_after_a_stop_string_changes_nothing():
    row = Continuation(TOKENIZER, [0], set(TOKENIZER.ids("z")), ("bc",))
    row.extend(TOKENIZER.ids("a", "b", "c", "d", "z", "a"))
    assert (row.text, row.reason) == ("a", "stop_string")


def test_a_space_at_the_seam_is_kept():
    class SpaceMarker(PieceTokenizer):
        """As SentencePiece does it: the space that begins a text is only a mark of the first word."""

        def decode(self, ids):
            return super().decode(ids).removeprefix(" ")

    row = Continuation(SpaceMarker(), TOKENIZER.ids(" ", "a"), set(), ())
    assert feed(row, TOKENIZER.ids(" ", "b"), 1) == [" ", "b", ""]


# Room and bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts is empty: pass a string, or a sequence of at least one string"),
        ({"prompts": ["a", ""]}, r"prompt 1 is empty \(''\), but a model needs one token .* add_bos=True"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
        ({"max_new_tokens": -3}, "max_new_tokens must be an integer >= 1, got -3"),
        ({"cache_size": 0}, "cache_size must be an integer >= 1, or None, got 0"),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\*\*32\), got -1"),
        ({"seed": 0.5}, "seed .* got 0.5"),
        ({"stop": ["a", ""]}, "stop must hold strings of at least one character, got ''"),
        ({"stop_tokens": [64]}, r"stop_tokens must be ids in \[0, 64\), got 64"),
        ({"temperature": -1.0}, "temperature must be a finite number >= 0"),
        (
            {"prompts": ["a", "b" * 30], "max_new_tokens": 20, "cache_size": 40},
            "prompt 1 has 30 tokens and with max_new_tokens=20 needs 50, more than cache_size=40: shorten the "
            "prompt to 20 tokens, or lower max_new_tokens to 10, or raise cache_size to 50",
        ),
        (
            {"prompts": "b" * 300, "max_new_tokens": 20},
            "prompt 0 has 300 tokens and with max_new_tokens=20 needs 320, more than the model's max_positions=256: "
            "shorten the prompt to 236 tokens",
        ),
        ({"max_new_tokens": 300, "cache_size": 512}, "max_positions=256: lower max_new_tokens to 255$"),
    ],
)
def test_bad_input_is_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(model, TOKENIZER, **{"prompts": "a", **arguments})


def test_a_prompt_must_be_text(model):
    with pytest.raises(TypeError, match="prompt 1 is 3"):
        generate(model, TOKENIZER, ["a", 3])


def test_request_ids_must_match_the_prompts(generator):
    with pytest.raises(ValueError, match="one id to each of the 2 prompts, got 1"):
        generator.generate(["a", "b"], 4, request_ids=[0])


def test_a_tokenizer_of_another_model_is_noticed(model):
    class Larger(PieceTokenizer):
        def encode(self, text, add_bos=False):
            return [64]

    with pytest.raises(ValueError, match="token 64, but the model has vocab_size=64: this tokenizer does not belong"):
        generate(model, Larger(), "a")


def test_an_empty_prompt_may_begin_with_bos(model):
    assert generate(model, PieceTokenizer(bos_id=5), "", 4, add_bos=True) == generate(model, TOKENIZER, "f", 4)
