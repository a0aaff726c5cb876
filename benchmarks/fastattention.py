# SPDX-License-Identifier: Apache-2.0
"""What the FastAttention paper claims (Lin et al., 2024), shown here: python -m benchmarks.fastattention

    exchanges  how often matrix and vector unit hand a block to each other, tiled on one level and on two
    memory     size of the causal mask: all of it, against the one M-mask that every tile is cut from
    operator   attention against unfused attention; in the paper up to 10.7 times as fast, on an Ascend NPU
    prefill    tokens a second of Llama-7B with each of them; in the paper up to 5.16 times as many

The first two count, and need no accelerator. Unfused attention is measured twice: as XLA compiles it, which joins mask
and softmax into one pass over the logits, and "stored", where each step writes its T x S array, as frameworks that run
one operation after another do, and as the paper compares with. Both read and write all of the T x S plane.
Appends to benchmarks/results/<device>_fastattention.csv and prints Markdown.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import rows, table, timing
from benchmarks.arguments import integers
from benchmarks.operations import OPERATIONS
from benchmarks.rows import PaperRow, number
from benchmarks.run import Truth
from models import layers
from models.llama import Llama
from models.presets import preset
from pallas_kernels import flash_attention, masks
from pallas_kernels.core import device as device_lib
from pallas_kernels.flash_attention import tiles
from pallas_kernels.flash_attention.shapes import Shape, causal

PARTS = ("exchanges", "memory", "operator", "prefill")
BLOCK_Q = 128
# Key columns of a first-level block; the second level is 128, so the first of these is tiling on one level.
WIDTHS = (128, 256, 512, 1024)
# The matrix unit hands over logits, the vector unit probabilities, the matrix unit their product with the values.
EXCHANGES_A_BLOCK = 3


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    out = options.out or rows.RESULTS / f"{rows.device_name()}_fastattention.csv"
    print(f"{device_lib.current()}, jax {jax.__version__}", flush=True)
    measure: dict[str, Callable[[], Iterator[PaperRow]]] = {
        "exchanges": exchanges,
        "memory": memory,
        "operator": functools.partial(operator, options.lengths, options.heads, options.dtype, options.budget),
        "prefill": functools.partial(prefill, options.preset, options.prompts, options.dtype, options.budget),
    }
    for part in options.parts:
        measured = []
        for row in measure[part]():
            print(f"  {row.part} {row.case} {row.length} {row.variant}: {row.value} {row.unit}", flush=True)
            measured.append(row)
        rows.append(out, measured)
        print("\n" + "\n".join(table.paper_table(measured, part)) + "\n", flush=True)
    print(f"Appended to {out}.")
    return 0


def _row(part: str, case: str, length: int, variant: str, value: float, unit: str) -> PaperRow:
    return PaperRow(part, case, str(length), variant, number(value), unit, **rows.environment())


# --- Counted -------------------------------------------------------------------------------------------------


def exchanges(lengths: Sequence[int] = tuple(2**n * 1024 for n in range(7))) -> Iterator[PaperRow]:
    """Exchanges for each row of tiles of 128 queries, the mean over the rows: 3 for each first-level block."""
    for case, mask in (("full", None), ("causal", masks.Causal())):
        for length in lengths:
            for width in WIDTHS:
                live = tiles.schedule(mask, length, length, BLOCK_Q, width).live
                yield _row("exchanges", case, length, str(width), EXCHANGES_A_BLOCK * float(live.mean()), "exchanges")


def memory(lengths: Sequence[int] = tuple(2**n * 1024 for n in range(9))) -> Iterator[PaperRow]:
    """MiB of the causal mask of T = S = length."""
    for length in lengths:
        yield _row("memory", "causal", length, "S x S, 1 byte", length**2 / 2**20, "MiB")
        yield _row("memory", "causal", length, "S x S, float16", 2 * length**2 / 2**20, "MiB")
        for width in (512, 1024):
            m_mask = jax.eval_shape(functools.partial(tiles.m_mask, length, length, BLOCK_Q, width))
            nbytes = m_mask.size * m_mask.dtype.itemsize
            yield _row("memory", "causal", length, f"M-mask, blocks to {width}", nbytes / 2**20, "MiB")


# --- Measured ------------------------------------------------------------------------------------------------


def unfused(
    query: jax.Array, key: jax.Array, value: jax.Array, *, mask: Any, stored: bool = False, **options: Any
) -> jax.Array:
    """Softmax attention with all logits in memory, in the dtype of query, softmax in float32.

    Args:
      query, key, value: [B, T, N, H], [B, S, K, H], [B, S, K, H].
      mask: a mask, or its array.
      stored: write the result of every step.
      **options: of `flash_attention`, for it stands in its place; only `implementation`, which is not asked.
    """
    if extra := set(options) - {"implementation"}:
        raise TypeError(f"unfused attention takes no {', '.join(sorted(extra))}")
    step = jax.lax.optimization_barrier if stored else lambda x: x
    T, S = query.shape[1], key.shape[1]
    # Indices that JAX holds: of NumPy's, XLA would be given the whole array as a constant.
    visible = mask.allowed(jnp.arange(T), jnp.arange(S), T, S) if isinstance(mask, masks.Mask) else mask
    groups = query.shape[2] // key.shape[2]
    key, value = (step(jnp.repeat(x, groups, axis=2)) if groups > 1 else x for x in (key, value))
    logits = step(jnp.einsum("btnh,bsnh->bnts", query, key))
    scaled = logits * jnp.asarray(query.shape[-1] ** -0.5, logits.dtype)
    logits = step(jnp.where(step(visible), scaled, jnp.finfo(logits.dtype).min))
    p = step(jax.nn.softmax(logits.astype(jnp.float32), axis=-1).astype(query.dtype))
    return jnp.einsum("bnts,bsnh->btnh", p, value)


def operator(lengths: Sequence[int], heads: int, dtype: str, budget: float) -> Iterator[PaperRow]:
    """Microseconds of causal attention with batch 1 and head dimension 128. Fewer heads where memory is short."""
    for length in lengths:
        yield from _operator(length, heads, dtype, budget)


def _operator(length: int, heads: int, dtype: str, budget: float) -> list[PaperRow]:
    operation = OPERATIONS["flash_attention"]
    shape = Shape(1, length, length, heads, heads, 128, mask_name="causal", extras=causal)
    arguments = shape.make(jnp.dtype(dtype), jax.random.key(0))
    arrays = {name: arguments[name] for name in ("query", "key", "value")}
    Truth(operation, arguments, "forward", exact=not shape.large).check(jax.jit(flash_attention)(**arguments))
    dense = masks.Causal().as_array(length, length)
    ways = {
        "ours": (functools.partial(flash_attention, mask=masks.Causal()), arrays),
        "unfused": (functools.partial(unfused, mask=masks.Causal()), arrays),
        "unfused, stored": (functools.partial(unfused, stored=True), {**arrays, "mask": dense}),
    }
    measured = []
    for variant, (function, given) in ways.items():
        try:
            t = timing.measure(lambda given, function=function: function(**given), [given], budget=budget)
        except Exception as error:
            # Whatever the allocator calls it: the plane of logits is what does not fit.
            if variant == "ours" or heads == 1 or "emory" not in str(error):
                raise
            print(f"  {length}: {heads} heads do not fit, {variant}", flush=True)
            return _operator(length, heads // 2, dtype, budget)
        measured.append(_row("operator", f"{heads} heads, {dtype}", length, variant, t.median * 1e6, "µs"))
    return measured


def prefill(name: str, lengths: Sequence[int], dtype: str, budget: float) -> Iterator[PaperRow]:
    """Tokens a second of one prompt through a model with random weights, to the logits of its last token."""

    def make(implementation: str) -> Llama:
        types: dict[str, Any] = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
        return Llama(preset(name), rngs=nnx.Rngs(0), implementation=implementation, **types)

    parameters = jax.jit(lambda: nnx.split(make("auto"))[1])()

    # The name is part of what JAX remembers a trace by: each attention needs its own.
    ways: dict[str, tuple[str, Callable]] = {
        "ours": ("auto", flash_attention),
        "unfused": ("unfused", unfused),
        "unfused, stored": ("stored", functools.partial(unfused, stored=True)),
    }
    for length in lengths:
        tokens = jax.random.randint(jax.random.key(0), (1, length), 0, preset(name).vocab_size, jnp.int32)
        for variant, (implementation, attention) in ways.items():
            graphdef = nnx.split(nnx.eval_shape(functools.partial(make, implementation)))[0]

            def last_logits(parameters: Any, tokens: jax.Array, graphdef: Any = graphdef) -> jax.Array:
                model = nnx.merge(graphdef, parameters)
                return model.logits(model.hidden(model.embed(tokens))[:, -1])

            with mock.patch.object(layers, "flash_attention", attention):
                t = timing.measure(last_logits, [parameters, tokens], method="wall", budget=budget)
            yield _row("prefill", f"{name}, {dtype}", length, variant, length / t.median, "tokens/s")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    on_cpu = device_lib.current().platform == "cpu"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fastattention", description="The paper's claims.")
    parser.add_argument(
        "--parts",
        type=lambda text: text.split(","),
        default=list(PARTS[:2] if on_cpu else PARTS),
        help=f"of {', '.join(PARTS)}; default: all, on a CPU the two that count",
    )
    parser.add_argument("--lengths", type=integers, default=[1024, 2048, 4096, 8192, 16384], help="of the operator")
    parser.add_argument("--heads", type=int, default=32, help="of the operator (default 32)")
    parser.add_argument("--preset", default="llama2_7b", help="of the prefill (default llama2_7b)")
    parser.add_argument("--prompts", type=integers, default=[2048, 4096, 8192], help="lengths of the prefill")
    parser.add_argument("--dtype", default="bfloat16", help="default bfloat16")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds of repetitions a figure (default 0.3)")
    parser.add_argument("--out", type=Path, help="CSV file; default: benchmarks/results/<device>_fastattention.csv")
    options = parser.parse_args(argv)
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"--parts: unknown {', '.join(unknown)}; known: {', '.join(PARTS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
