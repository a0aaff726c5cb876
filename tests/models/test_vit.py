# SPDX-License-Identifier: Apache-2.0
"""Vision transformers against what `transformers` computed (golden/make_golden.py), and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models.hf_config import CheckpointError
from models.vit import VIT_PRESETS, ViT, ViTConfig, load_vit

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("vit", "deit", "deit_teacher")
CONFIG = ViTConfig(image_size=12, patch_size=4, d_model=32, num_layers=2, num_heads=4, d_ff=48, num_classes=5)


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_logits_and_features(family):
    golden = np.load(GOLDEN / family / "logits.npz")
    images = jnp.asarray(golden["images"].transpose(0, 2, 3, 1))  # channels last here
    model = load_vit(GOLDEN / family)
    hidden, of_blocks = model.features(images)
    np.testing.assert_allclose(of_blocks, golden["blocks"], rtol=0, atol=2e-4)
    np.testing.assert_allclose(model.logits(hidden), golden["logits"], rtol=0, atol=2e-4)
    np.testing.assert_array_equal(model(images), model.logits(hidden))
    assert np.std(golden["logits"]) > 0.3  # there is something to be mistaken in


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_counts(family):
    model = load_vit(GOLDEN / family)
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == model.config.num_parameters
    images = jax.random.normal(jax.random.key(0), (2, 24, 24, model.config.channels))
    loss = lambda model: jnp.sum(jnp.sin(model(images)))  # noqa: E731
    gradients = nnx.grad(loss)(model)
    for path, gradient in nnx.to_flat_state(gradients):
        assert np.isfinite(gradient[...]).all(), path
        # Softmax does not see what is added to all keys.
        if path[1:] != ("key", "bias"):
            assert np.abs(gradient[...]).max() > 0, path


def test_published_sizes():
    """Of the model cards: ViT-B/16 86.6 million parameters; DeiT-Ti 5.9, DeiT-S 22.4 with the head of distillation."""
    millions = {name: round(config.num_parameters / 1e6, 1) for name, config in VIT_PRESETS.items()}
    published = {"vit_b16_224": 86.6, "deit_ti16_224": 5.9, "deit_s16_224": 22.4}
    assert millions == published | {"vit_tiny_28": 0.8, "vit_small_28": 4.8}
    assert VIT_PRESETS["vit_b16_224"].num_tokens == 197


def test_bfloat16_is_close_to_float32():
    images = jax.random.normal(jax.random.key(1), (2, 12, 12, 3))
    wide = ViT(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32)(images)
    narrow = ViT(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)(images)
    np.testing.assert_allclose(narrow, wide, rtol=0, atol=0.02 * np.abs(wide).max())


def test_patches_are_in_the_order_of_rows():
    """A patch changes its own token and no other, before attention."""
    model = ViT(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32)
    images = np.zeros((1, 12, 12, 3), np.float32)
    before = model.embed(jnp.asarray(images))
    images[0, 4:8, 8:12] = 1  # second row, third column: token 1 + 3 + 2
    changed = np.abs(np.asarray(model.embed(jnp.asarray(images)) - before)).max((0, 2)) > 0
    assert np.flatnonzero(changed).tolist() == [6]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_size": 13}, "image_size=13 must be a multiple of patch_size=4"),
        ({"num_heads": 5}, "d_model=32 must be a multiple of num_heads=5"),
        ({"d_ff": 0}, "d_ff must be at least 1, got 0"),
        ({"distillation_head": True}, "needs the token of distilled=True"),
    ],
)
def test_bad_configurations_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changed)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"images must be \[B, 12, 12, 3\], got \[2, 12, 12, 1\]"):
        ViT(CONFIG, rngs=nnx.Rngs(0))(jnp.zeros((2, 12, 12, 1)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "swin"}, "model_type is 'swin'; supported: vit, deit"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', and only 'gelu' is supported"),
        ({"qkv_bias": False}, "qkv_bias is False"),
        ({"hidden_size": 40}, r"has shape .* but the configuration means"),
        ({"num_hidden_layers": 2}, "is unexpected"),
        ({"patch_size": None}, "has no 'patch_size'"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, changed, message):
    shutil.copytree(GOLDEN / "vit", tmp_path / "vit")
    file = tmp_path / "vit" / "config.json"
    values = json.loads(file.read_text()) | changed
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with pytest.raises(CheckpointError, match=message):
        load_vit(tmp_path / "vit")


def test_a_missing_tensor_is_named(tmp_path):
    shutil.copytree(GOLDEN / "vit", tmp_path / "vit")
    file = tmp_path / "vit" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    del tensors["classifier.bias"]
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"tensor classifier\.bias is missing"):
        load_vit(tmp_path / "vit")
