# SPDX-License-Identifier: Apache-2.0
"""Causal attention of one long sequence over all devices by a ring, beside one device.

    python -m benchmarks.context_attention                                       every device of the mesh axis context
    python -m benchmarks.context_attention --lengths=8192,32768 --heads=16,4

Wall clock of a call and of a call with its gradients; output and gradients are held to those of one device first.
TFLOP/s are of the causal half, of a device; backward is two and a half times forward.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import timing
from benchmarks.arguments import integers
from pallas_kernels import flash_attention, masks
from pallas_kernels.core import device
from parallel.context import context_attention, zigzag
from parallel.mesh import make_mesh

H, BATCH = 128, 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", type=integers, default=[8192, 32768, 131072])
    parser.add_argument("--heads", type=integers, default=[16, 4], help="query heads, key heads")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--method", default="ring", choices=["ring", "all_to_all"])
    options = parser.parse_args(argv)
    devices = len(jax.devices())
    print(f"{devices} x {device.current()}, jax {jax.__version__}, {options.method}\n")
    print("| T | heads | one, ms | all, ms | times | TFLOP/s | with gradients: one, ms | all, ms | times | TFLOP/s |")
    print(f"|{' --- |' * 10}")
    for T in options.lengths:
        N, K = options.heads
        forward, both = measure(T, N, K, options.dtype, options.method)
        flops = 2 * T * T * N * H / devices  # two products over half of the pairs
        cells = []
        for (one, ring), work in ((forward, flops), (both, 3.5 * flops)):
            cells.append(f"{1e3 * one:.2f} | {1e3 * ring:.2f} | {one / ring:.2f} | {work / ring / 1e12:.0f}")
        print(f"| {T} | {N}, {K} | {' | '.join(cells)} |", flush=True)
    return 0


def measure(T: int, N: int, K: int, dtype: str, method: Any) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds of one device and of all, forward and with gradients.

    Raises:
      AssertionError: the results differ by more than rounding.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    q, dout = (jax.random.normal(key, (BATCH, T, N, H), dtype) for key in keys[:2])
    k, v = (jax.random.normal(key, (BATCH, T, K, H), dtype) for key in keys[2:])
    mesh = make_mesh(f"context:{len(jax.devices())}")
    order = zigzag([T], mesh.shape["context"])
    spread = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec(None, "context")))
    positions, ids = spread(jnp.asarray(order, jnp.int32)[None]), spread(jnp.zeros((BATCH, T), jnp.int32))
    split = [spread(x[:, order]) for x in (q, k, v, dout)]

    def of_one(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return flash_attention(q, k, v, mask=masks.Causal())

    def of_all(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return context_attention(q, k, v, positions, ids, mesh=mesh, method=method)

    one, ring = jax.jit(functools.partial(gradients, of_one)), jax.jit(functools.partial(gradients, of_all))
    names = ("out", "dq", "dk", "dv")
    for name, found, expected in zip(names, ring(*split), one(q, k, v, dout), strict=True):
        found, expected = np.asarray(found, np.float32), np.asarray(expected[:, order], np.float32)
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert error < 16 * float(jnp.finfo(dtype).eps), f"{name} of {T} tokens differs by {error:.1e}"
    seconds = lambda function, *arguments: timing.measure(function, arguments, method="wall").median  # noqa: E731
    forward = seconds(of_one, q, k, v), seconds(of_all, *split[:3])
    return forward, (seconds(one, q, k, v, dout), seconds(ring, *split))


def gradients(attend: Callable, q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> tuple[jax.Array, ...]:
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(dout)


if __name__ == "__main__":
    sys.exit(main())
