"""models/decoder.py against the model that it is made of, which has no cache (test_golden.py has transformers)."""

import dataclasses
import functools
import gc
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import Decoder, Generator, KVCache, Llama, LlamaConfig, Tokenizer
from models.decoder import _norm
from pallas_kernels import explain
from tests.models.random_model import SMALLEST, VARIANTS, random_model

build = functools.cache(random_model)


@functools.cache
def decoder_of(config: LlamaConfig) -> Decoder:
    return Decoder.from_model(build(config))


def empty(config: LlamaConfig, batch: int, size: int) -> KVCache:
    return KVCache.zeros(config, batch, size, jnp.float32)


@nnx.jit
def run(model: Llama, tokens: jax.Array):
    return model(tokens)


@jax.jit
def prefill(decoder: Decoder, tokens, lengths, cache):
    hidden, cache = decoder.prefill(tokens, jnp.asarray(lengths), cache)
    return decoder.logits(hidden), cache


@jax.jit
def step(decoder: Decoder, token, cache, live=None):
    return decoder.step(token, cache, live=live)


def tokens_of(batch: int, length: int, seed: int = 1) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, SMALLEST.vocab_size)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_with_a_cache_equals_the_full_forward(variant):
    """A prefill of 7 tokens, then one at a time, in a cache that is larger than needed."""
    config = VARIANTS[variant]
    tokens = tokens_of(2, 18)
    logits, cache = prefill(decoder_of(config), tokens[:, :7], [7, 7], empty(config, 2, 23))
    parts = [logits]
    for t in range(7, 18):
        logits, cache = step(decoder_of(config), tokens[:, t], cache)
        parts.append(logits[:, None])
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), run(build(config), tokens), rtol=0, atol=2e-5)
    np.testing.assert_array_equal(cache.lengths, [18, 18])


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_different_length_share_a_cache(variant):
    """A right-padded prefill leaves no trace of the padding."""
    config = VARIANTS[variant]
    tokens, lengths = tokens_of(3, 16), [9, 4, 1]
    _, cache = prefill(decoder_of(config), tokens[:, :9], lengths, empty(config, 3, 16))
    parts = []
    for t in range(9, 12):
        logits, cache = step(decoder_of(config), tokens[:, t], cache)
        parts.append(logits)
    for row, length in enumerate(lengths):
        alone = jnp.concatenate([tokens[row, :length], tokens[row, 9:12]])[None]
        actual = jnp.stack([logits[row] for logits in parts])
        np.testing.assert_allclose(actual, run(build(config), alone)[0, length:], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(cache.lengths, [12, 7, 4])


def test_a_row_that_is_not_live_keeps_its_cache_and_disturbs_no_other():
    decoder, tokens = decoder_of(SMALLEST), tokens_of(3, 8)
    _, cache = prefill(decoder, tokens[:, :7], [7, 7, 3], empty(SMALLEST, 3, 12))
    live = jnp.asarray([True, False, True])
    logits, new = step(decoder, tokens[:, 7], cache, live)
    everything, _ = step(decoder, tokens[:, 7], cache)
    np.testing.assert_array_equal(new.lengths, [8, 7, 4])
    np.testing.assert_array_equal(logits[live], everything[live])
    for before, after in zip(cache.key + cache.value, new.key + new.value, strict=True):
        np.testing.assert_array_equal(after[1], before[1])
        assert not np.array_equal(after[0], before[0])


def test_tokens_beyond_the_cache_leave_it_unchanged():
    full = dataclasses.replace(empty(SMALLEST, 1, 4), lengths=jnp.asarray([4], jnp.int32))
    _, cache = step(decoder_of(SMALLEST), tokens_of(1, 1)[:, 0], full)
    assert not any(array.any() for array in cache.key + cache.value)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_copies_neither_cache_nor_weights(dtype):
    """What a step reads are the arrays that it was given."""
    decoder = Decoder.from_model(build(SMALLEST, dtype=dtype))
    cache = KVCache.zeros(SMALLEST, batch=3, size=777, dtype=dtype)
    donating = jax.jit(lambda decoder, token, cache: decoder.step(token, cache), donate_argnums=2)
    compiled = donating.lower(decoder, tokens_of(3, 1)[:, 0], cache).compile().as_text()
    for shape in (r"\[3,777,2,8\]", r"\[64,24\]", r"\[80,24\]", r"\[24,40\]"):
        assert re.search(shape, compiled)
        # A CPU has no product of bfloat16: there XLA widens the weights.
        kinds = "copy" if dtype == jnp.bfloat16 and "777" not in shape else "copy|convert"
        assert not re.search(rf"= \w+{shape}\S* ({kinds})\(", compiled)


def test_a_program_holds_one_layer_whatever_the_depth():
    decoder = decoder_of(SMALLEST)
    lowered = step.lower(decoder, tokens_of(3, 1)[:, 0], empty(SMALLEST, 3, 16)).as_text()
    assert lowered.count("func private @_step_layer") == 1
    assert lowered.count("call @_step_layer") == SMALLEST.num_layers


def test_weights_are_fused_in_the_compute_dtype():
    config = VARIANTS["qwen"]
    model = build(config, dtype=jnp.bfloat16)
    decoder = Decoder.from_model(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(decoder)} == {jnp.dtype(jnp.bfloat16)}
    # The scales of the norms before them are multiplied into qkv and gate_up.
    parameters = config.num_parameters - 2 * config.num_layers * config.d_model
    assert sum(leaf.size for leaf in jax.tree.leaves(decoder)) == parameters
    kernels = [getattr(model.blocks.attention, name).kernel[...][1] for name in ("query", "key", "value")]
    scale = model.blocks.attention_norm.scale[...][1]
    expected = np.concatenate(kernels, axis=1).T * np.float32(scale)
    np.testing.assert_array_equal(decoder.layers[1].qkv, expected.astype(jnp.bfloat16))
    assert decoder.weight_bytes == 2 * (parameters - config.vocab_size * config.d_model)


def test_bfloat16_is_close_to_float32():
    tokens = tokens_of(1, 6)
    decoder = Decoder.from_model(build(SMALLEST, dtype=jnp.bfloat16))
    logits, _ = prefill(decoder, tokens, [6], KVCache.zeros(SMALLEST, 1, 6, jnp.bfloat16))
    assert logits.dtype == jnp.float32
    expected = run(build(SMALLEST), tokens)
    # No worse than twice what the model itself loses to bfloat16.
    own_error = jnp.abs(run(build(SMALLEST, dtype=jnp.bfloat16), tokens) - expected).max()
    assert float(jnp.abs(logits - expected).max()) <= 2 * float(own_error)


def test_a_generator_does_not_keep_the_model_alive():
    config = dataclasses.replace(SMALLEST, vocab_size=320)
    model = random_model(config)
    generator = Generator(model, Tokenizer.bytes())
    held = [weakref.ref(model), weakref.ref(model.blocks.mlp.down.kernel[...])]
    expected = generator.generate("a", 5).tokens
    del model
    gc.collect()
    assert [reference() for reference in held] == [None, None]
    assert generator.generate("a", 5).tokens == expected


def test_an_implementation_that_is_named_runs_or_raises():
    """In prefill and in decoding alike."""
    decoder = dataclasses.replace(decoder_of(SMALLEST), implementation=("mosaic_tpu", "reference"))
    cache, tokens = empty(SMALLEST, 2, 16), tokens_of(2, 4)
    choices = {
        choice.call.op: choice.implementation
        for choice in (
            *explain(lambda d, t, c: d.prefill(t, jnp.asarray([4, 4]), c), decoder, tokens, cache),
            *explain(lambda d, t, c: d.step(t, c), decoder, tokens[:, 0], cache),
        )
    }
    assert choices.items() >= {"flash_attention": "reference", "decode_attention": "reference"}.items()


def test_bad_arguments():
    decoder, cache = decoder_of(SMALLEST), empty(SMALLEST, 2, 8)
    with pytest.raises(ValueError, match=re.escape("tokens must be an integer array [B, T], got int32[5]")):
        decoder.prefill(jnp.zeros((5,), jnp.int32), jnp.ones(5, jnp.int32), cache)
    with pytest.raises(ValueError, match=re.escape("tokens must be an integer array [B], got float32[2]")):
        decoder.step(jnp.zeros((2,)), cache)
    with pytest.raises(ValueError, match="the cache has 2 rows but the tokens have 1"):
        decoder.step(jnp.zeros((1,), jnp.int32), cache)
    with pytest.raises(ValueError, match="the cache holds bfloat16 but the model computes in float32"):
        decoder.step(jnp.zeros((2,), jnp.int32), KVCache.zeros(SMALLEST, 2, 8))


def test_scales_of_norms_that_stay_apart_change_nothing():
    tokens = tokens_of(2, 9)
    apart = Decoder.from_model(build(SMALLEST), fold_norms=False)
    assert apart.layers[0].attention_norm is not None
    logits, cache = prefill(apart, tokens[:, :8], [8, 8], empty(SMALLEST, 2, 12))
    last, _ = step(apart, tokens[:, 8], cache)
    expected = run(build(SMALLEST), tokens)
    np.testing.assert_allclose(jnp.concatenate([logits, last[:, None]], 1), expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96), (3, 96)])
def test_a_single_row_is_normed_as_any_other(shape):
    random = np.random.default_rng(0)
    x, scale = random.standard_normal(shape), random.standard_normal(96)
    expected = x * scale / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5)
    got = jax.jit(_norm, static_argnums=2)(jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32), 1e-5)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
