# SPDX-License-Identifier: Apache-2.0
"""Micro-batches as arrays: which devices are groups, and what each of them holds.

JAX runs one program on all devices, so a micro-batch is a wave: groups of 1, 2, 4, ... neighbors, side by side, whose
units take about as long. The sizes of its groups are the layout, of which one program is compiled; a few suffice:

    8        4 4        4 2 2        2 2 2 2        4 2 1 1        ...        1 1 1 1 1 1 1 1

A group of g devices holds its documents zigzagged (parallel/context.py): device j has chunks j and 2 g - 1 - j of each.

Source: Ge et al., "ByteScale", 2025, sections 3 and 5.2: of what runs at the same time, all takes as long.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from parallel.context import padded_length, zigzag
from parallel.hybrid.plan import CostModel, Unit

FIELDS = ("tokens", "targets", "weights", "positions", "segment_ids")


@dataclasses.dataclass(frozen=True)
class Wave:
    """One micro-batch of all devices.

    Attributes:
      groups: sizes, the largest first; together all devices.
      units: of each group, or None if it has nothing to do.
    """

    groups: tuple[int, ...]
    units: tuple[Unit | None, ...]

    @property
    def seconds(self) -> float:
        """Of the slowest group."""
        return max((unit.seconds for unit in self.units if unit is not None), default=0.0)


def rounded(unit: Unit, lengths: Sequence[int], model: CostModel) -> Unit:
    """On the next power of two of devices, which rings of one program share."""
    devices = 1 << (unit.devices - 1).bit_length()
    if devices == unit.devices:
        return unit
    seconds = model.seconds([lengths[i] for i in unit.sequences], devices)
    return dataclasses.replace(unit, devices=devices, seconds=seconds)


def waves(units: Sequence[Unit], devices: int) -> list[Wave]:
    """The longest units first, as many as fit side by side; ties by the order of the batch.

    Raises:
      ValueError: a size is no power of two, or the devices are too few.
    """
    if devices & (devices - 1):
        raise ValueError(f"waves: groups of powers of two need as many devices, got {devices}")
    for unit in units:
        if unit.devices & (unit.devices - 1) or unit.devices > devices:
            raise ValueError(
                f"waves: a unit of {unit.devices} devices is no power of two up to {devices}; `rounded` makes one; a "
                "sequence that needs more devices must be cut"
            )
    order = sorted(range(len(units)), key=lambda i: (-units[i].seconds, i))
    found: list[Wave] = []
    while order:
        chosen, free, left = [], devices, []
        for i in order:
            if units[i].devices <= free:
                chosen.append(units[i])
                free -= units[i].devices
            else:
                left.append(i)
        order = left
        # The largest first: every group starts at a multiple of its size.
        chosen.sort(key=lambda unit: (-unit.devices, unit.sequences))
        idle = [1] * free
        found.append(Wave((*(unit.devices for unit in chosen), *idle), (*chosen, *([None] * free))))
    return found


def arrays(wave: Wave, documents: Sequence[np.ndarray], capacity: int) -> Mapping[str, np.ndarray]:
    """What the devices hold of a wave, each field [devices, capacity]; see data.PackedRows for their meaning.

    Targets are the next tokens of the document, made before it is cut. What fills up rows is of a document of its own,
    with weight 0.

    Args:
      wave: of `waves`.
      documents: int32 [length], of the whole global batch.
      capacity: C, even.

    Raises:
      ValueError: documents of a group are longer than its devices hold.
    """
    fields = {name: [] for name in FIELDS}
    for group, unit in zip(wave.groups, wave.units, strict=True):
        held = _held([] if unit is None else [documents[i] for i in unit.sequences], group, capacity)
        for name in FIELDS:
            fields[name].append(held[name].reshape(group, capacity))
    return {name: np.concatenate(parts) for name, parts in fields.items()}


def _held(documents: Sequence[np.ndarray], group: int, capacity: int) -> dict[str, np.ndarray]:
    """Of one group, [group * capacity] in the order of its devices."""
    # One device needs no cut, and so no filling.
    lengths = [len(d) if group == 1 else padded_length(len(d), group) for d in documents]
    if (total := sum(lengths)) > group * capacity:
        raise ValueError(
            f"arrays: documents of {[len(d) for d in documents]} tokens take {total} on {group} devices, which hold "
            f"{group * capacity}; plan with a smaller capacity"
        )
    fields = {name: np.zeros(total, np.float32 if name == "weights" else np.int32) for name in FIELDS}
    start = 0
    for number, (document, length) in enumerate(zip(documents, lengths, strict=True)):
        there, n = slice(start, start + len(document)), len(document)
        fields["tokens"][there] = document
        fields["targets"][start : start + n - 1] = document[1:]
        fields["weights"][start : start + n - 1] = 1
        fields["positions"][start : start + length] = np.arange(length)
        fields["segment_ids"][start : start + length] = number
        start += length
    order = np.arange(total) if group == 1 else zigzag(lengths, group)
    filled = {}
    for name, values in fields.items():
        rows = np.full((group, capacity), len(documents) if name == "segment_ids" else 0, values.dtype)
        rows[:, : total // group] = values[order].reshape(group, -1)
        filled[name] = rows.ravel()
    return filled


def layouts(found: Sequence[Wave]) -> dict[tuple[int, ...], int]:
    """How many waves each layout has: as many programs are compiled as there are keys."""
    counted: dict[tuple[int, ...], int] = {}
    for wave in found:
        counted[wave.groups] = counted.get(wave.groups, 0) + 1
    return counted


def idle(found: Sequence[Wave], devices: int) -> float:
    """Share of the devices' time in which they wait for the slowest of a wave, or have nothing to do."""
    whole = math.fsum(wave.seconds for wave in found) * devices
    work = math.fsum(unit.seconds * unit.devices for wave in found for unit in wave.units if unit is not None)
    return 1 - work / whole if whole else 0.0
