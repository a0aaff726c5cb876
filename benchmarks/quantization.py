# SPDX-License-Identifier: Apache-2.0
"""What quantizing real weights costs: bits, and squared errors relative to the weights' own squares.

    python -m benchmarks.quantization --checkpoint=smollm2 --layers=0,10,20,29

Two tables. The first compares the second-order zero of the paper (Fast 2-bit LLM, section 2.2) with leaving it out: 16
scales of a block are rounded to 4 bits in each way, without any search, and weights are rounded with them. The second
has what `quantize` makes; its bits are those of all bytes, and padding is much of a narrow matrix (576 inputs are 36
strips, stored as 48), unless scales are clipped: then those of the packed form. Needs no accelerator. SmolLM2's file
has weights of 4 bits in groups of 32 already: read little into its 4-bit errors.
"""

import argparse
import collections
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx

from models.checkpoint import load_model
from pallas_kernels import MixedBitWeight, quantize
from pallas_kernels.quantized_matmul.quantize import packed_bits_per_weight

KERNELS = ("query", "key", "value", "out", "gate", "up", "down")
SCHEMES: dict[str, dict[str, Any]] = {
    "2 bits": {"four_bit_fraction": 0.0},
    "mixed, by range": {},
    "mixed, by error": {"strips": "error"},
    "mixed, at random": {"strips": "random"},
    "mixed 1/4, by error": {"strips": "error", "four_bit_fraction": 0.25},
    "mixed, by error, 0.25 % outliers": {"strips": "error", "outlier_fraction": 0.0025},
    "mixed, by error, clipped scales": {"strips": "error", "clip_scales": True},
    "mixed, by error, clamped scales": {"strips": "error", "clip_scales": "clamp"},
    "4 bits": {"four_bit_fraction": 1.0},
    "int2, groups of 64": {"scheme": "int2"},
    "int4, groups of 128": {"scheme": "int4"},
    "int8": {"scheme": "int8"},
}


def without_zero(scales: np.ndarray) -> np.ndarray:
    """16 scales [..., 16] by codes 1 to 15 and a step."""
    step = scales.max(-1, keepdims=True) / 15
    return np.clip(np.round(scales / step), 1, 15) * step


def with_zero(scales: np.ndarray) -> np.ndarray:
    """The paper's, whose zero is negative: it is negated and cut off at 15, so that codes begin at 0."""
    low, high = scales.min(-1, keepdims=True), scales.max(-1, keepdims=True)
    step = np.maximum((high - low) / 15, high * 1e-6)
    zero = np.clip(np.round(low / step), 0, 15)
    return np.maximum((np.clip(np.round(scales / step) - zero, 0, 15) + zero) * step, 1e-30)


WAYS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "exact scales": (lambda scales: scales, 16 / 16),
    "no second-order zero": (without_zero, 4 / 16 + 16 / 256),
    "negated, 0 to 15": (with_zero, 4 / 16 + 16 / 256 + 4 / 256),
}


def second_order(w: np.ndarray) -> Iterator[tuple[str, float, float]]:
    """(way, relative squared error of the scales, of the weights) of w [K, N], rounded to 2 bits."""
    groups = w.astype(np.float64).reshape(-1, 16, w.shape[1])
    low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
    scales = np.maximum((high - low) / 3, 1e-30).reshape(len(groups), -1, 16)
    for name, (round_scales, _) in WAYS.items():
        rounded = round_scales(scales)
        scale = rounded.reshape(low.shape)[:, None]
        zero = np.clip(np.round(-low[:, None] / scale), 0, 3)
        again = (np.clip(np.round(groups / scale) + zero, 0, 3) - zero) * scale
        yield name, _relative(rounded, scales), _relative(again, groups)


def schemes(w: np.ndarray) -> Iterator[tuple[str, float, float]]:
    """(scheme, bits a weight, relative squared error of the weights) of w [K, N]."""
    for name, options in SCHEMES.items():
        weight = quantize(w, **options)
        bits = weight.bits_per_weight
        if isinstance(weight, MixedBitWeight) and "clip_scales" in options:
            bits = packed_bits_per_weight(weight)
        yield name, bits, _relative(np.asarray(weight.dequantize()), w)


def _relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.sum((got.astype(np.float64) - want) ** 2) / np.sum(want.astype(np.float64) ** 2))


def weights_of(checkpoint: str, layers: Sequence[int]) -> Iterator[np.ndarray]:
    """Kernels [K, N] of these layers."""
    model, _ = load_model(checkpoint)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path[-1] == "kernel" and path[-2] in KERNELS:
            yield from (np.asarray(variable[layer]) for layer in layers)


def mean_rows(weights: Sequence[np.ndarray], measure: Callable) -> dict[str, np.ndarray]:
    """Name -> what was measured, a mean over weights of all matrices."""
    sums: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(2))
    for w in weights:
        for name, *values in measure(w):
            sums[name] += np.asarray(values) * w.size
    return {name: total / sum(w.size for w in weights) for name, total in sums.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="smollm2", help="smollm2, a Hugging Face folder, or a .gguf file")
    parser.add_argument("--layers", default="0,10,20,29", help="numbers, with commas")
    arguments = parser.parse_args(argv)
    weights = list(weights_of(arguments.checkpoint, [int(x) for x in arguments.layers.split(",")]))
    print(
        "| scales of 16 x 16 weights | bits of scales | error of scales | error of weights |\n| --- | --- | --- | --- |"
    )
    for name, (of_scales, of_weights) in mean_rows(weights, second_order).items():
        print(f"| {name} | {WAYS[name][1]:.4f} | {of_scales:.5f} | {of_weights:.4f} |")
    print("\n| `quantize` | bits a weight | error of weights |\n| --- | --- | --- |")
    for name, (bits, error) in mean_rows(weights, schemes).items():
        print(f"| {name} | {bits:.3f} | {error:.6f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
