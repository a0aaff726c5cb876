# SPDX-License-Identifier: Apache-2.0
"""What sequences cost, and how many devices each is given.

    T(s)   = a s^2 + b s + g      seconds of a layer's forward pass over a sequence of s tokens
    Act(s) = c s + d              bytes of activations that a layer keeps of it

A device holds C tokens of every layer. A sequence of s <= C shares a device with others; a longer one takes
D = ceil(s / C), or fewer if a part r of its activations waits in host memory, as long as that costs no time.

Source: Ge et al., "ByteScale", 2025, sections 4 and 5.1, equations 1 to 3.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

KEPT = 2  # layers whose activations are never sent away: the first to go backward, and the one in flight


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Of one model on one kind of device.

    Attributes:
      quadratic, linear, constant: a, b, g; seconds of a layer.
      activation_bytes: c, of a token and layer; d is 0.
      kv_bytes: of a token's keys and values in one layer: what travels round a ring.
      layers: l.
      capacity: C, tokens of a device.
      link: bytes a second to a neighbor of the ring.
      host_link: bytes a second between a device and its host, the slower direction.
      host_bytes: of host memory a device may use.
      passes: forward passes that a training step takes as long as: 3, or 4 with rematerialization.
    """

    quadratic: float
    linear: float
    constant: float
    activation_bytes: float
    kv_bytes: float
    layers: int
    capacity: int
    link: float
    host_link: float
    host_bytes: float = math.inf
    passes: float = 3.0

    def __post_init__(self):
        for name in ("quadratic", "linear", "constant", "activation_bytes", "kv_bytes", "host_bytes"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"CostModel: {name} must not be negative, got {value}")
        for name in ("layers", "capacity", "link", "host_link", "passes"):
            if (value := getattr(self, name)) <= 0:
                raise ValueError(f"CostModel: {name} must be above 0, got {value}")

    def layer_seconds(self, length: int) -> float:
        """T."""
        return self.quadratic * length * length + self.linear * length + self.constant

    def seconds(self, lengths: Sequence[int], devices: int) -> float:
        """A step of sequences that share a group, on each device of it: their products, or the ring if it is slower."""
        work = sum(map(self.layer_seconds, lengths)) / devices
        # Each device receives the keys and values of all others; backward, these and their gradients.
        received = (devices - 1) / devices * sum(lengths) * self.kv_bytes
        return self.layers * self.passes * max(work, received / self.link)


def fit(lengths: Sequence[int], seconds: Sequence[float]) -> tuple[float, float, float]:
    """(a, b, g) of measured times of a layer, by least squares of relative errors.

    >>> a, b, g = fit([1000, 2000, 4000], [3e-6 * s * s + 2e-3 * s + 1 for s in (1000, 2000, 4000)])
    >>> [float(f"{x:.6g}") for x in (a, b, g)]
    [3e-06, 0.002, 1.0]

    Raises:
      ValueError: fewer than three lengths that differ, or a time that is not above 0.
    """
    s, t = np.asarray(lengths, float), np.asarray(seconds, float)
    if len(set(lengths)) < 3 or (t <= 0).any():
        raise ValueError(
            f"fit: needs three lengths that differ and times above 0, got {list(lengths)}, {list(seconds)}"
        )
    powers = np.stack([s * s, s, np.ones_like(s)], axis=1)
    scale = powers.max(axis=0)
    found = np.linalg.lstsq(powers / scale / t[:, None], np.ones_like(t), rcond=None)[0] / scale
    return tuple(map(float, found))  # pyright: ignore[reportReturnType]


def devices_of(length: int, model: CostModel, most: int) -> tuple[float, int]:
    """(r, D): which part of a sequence's activations goes to the host, and how many devices it takes.

    The least D that costs no time, and then the least r that allows it (equation 3).

    Raises:
      ValueError: the sequence does not fit `most` devices; names how many tokens would.
    """
    C, l = model.capacity, model.layers
    activations = model.activation_bytes * length
    without = math.ceil(length / C)
    ratio, devices = 0.0, without
    if length > C and l > KEPT:
        # What can be sent during the layer's own products; and host memory of each of D devices.
        fastest = min(1.0, model.layer_seconds(length) * model.host_link / activations)
        for fewer in range(math.ceil(KEPT * length / (l * C)), without):
            # KEPT layers whole and of the others 1 - r on so many devices' memory for l C tokens.
            needed = (l - fewer * l * C / length) / (l - KEPT)
            hosted = needed * (l - KEPT) * activations / fewer
            if fewer >= 1 and 0 <= needed <= fastest and hosted <= model.host_bytes:
                ratio, devices = needed, fewer
                break
    if devices > most:
        raise ValueError(
            f"a sequence of {length} tokens needs {devices} devices of {C} tokens, and there are {most}; raise the "
            "capacity, add devices or cut it"
        )
    return ratio, devices


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices, each of at most `capacity` tokens: the longest first, each into the fullest that has room.

    >>> pack([5, 3, 7, 2], 8)
    [[2], [0, 1], [3]]

    Raises:
      ValueError: one is longer than a bin.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > capacity:
            raise ValueError(f"pack: a sequence of {lengths[i]} tokens is longer than a bin of {capacity}")
        at = bisect.bisect_left(room, (lengths[i], -1))
        if at == len(room):
            bins.append([])
            left, chosen = capacity, len(bins) - 1
        else:
            left, chosen = room.pop(at)
        bins[chosen].append(i)
        bisect.insort(room, (left - lengths[i], chosen))
    return bins


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one group of devices does in one micro-batch.

    Attributes:
      sequences: indices of the global batch.
      devices: how many share it.
      seconds: on each of them.
      offload: r.
    """

    sequences: tuple[int, ...]
    devices: int
    seconds: float
    offload: float = 0.0


def units_of(
    lengths: Sequence[int], model: CostModel, devices: int, *, offload: bool = True, most_seconds: float = math.inf
) -> list[Unit]:
    """Long sequences alone, short ones packed, in the order of the batch: by lengths only, so that every process that
    knows them makes the same.

    Args:
      lengths: of the global batch.
      model: what they cost.
      devices: how many there are.
      offload: whether activations may wait on the host.
      most_seconds: a sequence that takes longer gets more devices, as long as that makes it faster.

    Raises:
      ValueError: a sequence fits no number of devices.
    """
    if not offload:
        model = dataclasses.replace(model, host_bytes=0.0)
    units = []
    for i, s in enumerate(lengths):
        if s >= model.capacity:
            ratio, fewest = devices_of(s, model, devices)
            wanted = fewest
            while wanted < devices and most_seconds < model.seconds([s], wanted) > model.seconds([s], wanted + 1):
                wanted += 1
            units.append(Unit((i,), wanted, model.seconds([s], wanted), ratio if wanted == fewest else 0.0))
    short = [i for i, s in enumerate(lengths) if s < model.capacity]
    for packed in pack([lengths[i] for i in short], model.capacity):
        chosen = sorted(short[j] for j in packed)
        units.append(Unit(tuple(chosen), 1, model.seconds([lengths[i] for i in chosen], 1)))
    return sorted(units, key=lambda unit: unit.sequences)
