# SPDX-License-Identifier: Apache-2.0
"""Times decoding alone: one token more for each row of a batch, behind prompts of any length.

    python -m benchmarks.decoding --preset=llama2_7b --batch=1,2,4,8 --prompt=128,1024,8192
    python -m benchmarks.decoding --preset=llama2_7b --batch=1,8 --prompt=1024 --variants=ablation,huggingface

Weights, tokens and caches are random: none changes the time, and no prompt need be read. A step is a 32nd of what
`models.decode_loop.decode` takes for a chunk, wall clock. Variants, in the order in which FlashDecoding++ adds them:

    baseline      online softmax, products by XLA
    A             asynchronous softmax
    A+B           and all products by the flat GEMM on tensor cores (route B)
    auto          and each product by the route that was measured as the fastest (A+B+C)
    huggingface   transformers' generate, eager, SDPA, its default cache; needs PyTorch on the same GPU

Beside a figure stands the part of the read bandwidth that weights, keys and values alone take. Appends to
benchmarks/results/<device>_models.csv.
"""

import argparse
import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import rows, timing
from benchmarks.rows import ModelRow, number
from models import decode_loop
from models.cache import KVCache
from models.decode_loop import CHUNK, Settings, State
from models.decoder import Decoder, LayerWeights
from models.llama import LlamaConfig
from models.presets import PRESETS, preset
from models.sampling import Sampling
from pallas_kernels import UnifiedMax
from pallas_kernels.core import device as device_lib
from pallas_kernels.flat_gemm import routes

ABLATION = ("baseline", "A", "A+B", "auto")
VARIANTS = (*ABLATION, "huggingface")
READ_BANDWIDTH = {"sm90": 3.05e12}  # bytes a second that a large read takes on an H100


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    config, dtype = preset(options.preset), jnp.dtype(options.dtype)
    out = options.out or rows.RESULTS / f"{rows.device_name()}_models.csv"
    print(
        f"{options.preset}: {config.num_parameters / 1e6:.0f} million parameters on {device_lib.current()}", flush=True
    )
    points = [(batch, prompt) for prompt in options.prompt for batch in options.batch]
    steps: dict[tuple[int, int], dict[str, timing.Timing]] = {point: {} for point in points}
    ours = [name for name in options.variants if name != "huggingface"]
    least = _LeastBytes(config, dtype)
    if ours:
        decoder = random_decoder(config, dtype)
        for point in points:
            for name in ours:
                with _taking(name):
                    steps[point][name] = time_step(as_variant(decoder, name), *point, repeats=options.repeats)
                _print(name, point, steps[point][name], least)
        del decoder
    if "huggingface" in options.variants:
        for point, step in huggingface_steps(config, points):
            steps[point]["huggingface"] = step
            _print("huggingface", point, step, least)
    for (batch, prompt), measured in steps.items():
        if (theirs := measured.get("huggingface")) and (best := measured.get("auto")):
            print(f"  {batch} x {prompt}: {theirs.median / best.median:.2f} x huggingface")
    shared = {"model": options.preset, "phase": "decode_step", "dtype": dtype.name, "remat": "", **rows.environment()}
    rows.append(out, [_row(shared, name, p, t, least) for p, measured in steps.items() for name, t in measured.items()])
    print(f"Appended to {out}.")
    return 0


# --- Ours ----------------------------------------------------------------------------------------------------


def random_decoder(config: LlamaConfig, dtype: jnp.dtype) -> Decoder:
    """A decoder whose activations keep their size."""
    D, N, K, H, F, V = (
        getattr(config, name) for name in ("d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "vocab_size")
    )
    draw = jax.jit(
        lambda key, shape: (jax.random.normal(key, shape) * shape[-1] ** -0.5).astype(dtype), static_argnums=1
    )
    keys = iter(jax.random.split(jax.random.key(0), 4 * config.num_layers + 2))

    def weight(*shape: int) -> jax.Array:
        return draw(next(keys), shape)

    def bias(size: int, there: bool) -> jax.Array | None:
        return jnp.zeros((size,), dtype) if there else None

    norm = jnp.ones((H,), dtype) if config.qk_norm else None
    layers = [
        LayerWeights(
            qkv=weight((N + 2 * K) * H, D),
            qkv_bias=bias((N + 2 * K) * H, config.attention_bias),
            query_norm=norm,
            key_norm=norm,
            out=weight(D, N * H),
            out_bias=bias(D, config.attention_output_bias),
            gate_up=weight(2 * F, D),
            down=weight(D, F),
        )
        for _ in range(config.num_layers)
    ]
    output = None if config.tie_embeddings else weight(V, D)
    return Decoder(weight(V, D), output, jnp.ones((D,), dtype), tuple(layers), config=config)


def as_variant(decoder: Decoder, name: str) -> Decoder:
    options: dict[str, Any] = {}
    if name != "baseline":
        options["unified_max"] = (UnifiedMax(),) * len(decoder.layers)
    if name in ("baseline", "A"):
        options["gemm_implementation"] = "xla"
    return dataclasses.replace(decoder, **options)


@contextlib.contextmanager
def _taking(name: str) -> Iterator[None]:
    """Route B for every product, in "A+B"."""
    if name != "A+B":
        yield
        return
    jax.clear_caches()  # the route is looked up while tracing
    only_b = routes.Crossings(M1=1, M2=routes.MOST_ROWS + 1)
    everywhere = {routes.key(dtype, True): {(1, 1): only_b} for dtype in ("bfloat16", "float16", "float32")}
    with mock.patch.object(routes, "table", return_value=everywhere):
        yield
    jax.clear_caches()


def time_step(decoder: Decoder, batch: int, prompt: int, *, repeats: int) -> timing.Timing:
    """Seconds of one token more of each row, behind `prompt` tokens."""
    size = -(-(prompt + CHUNK * (repeats + 2)) // 64) * 64
    cache = KVCache.zeros(decoder.config, batch, size, decoder.dtype)
    cache = dataclasses.replace(cache, lengths=jnp.full((batch,), prompt, jnp.int32))
    state = State(cache, jnp.zeros((batch,), jnp.int32), jnp.ones((batch,), jnp.int32))
    settings = Settings(
        seeds=np.uint32(0),
        request_ids=np.arange(batch, dtype=np.int32),
        sampling=Sampling().arrays(),
        stop_tokens=np.full(8, -1, np.int32),
        limits=np.int32(2**30),
    )
    done, seconds = np.zeros(batch, bool), []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        state, drawn = decode_loop.decode(decoder, state, done, CHUNK, settings, drawable=decoder.config.vocab_size)
        seconds.append((time.perf_counter() - start) / drawn.shape[1])
    return timing.summarize(seconds[2:], "wall")  # the first compiles, the second is still warming up


# --- transformers --------------------------------------------------------------------------------------------


def huggingface_steps(config: LlamaConfig, points: Sequence[tuple[int, int]]) -> Iterator[tuple[Any, timing.Timing]]:
    """The same of transformers: `generate` of 1 + 32 tokens, less that of 1, over 32."""
    import torch  # type: ignore[import-not-found]
    import transformers  # type: ignore[import-not-found]

    print(f"transformers {transformers.__version__}, torch {torch.__version__}, SDPA, eager", flush=True)
    shape = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=max(prompt for _, prompt in points) + CHUNK + 1,
        attn_implementation="sdpa",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(shape).eval()

    def seconds(tokens: Any, count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(tokens, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    for batch, prompt in points:
        tokens = torch.randint(1, config.vocab_size, (batch, prompt), device="cuda")
        with torch.inference_mode():
            seconds(tokens, 2)
            measured = [(seconds(tokens, 1 + CHUNK) - seconds(tokens, 1)) / CHUNK for _ in range(3)]
        yield (batch, prompt), timing.summarize(measured, "wall")


# --- Rows ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _LeastBytes:
    """The least that a step reads: weights, and the keys and values of each row."""

    config: LlamaConfig
    dtype: jnp.dtype

    @functools.cached_property
    def decoder(self) -> Decoder:
        """With shapes in place of arrays."""
        return jax.eval_shape(lambda: random_decoder(self.config, self.dtype))

    def __call__(self, batch: int, prompt: int) -> int:
        return self.decoder.weight_bytes + batch * self.decoder.attention_bytes(prompt + CHUNK // 2)


def _print(name: str, point: tuple[int, int], step: timing.Timing, least: _LeastBytes) -> None:
    batch, prompt = point
    rate = least(*point) / step.median
    share = READ_BANDWIDTH.get(device_lib.current().arch or "")
    of_peak = f" = {rate / share:.3f} of {share / 1e12} TB/s" if share else ""
    print(
        f"  {name:12} {batch} x {prompt:5}: {step.median * 1e3:8.3f} ms a step, {batch / step.median:8.1f} tokens/s, "
        f"{rate / 1e9:6.0f} GB/s{of_peak}",
        flush=True,
    )


def _row(
    shared: dict[str, str], name: str, point: tuple[int, int], step: timing.Timing, least: _LeastBytes
) -> ModelRow:
    batch, prompt = point
    return ModelRow(
        **shared,
        batch=str(batch),
        length=str(prompt),
        implementation=name,
        median_ms=number(step.median * 1e3),
        spread=number(step.spread, 2),
        tokens_per_second=number(batch / step.median),
        mfu_percent="",
        gbs=number(least(*point) / step.median / 1e9),
        attention_percent="",
    )


# --- Command line --------------------------------------------------------------------------------------------


def _integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _variants(text: str) -> list[str]:
    names = [one for name in text.split(",") for one in (ABLATION if name == "ablation" else (name,))]
    if unknown := [name for name in names if name not in VARIANTS]:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; known: ablation, {', '.join(VARIANTS)}")
    return names


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description="Times decoding alone.")
    parser.add_argument("--preset", default="llama2_7b", choices=PRESETS)
    parser.add_argument("--batch", type=_integers, default=[1], help="comma-separated; default 1")
    parser.add_argument("--prompt", type=_integers, default=[1024], help="tokens before; comma-separated; default 1024")
    parser.add_argument("--variants", type=_variants, default=["auto"], help="ablation, or names; default auto")
    parser.add_argument("--dtype", default="bfloat16", help="default bfloat16")
    parser.add_argument("--repeats", type=int, default=4, help="chunks of which the median is taken (default 4)")
    parser.add_argument("--out", type=Path, help="CSV file; default: benchmarks/results/<device>_models.csv")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
