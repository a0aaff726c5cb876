# SPDX-License-Identifier: Apache-2.0
"""Swin against what `transformers` computed (golden/make_golden.py), its windows by hand, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.arithmetic import FakeQuantized, Pair
from models.hf_config import CheckpointError
from models.swin import SWIN_PRESETS, Swin, SwinConfig, load_swin

GOLDEN = Path(__file__).parent / "golden" / "swin"
CONFIG = SwinConfig(16, 2, 8, (2, 1), (2, 2), 4, 3, channels=1)


def test_golden_logits():
    """Shifted windows, windows that are filled up, two stages."""
    golden = np.load(GOLDEN / "logits.npz")
    model = load_swin(GOLDEN)
    logits = model(jnp.asarray(golden["images"].transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=2e-4)
    assert np.std(golden["logits"]) > 0.3


def test_every_parameter_counts():
    model = load_swin(GOLDEN)
    images = jax.random.normal(jax.random.key(0), (2, 40, 40, 1))
    gradients = nnx.jit(nnx.grad(lambda model: jnp.sum(jnp.sin(model(images)))))(model)
    for path, gradient in nnx.to_flat_state(gradients):
        assert np.isfinite(gradient[...]).all(), path
        if path[-2:] != ("key", "bias"):  # softmax does not see what is added to all keys
            assert np.abs(gradient[...]).max() > 0, path


def test_published_sizes():
    """Of the paper's table 1 and the model cards: 28, 50 and 88 million parameters."""

    def millions(config: SwinConfig) -> int:
        state = nnx.state(nnx.eval_shape(lambda: Swin(config, rngs=nnx.Rngs(0))), nnx.Param)
        return round(sum(leaf.size for leaf in jax.tree.leaves(state)) / 1e6)

    assert [millions(SWIN_PRESETS[f"swin_{size}_224"]) for size in "tsb"] == [28, 50, 88]


def test_a_change_stays_within_its_windows():
    """One token of 8 x 8 in windows of 4 x 4: after a block its window, after a shifted one what that overlaps."""
    config = dataclasses.replace(CONFIG, depths=(2,), num_heads=(2,))
    model = Swin(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 8))
    changed = x.at[0, 0, 0].add(jnp.arange(8.0))
    plain, shifted = model.stages[0]
    touched = np.abs(np.asarray(plain(changed) - plain(x))).max(-1)[0] > 0
    assert touched[:4, :4].all()
    assert not touched[4:].any()
    assert not touched[:, 4:].any()
    # The corner of the image is a part of its own of the last window: what was rolled there is not its neighbor.
    touched = np.abs(np.asarray(shifted(changed) - shifted(x))).max(-1)[0] > 0
    expected = np.zeros((8, 8), bool)
    expected[:2, :2] = True
    np.testing.assert_array_equal(touched, expected)


def test_bias_and_masks_come_after_the_rounding():
    """Fake quantization to fine steps is close to floating point, with windows masked as they were."""
    model = Swin(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32)
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 1))
    names = ("attention", "out", "up", "down", "q", "k", "p", "v")
    scales = {name: jnp.float32((1 if name == "p" else 5) / 127) for name in names}
    rounded = nnx.jit(lambda model: model(images, Pair(blocks=FakeQuantized(scales, 8))))(model)
    expected = np.asarray(nnx.jit(lambda model: model(images))(model))
    assert not np.array_equal(rounded, expected)
    np.testing.assert_allclose(rounded, expected, rtol=0, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_size": 18}, "image_size=18 must be a multiple of 4"),
        ({"num_heads": (2,)}, "an entry for each stage"),
        ({"num_heads": (3, 2)}, "stage 0 is 8 wide, no multiple of 3 heads"),
        ({"window": 0}, "window must be at least 1, got 0"),
    ],
)
def test_bad_configurations_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changed)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"images must be \[B, 16, 16, 1\], got \[2, 12, 12, 1\]"):
        Swin(CONFIG, rngs=nnx.Rngs(0))(jnp.zeros((2, 12, 12, 1)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "vit"}, "model_type is 'vit', and only 'swin' is supported"),
        ({"use_absolute_embeddings": True}, "use_absolute_embeddings is True"),
        ({"embed_dim": 32}, "has shape .* but the configuration means"),
        ({"window_size": None}, "has no 'window_size'"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, changed, message):
    shutil.copytree(GOLDEN, tmp_path / "swin")
    file = tmp_path / "swin" / "config.json"
    values = json.loads(file.read_text()) | changed
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with pytest.raises(CheckpointError, match=message):
        load_swin(tmp_path / "swin")
