# SPDX-License-Identifier: Apache-2.0
"""Compressed vision transformers: patterns that stay, labels that are not looked at, integers that compute the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models import distill, qat, vit_compress, vit_stages
from models.arithmetic import FLOATING
from models.checkpoint import CheckpointError
from models.images import Images
from models.vit import ViT, ViTConfig
from models.vit_compress import (
    PRUNED,
    calibrated,
    integers,
    load_compressed_vit,
    pruning_masks,
    save_compressed_vit,
    sparse,
)
from models.vit_inference import Classifier
from models.vit_stages import Run, Stage, train
from pallas_kernels import prune_2_4, prune_4_8_pairs

CONFIG = ViTConfig(16, 8, 16, 2, 2, 32, 3, channels=1)
GRAPHDEF = nnx.split(nnx.eval_shape(lambda: ViT(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32)))[0]
SMALL: dict = {"batch_size": 8, "learning_rate": 0.01}


def random_images(seed: int = 0, count: int = 60) -> Images:
    random = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % 3
    bright = 80 * labels[:, None, None, None]  # something to learn
    return Images((random.integers(0, 60, (count, 16, 16, 1)) + bright).astype(np.uint8), labels)


@functools.cache
def dense_run() -> Run:
    return train(Stage(kind="dense", steps=60, seeds=2, **SMALL), CONFIG, random_images(), random_images(1))


@functools.cache
def pruned_run(pattern: str) -> Run:
    stage = Stage(kind="prune", steps=100, pattern=pattern, weight_decay=0.3, seeds=2, **SMALL)
    return train(stage, dense_run(), random_images(), random_images(1), augmentation=None)


def first(tree):
    return jax.tree.map(lambda x: x[0], tree)


def test_dense_models_learn():
    assert (dense_run().accuracy > 0.9).all()
    kernels = dense_run().params["blocks"]["up"]["kernel"]
    assert not np.array_equal(kernels[0], kernels[1])


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_the_pattern_stays_under_a_hundred_steps_with_decay(pattern):
    run, masks = pruned_run(pattern), pruning_masks(dense_run().params, pattern)
    for name in PRUNED:
        kept = np.asarray(run.params["blocks"][name]["kernel"] != 0)
        # Exactly what was chosen at the start, and it moved.
        np.testing.assert_array_equal(kept, masks["blocks"][name]["kernel"])
        assert not np.array_equal(run.params["blocks"][name]["kernel"], dense_run().params["blocks"][name]["kernel"])
        groups = kept.reshape(*kept.shape[:2], -1, 4, kept.shape[-1]) if pattern == "2:4" else None
        pairs = kept.reshape(*kept.shape[:2], -1, 4, 2, kept.shape[-1]).any(axis=4) if pattern == "4:8" else groups
        assert pairs.sum(axis=3).max() == 2
    assert np.asarray(run.params["head"]["kernel"]).all()
    assert run.layer_losses.shape == (2, 1)


@pytest.mark.parametrize(("pattern", "bits"), [(None, 8), (None, 4), ("2:4", 8), ("4:8", 4), ("2:4", 4)])
def test_integers_compute_what_training_saw(pattern, bits, tmp_path):
    """In the same numbers: sums of codes are exact in both."""
    start = pruned_run(pattern) if pattern else dense_run()
    run = train(
        Stage(kind="quantize", steps=int(pattern == "4:8"), bits=bits, seeds=2, **SMALL),
        start,
        random_images(),
        random_images(1),
    )
    params, fake = first((run.params, run.arithmetic()))
    pixels = jnp.asarray(random_images(2, 20).pixels / 127.5 - 1, jnp.float32)
    expected = nnx.merge(GRAPHDEF, params)(pixels, fake)
    assert not np.array_equal(expected, nnx.merge(GRAPHDEF, params)(pixels, FLOATING))
    exact = integers(params, fake, pattern)
    np.testing.assert_allclose(nnx.merge(GRAPHDEF, params)(pixels, exact), expected, rtol=1e-5, atol=1e-5)
    run.save(tmp_path / "run")
    nbytes = Run.load(tmp_path / "run").export(tmp_path / "export")
    model, stored = load_compressed_vit(tmp_path / "export")
    np.testing.assert_allclose(model(pixels, stored), expected, rtol=1e-5, atol=1e-5)
    assert nbytes == sum(file.stat().st_size for file in (tmp_path / "export").iterdir())


@pytest.mark.parametrize(("pattern", "bits"), [("2:4", 8), ("4:8", 4)])
def test_a_wide_matrix_is_as_small_as_its_bits(pattern, bits):
    """5/8 of int8, and of int4."""
    prune = prune_2_4 if pattern == "2:4" else prune_4_8_pairs
    weight, scale = vit_compress._integers(prune(jax.random.normal(jax.random.key(0), (512, 128))), bits, pattern)
    assert weight.nbytes == 512 * 128 * bits / 8 * 0.625
    assert scale.shape == (128,)


def test_a_classifier_is_its_model():
    """Layers apart; and two of four in floating point."""
    params = first(pruned_run("2:4").params)
    model = nnx.merge(GRAPHDEF, params)
    pixels = jnp.asarray(random_images(2, 5).pixels / 127.5 - 1, jnp.float32)
    expected = model(pixels)
    np.testing.assert_allclose(Classifier(model)(pixels), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(Classifier(model, sparse(params, jnp.float32))(pixels), expected, rtol=1e-5, atol=1e-5)


def test_ranges_are_those_of_the_activations():
    params = first(dense_run().params)
    pixels = random_images(2, 4).pixels / np.float32(127.5) - 1
    scales = calibrated(GRAPHDEF, params, pixels, bits=8, observer="max")
    seen = nnx.merge(GRAPHDEF, params).observed(pixels)[0]
    for name, steps in (("attention", 127), ("down", 127), ("p", 127), ("v", 127)):
        expected = np.abs(np.asarray(seen[name])).reshape(2, -1).max(1) / steps
        np.testing.assert_allclose(scales.blocks.scales[name], expected, rtol=1e-6)


def test_unsupervised_distillation_looks_at_no_label():
    weights = distill.Weights(hard=0)
    stage = Stage(kind="prune", steps=3, weights=weights, seeds=2, **SMALL)
    some = random_images()
    none = dataclasses.replace(some, labels=np.full_like(some.labels, -1))
    runs = [train(stage, dense_run(), images, random_images(1)) for images in (some, none)]
    jax.tree.map(np.testing.assert_array_equal, runs[0].params, runs[1].params)
    supervised = train(Stage(kind="prune", steps=3, seeds=2, **SMALL), dense_run(), some, random_images(1))
    assert not np.array_equal(supervised.params["head"]["kernel"], runs[0].params["head"]["kernel"])


def test_layers_count_as_pruning_left_them():
    run = dataclasses.replace(dense_run(), layer_losses=np.array([[1.0], [2.0]]))
    options: dict = {"kind": "quantize", "steps": 0, "seeds": 2}
    assert vit_stages._rho(Stage(**options), run).tolist() == [[1.0], [1.0]]  # one layer: its mean is 1
    two = dataclasses.replace(run, layer_losses=np.array([[1.0, 3.0], [2.0, 2.0]]))
    assert vit_stages._rho(Stage(**options), two).tolist() == [[0.5, 1.5], [1.0, 1.0]]
    assert vit_stages._rho(Stage(layers="inverse", **options), two).tolist() == [[1.5, 0.5], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("stage", "start", "message"),
    [
        (Stage(kind="prune", steps=0), CONFIG, "goes on from a run"),
        (Stage(kind="dense", steps=0, seeds=2), "dense", "starts from random parameters"),
        (Stage(kind="prune", steps=0, seeds=3), "dense", "has 2 seeds, this stage 3"),
        (Stage(kind="quantize", steps=0, seeds=2, bits=3), "dense", "bits must be 8 or 4"),
        (Stage(kind="prune", steps=0, seeds=2, pattern="1:2"), "dense", 'pattern must be "2:4" or "4:8"'),
    ],
)
def test_bad_stages_are_named(stage, start, message):
    with pytest.raises(ValueError, match=message):
        train(stage, dense_run() if start == "dense" else start, random_images(), random_images(1))


def test_bad_files_are_named(tmp_path):
    params, config = first(dense_run().params), CONFIG
    pixels = random_images(2, 4).pixels / np.float32(127.5) - 1
    masked = qat.apply_masks(params, pruning_masks(params, "2:4"))
    exact = integers(masked, calibrated(GRAPHDEF, masked, pixels, bits=8), "2:4")
    save_compressed_vit(tmp_path / "vit", config, masked, exact)
    with pytest.raises(CheckpointError, match="not empty"):
        save_compressed_vit(tmp_path / "vit", config, masked, exact)
    file = tmp_path / "vit" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    damaged = tensors["blocks.weights.up.places"].copy()
    damaged[1, 0, 0] &= 0xF0
    safetensors.numpy.save_file(tensors | {"blocks.weights.up.places": damaged}, file)
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged.*group 0 of output 0"):
        load_compressed_vit(tmp_path / "vit")
    with pytest.raises(CheckpointError, match=r"holds no run of train.py --task=vit"):
        Run.load(tmp_path)
    with pytest.raises(ValueError, match="is not quantized"):
        dense_run().export(tmp_path / "export")
