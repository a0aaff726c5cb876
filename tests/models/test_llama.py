"""The model itself: packing, masks, rematerialization, counts and the refusal of impossible configurations.
What it computes is compared with transformers in test_golden.py."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import PRESETS, Llama, LlamaConfig, preset
from models.layers import RopeScaling, rope_frequencies
from models.llama import REMAT_POLICIES
from tests.models.random_model import SMALLEST, VARIANTS


@functools.cache
def build(config: LlamaConfig, **options) -> Llama:
    return nnx.jit(lambda: Llama(config, rngs=nnx.Rngs(0), **{"dtype": jnp.float32, **options}))()


@nnx.jit
def run(model: Llama, tokens: jax.Array, **options):
    return model(tokens, **options)


def tokens_of(batch: int, length: int, seed: int = 1) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, SMALLEST.vocab_size)


def test_a_second_call_compiles_nothing(compilations):
    """Outside of jit too, and for another model of the same configuration."""
    tokens = tokens_of(1, 6)
    build(SMALLEST)(tokens)
    other = nnx.clone(build(SMALLEST))
    compilations.clear()
    other(tokens)
    assert compilations == []


def test_packed_documents_equal_separate_ones():
    """Segment ids and restarted positions make a row of documents compute what each document computes alone."""
    model = build(VARIANTS["window"])
    first, second = tokens_of(1, 9, seed=2), tokens_of(1, 8, seed=3)
    packed = jnp.concatenate([first, second], axis=1)
    segments = jnp.asarray([[1] * 9 + [2] * 8], jnp.int32)
    positions = jnp.asarray([[*range(9), *range(8)]], jnp.int32)
    logits = run(model, packed, positions=positions, segment_ids=segments)
    np.testing.assert_allclose(logits[:, :9], run(model, first), rtol=0, atol=2e-5)
    np.testing.assert_allclose(logits[:, 9:], run(model, second), rtol=0, atol=2e-5)


def test_rematerialization_changes_no_gradient():
    tokens = tokens_of(2, 12)

    @nnx.jit
    @nnx.grad
    def gradient(model: Llama) -> jax.Array:
        return jax.nn.logsumexp(model(tokens), axis=-1).sum()

    # Another implementation of attention would only take longer to compile.
    expected = gradient(build(SMALLEST, implementation="reference"))
    for policy in ("full", "dots_and_attention"):  # the least and the most kept
        actual = gradient(build(SMALLEST, remat=policy, implementation="reference"))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected)


def test_rematerialization_keeps_less():
    """Residual bytes between forward and backward fall in the order in which the table lists the policies."""
    tokens = tokens_of(1, 32)

    def residual_bytes(policy: str | None) -> int:
        graphdef, state = nnx.split(build(SMALLEST, remat=policy))
        _, backward = jax.eval_shape(lambda s: jax.vjp(lambda s: nnx.merge(graphdef, s)(tokens), s), state)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    kept = [residual_bytes(policy) for policy in (*REMAT_POLICIES, None)]
    assert kept[0] == min(kept)
    assert kept[-1] == max(kept)
    assert kept[0] < kept[1] < kept[3] <= kept[4]
    assert kept[0] < kept[2] < kept[3]


def test_dtypes():
    model = build(SMALLEST, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.float32)}
    x = model.embed(tokens_of(1, 5))
    hidden = model.hidden(x)
    assert (x.dtype, hidden.dtype, model.logits(hidden).dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    float32 = run(build(SMALLEST), tokens_of(1, 5))
    np.testing.assert_allclose(run(model, tokens_of(1, 5)), float32, rtol=0, atol=0.1)


def test_bfloat16_is_as_good_as_a_float32_norm_allows():
    """RMSNorm takes its statistics in float32: a constant vector is normalized to exactly 1."""
    model = build(SMALLEST, dtype=jnp.bfloat16)
    x = jnp.full((1, 1, SMALLEST.d_model), 300.0, jnp.bfloat16)
    np.testing.assert_array_equal(model.final_norm(x).astype(jnp.float32), 1.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_num_parameters(variant):
    model = build(VARIANTS[variant])
    assert model.config.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # As counted by the models' authors on their model cards (safetensors metadata).
        ("smollm2_135m", 134_515_008),
        ("qwen3_0_6b", 596_049_920),
        ("llama_1b", 1_235_814_400),
        ("llama2_7b", 6_738_415_616),
        ("mistral_7b", 7_241_732_096),
        ("llama3_8b", 8_030_261_248),
    ],
)
def test_presets_have_the_published_size(name, published):
    assert preset(name).num_parameters == published


def test_presets_to_train_from_scratch():
    assert 0.9e6 < preset("tiny").num_parameters < 1.1e6
    assert 27e6 < preset("small").num_parameters < 33e6


def test_flops_per_token_are_those_that_xla_counts():
    """Up to what is not a matrix product; XLA multiplies all of attention's square, so causal and full are compared at
    a length where that is negligible, and with the square added back."""
    config = dataclasses.replace(preset("tiny"), num_layers=1)  # XLA counts the body of a loop once
    length = 64
    model = build(config, implementation="reference")
    graphdef, state = nnx.split(model)
    tokens = jnp.zeros((1, length), jnp.int32)
    counted = jax.jit(lambda s: nnx.merge(graphdef, s)(tokens)).lower(state).compile().cost_analysis()["flops"]
    unseen = 4 * config.num_heads * config.head_dim * (length - 1) / 2
    assert counted / length == pytest.approx(config.flops_per_token(length) + unseen, rel=0.03)


def test_flops_per_token_with_a_window():
    """The mean number of visible keys, counted one query at a time."""
    for window, length in [(None, 10), (4, 10), (64, 10), (1, 7)]:
        config = dataclasses.replace(SMALLEST, sliding_window=window)
        visible = sum(min(i + 1, window or length) for i in range(length)) / length
        without = dataclasses.replace(config, sliding_window=1)  # every query sees one key
        per_key = 4 * config.num_layers * config.num_heads * config.head_dim
        assert config.flops_per_token(length) == pytest.approx(
            without.flops_per_token(length) + per_key * (visible - 1)
        )


def test_llama3_scaling_keeps_short_and_stretches_long_wavelengths():
    plain, _ = rope_frequencies(64, 500_000.0)
    scaled, factor = rope_frequencies(64, 500_000.0, RopeScaling("llama3", 32.0, original_max_positions=8192))
    turns = 8192 * plain / (2 * np.pi)
    assert factor == 1.0
    np.testing.assert_array_equal(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 32, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "LlamaConfig: vocab_size must be a positive integer, got 0"),
        ({"d_ff": 1.5}, "LlamaConfig: d_ff must be a positive integer, got 1.5"),
        ({"num_heads": 3}, "LlamaConfig: num_heads must be a multiple of num_kv_heads, got 3 and 2"),
        ({"head_dim": 7}, "LlamaConfig: head_dim must be even for rotary embedding, got 7"),
        ({"sliding_window": 0}, "LlamaConfig: sliding_window must be None or >= 1, got 0"),
        ({"norm_eps": 0.0}, "LlamaConfig: rope_theta and norm_eps must be positive, got 10000.0 and 0.0"),
    ],
)
def test_impossible_configurations(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(SMALLEST, **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dynamic", 2.0), 'RopeScaling: kind must be "linear", "llama3" or "yarn", got \'dynamic\''),
        (("linear", 0.5), "RopeScaling: factor must be >= 1, got 0.5"),
        (("yarn", 2.0), "RopeScaling: kind 'yarn' needs original_max_positions (pretraining context length)"),
        (
            ("llama3", 2.0, 64, 4.0, 1.0),
            "RopeScaling: high_frequency_factor must be above low_frequency_factor, got 1.0 and 4.0",
        ),
    ],
)
def test_impossible_rope_scalings(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RopeScaling(*arguments)


def test_unknown_remat_policy():
    expected = "Llama: unknown remat policy 'half'; known: None, full, attention, dots, dots_and_attention"
    with pytest.raises(ValueError, match=re.escape(expected)):
        build(SMALLEST, remat="half")


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match=re.escape("unknown preset 'lama_1b'; did you mean 'llama_1b'")):
        preset("lama_1b")
    with pytest.raises(ValueError, match=re.escape(f"known presets: {', '.join(PRESETS)}")):
        preset("zzz")


def test_bad_arguments():
    model = build(SMALLEST)
    with pytest.raises(ValueError, match=re.escape("tokens must be an integer array [B, T], got int32[5]")):
        model(jnp.zeros((5,), jnp.int32))
    with pytest.raises(ValueError, match=re.escape("tokens must be an integer array [B, T], got float32[1, 5]")):
        model(jnp.zeros((1, 5)))
