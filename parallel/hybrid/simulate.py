# SPDX-License-Identifier: Apache-2.0
"""Steps of training on paper: static groups beside hybrid data parallelism, for any number of devices.

    python -m parallel.hybrid.simulate                              a table: mixes of lengths, contexts, speed-ups
    python -m parallel.hybrid.simulate --picture=busy.png           and how long devices are busy

The times are those of the paper's LLaMA-7B (its figure 6a, fitted), the link that at which the static step takes the 8
minutes and 40 seconds that it reports on 1024 GPUs (512 groups of 2) with the production mix and a context of 2M. All
else follows.

Source: Ge et al., "ByteScale", 2025, sections 6 and 7.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from parallel.hybrid.balance import Schedule, balanced, in_order
from parallel.hybrid.plan import CostModel, Unit, pack, units_of

K = 1024
# Share of tokens in sequences of up to so many K tokens: figure 7 and the text of section 6, by classes.
MIXES: dict[str, dict[int, float]] = {
    "production": dict(
        zip(
            (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
            (0.142, 0.102, 0.076, 0.076, 0.076, 0.085, 0.076, 0.076, 0.073, 0.097, 0.121),
            strict=True,
        )
    ),
    "github": dict(
        zip(
            (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
            (0.340, 0.114, 0.104, 0.107, 0.088, 0.085, 0.064, 0.045, 0.025, 0.015, 0.013),
            strict=True,
        )
    ),
}
# A layer's seconds at 4K to 128K tokens, attention and MLP together (figure 6a); keys and values of 8 heads of 128.
LLAMA_7B = CostModel(
    quadratic=0.00964e-3 / K**2,
    linear=0.364e-3 / K,
    constant=0.085e-3,
    activation_bytes=34 * 4096,
    kv_bytes=2 * 8 * 128 * 2,
    layers=32,
    capacity=8 * K,
    link=12.4e9,
    host_link=25e9,
    host_bytes=200e9,
    passes=3.0,
)


def sample(mix: Mapping[int, float], tokens: int, longest: int, seed: int = 0) -> list[int]:
    """Lengths of a global batch of about so many tokens, none above `longest`: of each class its share of the tokens,
    in sequences up to a tenth shorter than its bound."""
    random = np.random.default_rng(seed)
    classes = {upper * K: share for upper, share in mix.items() if upper * K <= longest}
    total, lengths = sum(classes.values()), []
    for upper, share in classes.items():
        owed = share / total * tokens
        while True:
            length = int(upper * random.uniform(0.9, 1))
            # A class of few sequences differs from its share by half of one.
            if owed < length / 2:
                break
            lengths.append(length)
            owed -= length
    return [lengths[i] for i in random.permutation(len(lengths))]


def static(lengths: Sequence[int], model: CostModel, context: int, devices: int) -> Schedule:
    """Data times context parallelism: rows of `context` tokens, each on context / C devices, all in the ring for every
    sequence of the row."""
    width = min(devices, math.ceil(context / model.capacity))
    rows = pack(lengths, context)
    units = [Unit(tuple(row), width, model.seconds([lengths[i] for i in row], width)) for row in rows]
    return in_order(units, devices // width * width)


@dataclasses.dataclass(frozen=True)
class Step:
    """One way to run a global batch. Figures of busy time are over devices."""

    name: str
    seconds: float
    shortest: float
    longest: float
    deviation: float
    micro_batches: str

    @classmethod
    def of(cls, name: str, schedule: Schedule) -> "Step":
        busy, count = schedule.busy, schedule.micro_batches
        counted = f"{min(count)} to {max(count)}"
        return cls(name, schedule.seconds, min(busy), max(busy), float(np.std(busy)), counted)


def compare(lengths: Sequence[int], model: CostModel, context: int, devices: int) -> list[tuple[Step, Schedule]]:
    """The paper's order: static, groups of the size that is needed, activations on the host, balance."""
    by_length = units_of(lengths, model, devices)
    mean = sum(unit.seconds * unit.devices for unit in by_length) / devices
    schedules = {
        "static": static(lengths, model, context, devices),
        "+ groups by length": in_order(units_of(lengths, model, devices, offload=False), devices),
        "+ offload": in_order(by_length, devices),
        "+ balance": balanced(units_of(lengths, model, devices, most_seconds=mean), devices),
    }
    return [(Step.of(name, schedule), schedule) for name, schedule in schedules.items()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--devices", type=int, default=512, help="groups of tensor parallelism; default 512")
    parser.add_argument("--tokens", type=int, default=32 * K * K, help="of a global batch")
    contexts = {"type": lambda text: [int(k) for k in text.split(",")], "default": [256, 512, 1024, 2048]}
    parser.add_argument("--contexts", **contexts, help="longest sequences, in K tokens, with commas")
    parser.add_argument("--picture", type=Path, help="of the last mix and context")
    options = parser.parse_args(argv)
    print("| mix | context | | step, s | times static | busy, s | deviation | micro-batches |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    found: list[tuple[Step, Schedule]] = []
    for mix in MIXES:
        for context in options.contexts:
            lengths = sample(MIXES[mix], options.tokens, context * K)
            found = compare(lengths, LLAMA_7B, context * K, options.devices)
            for step, _ in found:
                speed = f"{found[0][0].seconds / step.seconds:.2f}"
                busy = f"{step.shortest:.1f} to {step.longest:.1f}"
                figures = f"{step.seconds:.1f} | {speed} | {busy} | {step.deviation:.1f} | {step.micro_batches}"
                print(f"| {mix} | {context}K | {step.name} | {figures} |", flush=True)
    if options.picture:
        draw(found, options.picture)
    return 0


def draw(found: Sequence[tuple[Step, Schedule]], file: Path) -> None:
    """Devices by how long they are busy, one line a way, and where the step ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for step, schedule in found:
        (line,) = axes.plot(sorted(schedule.busy), label=f"{step.name}, {step.seconds:.0f} s")
        axes.axhline(step.seconds, color=line.get_color(), linewidth=0.6, linestyle="--")
    axes.set(xlabel="devices, by how long they are busy", ylabel="seconds", ylim=0)
    axes.legend()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
