"""models/sampling.py against sorting in float64 NumPy, and frequencies against SciPy's chi-square test."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from models.sampling import Sampling, filter_logits, request_keys, sample, step_keys


def reference_probabilities(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Probabilities [V] of one row, token by token in float64; ties are not looked after."""
    probabilities = scipy.special.softmax(np.asarray(logits, np.float64) / temperature)
    order = np.argsort(-probabilities, kind="stable").tolist()
    if top_k is not None:
        order = order[:top_k]
    if top_p is not None:
        total = probabilities[order].sum()
        reached, nucleus = 0.0, []
        for token in order:
            nucleus.append(token)
            reached += probabilities[token] / total
            if reached >= top_p:
                break
        order = nucleus
    if min_p is not None:
        order = [token for token in order if probabilities[token] >= min_p * probabilities[order[0]]]
    kept = np.zeros_like(probabilities)
    kept[order] = probabilities[order] / probabilities[order].sum()
    return kept


FILTERS = [
    dict(zip(("temperature", "top_k", "top_p", "min_p"), values, strict=True))
    for values in itertools.product((0.3, 1.0, 2.0), (None, 1, 7, 1000), (None, 0.2, 0.9), (None, 0.05, 0.5))
]


@pytest.mark.parametrize("vocab", [5, 300])
def test_filters_keep_the_reference_tokens_with_their_probabilities(vocab):
    logits = np.random.default_rng(vocab).normal(scale=3.0, size=(4, vocab)).astype(np.float32)
    for settings in FILTERS:
        kept = filter_logits(jnp.asarray(logits), **settings)
        expected = np.stack([reference_probabilities(row, **settings) for row in logits])
        np.testing.assert_array_equal(np.isfinite(kept), expected > 0, err_msg=str(settings))
        np.testing.assert_allclose(jax.nn.softmax(kept), expected, rtol=2e-5, atol=1e-7, err_msg=str(settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.5, "top_k": 6},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.8, "top_k": 10, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_frequencies_follow_the_reference(settings):
    draws = 20_000
    logits = np.random.default_rng(7).normal(scale=1.5, size=16).astype(np.float32)
    keys = request_keys(0, jnp.arange(draws))
    tokens = sample(jnp.broadcast_to(logits, (draws, 16)), keys, **Sampling(**settings).arrays())
    expected = reference_probabilities(logits, **settings)
    counts = np.bincount(np.asarray(tokens), minlength=16)
    assert counts[expected == 0].sum() == 0
    allowed = expected > 0
    assert scipy.stats.chisquare(counts[allowed], draws * expected[allowed]).pvalue > 1e-3


def kept_tokens(logits, **settings):
    return np.flatnonzero(np.isfinite(filter_logits(jnp.asarray([logits], jnp.float32), **settings)[0])).tolist()


def test_filters_at_their_limits():
    logits = [1.0, 3.0, 2.0, 0.0, -200.0]
    assert kept_tokens(logits, top_k=99) == [0, 1, 2, 3, 4]
    assert kept_tokens(logits, top_k=1) == [1]
    assert kept_tokens(logits, top_p=1.0) == [0, 1, 2, 3, 4]  # the last one's probability is 0 in float32
    assert kept_tokens(logits, top_k=2, top_p=1.0) == [1, 2]
    assert kept_tokens(logits, top_p=1e-12) == [1]
    assert kept_tokens(logits, min_p=0.0) == [0, 1, 2, 3, 4]
    assert kept_tokens(logits, min_p=1.0) == [1]
    assert kept_tokens([-np.inf, 0.0, -np.inf, 1.0], top_k=3, top_p=0.99) == [1, 3]


def test_ties_are_kept_together():
    logits = [1.0, 2.0, 1.0, 1.0, 0.0]
    assert kept_tokens(logits, top_k=2) == [0, 1, 2, 3]
    assert kept_tokens(logits, top_p=0.5) == [0, 1, 2, 3]
    assert kept_tokens([0.0] * 4, top_p=0.1) == [0, 1, 2, 3]


def test_a_tiny_temperature_is_greedy_and_not_nan():
    logits = jnp.asarray([[1.0, 80.0, -300.0], [5.0, 4.0, 4.9]])
    for temperature in (1e-40, 1e-30, 1e-3):
        tokens = sample(logits, request_keys(0, jnp.arange(2)), temperature=temperature, top_p=0.9)
        assert tokens.tolist() == [1, 0]


def test_settings_may_differ_from_row_to_row():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(3, 50)), jnp.float32)
    keys = request_keys(5, jnp.arange(3))
    rows = [
        {"temperature": 0.0, "top_k": 50, "top_p": 1.0},
        {"temperature": 0.7, "top_k": 5, "top_p": 1.0},
        {"temperature": 2.0, "top_k": 40, "top_p": 0.6},
    ]
    together = sample(logits, keys, **{name: jnp.asarray([row[name] for row in rows]) for name in rows[0]})
    alone = [sample(logits[i : i + 1], keys[i : i + 1], **row)[0] for i, row in enumerate(rows)]
    assert together.tolist() == [int(token) for token in alone]
    assert together[0] == np.argmax(logits[0])


def test_randomness_belongs_to_the_request():
    def draws(request_ids, seed=0, step=0):
        keys = step_keys(request_keys(seed, jnp.asarray(request_ids)), step)
        return sample(jnp.zeros((len(request_ids), 10_000)), keys, temperature=1.0).tolist()

    assert draws([3, 1, 2]) == [draws([3])[0], draws([1])[0], draws([2])[0]]
    assert draws([4]) == draws([4])
    assert len({draws([4])[0], draws([5])[0], draws([4], seed=1)[0], draws([4], step=1)[0]}) == 4


def test_each_row_may_have_a_seed_and_a_step_of_its_own():
    keys = request_keys(jnp.asarray([0, 9]), jnp.asarray([5, 5]))
    logits = jnp.zeros((2, 10_000))
    together = sample(logits, keys, jnp.asarray([3, 1]), temperature=1.0).tolist()
    for row, (seed, step) in enumerate([(0, 3), (9, 1)]):
        own = step_keys(request_keys(seed, jnp.asarray([5])), step)
        assert sample(logits[:1], own, temperature=1.0).tolist() == [together[row]]


def test_greedy_rows_cost_an_argmax_only():
    """No sort, no noise and no keys where no row draws: all of that is in the other branch."""
    settings = Sampling(0.0, 5, 0.9, 0.1).arrays()
    keys = request_keys(0, jnp.arange(2))
    traced = jax.make_jaxpr(lambda logits, keys: sample(logits, keys, 3, **settings))(jnp.zeros((2, 100)), keys)
    outside = {equation.primitive.name for equation in traced.eqns}
    [choice] = [equation for equation in traced.eqns if equation.primitive.name == "cond"]
    greedy, drawing = ({e.primitive.name for e in branch.eqns} for branch in choice.params["branches"])
    assert greedy == {"argmax"}
    assert outside <= {"gt", "reduce_or", "convert_element_type", "cond"}
    assert "argmax" not in outside
    assert len(drawing) > 10


def test_changing_a_setting_compiles_nothing(compilations):
    logits, keys = jnp.zeros((2, 8)), request_keys(0, jnp.arange(2))
    run = jax.jit(sample)
    run(logits, keys, **Sampling(1.0, 5, 0.9, 0.1).arrays())
    compilations.clear()
    for settings in (Sampling(0.0, 1, 0.5, 0.2), Sampling(2.0, 8, 1.0, 0.0)):
        run(logits, keys, **settings.arrays())
    assert compilations == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, r"temperature must be a finite number >= 0 \(0 is greedy\), got -0.5"),
        ({"temperature": float("nan")}, "temperature .* got nan"),
        ({"temperature": "hot"}, "temperature .* got 'hot'"),
        ({"top_k": 0}, "top_k must be an integer >= 1, or None for no limit, got 0"),
        ({"top_k": 2.5}, "top_k .* got 2.5"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], or None for no limit, got 0.0"),
        ({"top_p": 1.5}, "top_p .* got 1.5"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], or None for no limit, got -0.1"),
        ({"min_p": True}, "min_p .* got True"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
