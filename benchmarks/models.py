# SPDX-License-Identifier: Apache-2.0
"""Times whole models: a training step (and attention's share of it), prefill and decoding.

    python -m benchmarks.models --preset=llama_1b --batch=8 --length=2048 --remat=attention
    python -m benchmarks.models --preset=smollm2_135m --phases=generate --generate_batch=1,8,64 --prompt=512

Weights and tokens are random: neither changes the time. Appends to benchmarks/results/<device>_models.csv.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import rows, timing
from benchmarks.arguments import integers
from benchmarks.rows import ModelRow, number
from models import layers
from models.generate import Generator
from models.llama import REMAT_POLICIES, Llama, LlamaConfig
from models.presets import PRESETS, preset
from models.tokenizer import Tokenizer
from models.training import initial_state, make_optimizer, make_train_step
from pallas_kernels.core import device as device_lib

PHASES = ("train", "generate")


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    config = preset(options.preset)
    shared = {
        "model": options.preset,
        "dtype": options.dtype,
        "implementation": options.implementation,
        **rows.environment(),
    }
    out = options.out or rows.RESULTS / f"{rows.device_name()}_models.csv"
    print(f"{options.preset}: {config.num_parameters / 1e6:.0f} million parameters on {device_lib.current()}")
    if "train" in options.phases:
        report(out, measure_training(config, options, shared))
    if "generate" in options.phases:
        for batch in options.generate_batch:
            report(out, *measure_generation(config, options, shared, batch))
    print(f"Appended to {out}.")
    return 0


def report(out: Path, *measured: ModelRow) -> None:
    """Prints and stores rows."""
    for row in measured:
        figures = [f"{row.median_ms} ms", f"{row.tokens_per_second} tokens/s"]
        figures += [f"{row.mfu_percent}% of peak FLOP/s"] if row.mfu_percent else []
        figures += [f"{row.gbs} GB/s"] if row.gbs else []
        figures += [f"attention {row.attention_percent}% of the step"] if row.attention_percent else []
        print(f"  {row.phase:8} {row.batch} x {row.length}: {', '.join(figures)}", flush=True)
    rows.append(out, measured)


# --- Training ------------------------------------------------------------------------------------------------


def measure_training(config: LlamaConfig, options: argparse.Namespace, shared: dict[str, str]) -> ModelRow:
    """One optimizer step of AdamW on `batch` rows of `length` tokens, with and without attention."""
    step = time_training_step(config, options, options.implementation)
    # The name is part of what JAX remembers a trace by, and no implementation has it: real attention would raise.
    with mock.patch.object(layers, "flash_attention", without_attention):
        rest = time_training_step(config, options, "without attention")
    tokens = options.batch * options.length
    flops = 3 * config.flops_per_token(options.length) * tokens
    return ModelRow(
        **shared,
        phase="train",
        batch=str(options.batch),
        length=str(options.length),
        remat=options.remat or "",
        median_ms=number(step.median * 1e3),
        spread=number(step.spread, 2),
        tokens_per_second=number(tokens / step.median),
        mfu_percent=_percent_of_peak(flops / step.median, options.dtype),
        gbs="",
        attention_percent=number(100 * (1 - rest.median / step.median), 3),
    )


def time_training_step(config: LlamaConfig, options: argparse.Namespace, implementation: str) -> timing.Timing:
    """Wall clock from one finished step to the next."""
    optimizer = make_optimizer("adamw", 1e-4)

    def make_model() -> Llama:
        return Llama(
            config,
            rngs=nnx.Rngs(0),
            dtype=jnp.dtype(options.dtype),
            remat=options.remat,
            implementation=implementation,
        )

    graphdef, state = initial_state(make_model, optimizer)
    train_step = make_train_step(graphdef, optimizer)
    shape = (1, options.batch, options.length)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, config.vocab_size, jnp.int32)
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=-1),
        "segment_ids": jnp.zeros(shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(options.length, dtype=jnp.int32), shape),
        "weights": jnp.ones(shape, jnp.float32),
    }
    seconds = []
    for _ in range(options.repeats + 2):
        start = time.perf_counter()
        state, metrics = train_step(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    if not float(metrics["finite"]):
        raise RuntimeError(f"the loss became {float(metrics['loss'])}; a step that is skipped is not what is timed")
    return timing.summarize(seconds[2:], "wall")  # the first compiles, the second is still warming up


def without_attention(query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
    """Elementwise work in the place of attention, of the same shape and with gradients to all three."""
    groups = query.shape[2] // key.shape[2]
    return query + jnp.repeat(key + value, groups, axis=2)


# --- Generation ----------------------------------------------------------------------------------------------


class NumberTokenizer:
    """Token ids written as text, "17 4 99": speed does not depend on what tokens mean. Nothing ends a row."""

    eos_ids = ()
    bos_id = None

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(f"{token} " for token in ids)


def measure_generation(
    config: LlamaConfig, options: argparse.Namespace, shared: dict[str, str], batch: int
) -> tuple[ModelRow, ModelRow]:
    """Prefill of `prompt` tokens and greedy decoding of `new_tokens`, for `batch` rows at once."""
    dtype = jnp.dtype(options.dtype)
    model = Llama(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype, implementation=options.implementation)
    tokenizer = NumberTokenizer(config.vocab_size)
    generator = Generator(model, cast(Tokenizer, tokenizer))
    del model  # the generator has a copy of its own
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, options.prompt))
    prompts = [tokenizer.decode(row.tolist()) for row in ids]
    runs = [generator.generate(prompts, options.new_tokens).timings for _ in range(options.repeats + 1)][1:]

    prefill = timing.summarize([run.prefill_seconds for run in runs], "wall")
    steps = options.new_tokens - 1  # the prefill gives the first token
    decode = timing.summarize([run.decode_seconds / steps for run in runs], "wall")
    # Only the last token of each row is asked for its logits.
    logits = 2 * config.d_model * config.vocab_size
    flops = batch * (config.flops_per_token(options.prompt) * options.prompt - logits * (options.prompt - 1))
    fields = {
        **shared,
        "batch": str(batch),
        "length": str(options.prompt),
        "remat": "",
        "attention_percent": "",
    }
    return (
        ModelRow(
            **fields,
            phase="prefill",
            median_ms=number(prefill.median * 1e3),
            spread=number(prefill.spread, 2),
            tokens_per_second=number(batch * options.prompt / prefill.median),
            mfu_percent=_percent_of_peak(flops / prefill.median, options.dtype),
            gbs="",
        ),
        ModelRow(
            **fields,
            phase="decode",
            median_ms=number(decode.median * 1e3),
            spread=number(decode.spread, 2),
            tokens_per_second=number(batch / decode.median),
            mfu_percent="",
            gbs=number(runs[0].decode_bytes / steps / decode.median / 1e9),
        ),
    )


def _percent_of_peak(flops_per_second: float, dtype: str) -> str:
    peak = device_lib.current().peak_flops(dtype)
    return number(100 * flops_per_second / peak, 3) if peak else ""


# --- Command line --------------------------------------------------------------------------------------------


def _known(names: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in names]:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; known: {', '.join(names)}")
        return text.split(",")

    return parse


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description="Times whole models.")
    parser.add_argument("--preset", default="llama_1b", choices=PRESETS)
    parser.add_argument("--phases", type=_known(PHASES), default=list(PHASES), help="default: train,generate")
    parser.add_argument("--dtype", default="bfloat16", help="of activations; default bfloat16")
    parser.add_argument("--implementation", default="auto", help="of attention (decoding too); default auto")
    parser.add_argument("--batch", type=int, default=8, help="rows of a training step (default 8)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row in training (default 2048)")
    parser.add_argument("--remat", choices=list(REMAT_POLICIES), help="rematerialization; default: none")
    parser.add_argument("--generate_batch", type=integers, default=[1], help="comma-separated; default 1")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt (default 512)")
    parser.add_argument("--new_tokens", type=int, default=256, help="tokens to generate (default 256)")
    parser.add_argument("--repeats", type=int, default=10, help="of which the median is taken (default 10)")
    parser.add_argument("--out", type=Path, help="CSV file; default: benchmarks/results/<device>_models.csv")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
