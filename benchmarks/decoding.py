# SPDX-License-Identifier: Apache-2.0
"""Times decoding alone: one token more for each row of a batch, behind prompts of any length.

    python -m benchmarks.decoding --preset=llama2_7b --batch=1,2,4,8 --prompt=128,1024,8192
    python -m benchmarks.decoding --preset=llama2_7b --batch=1,8 --prompt=1024 --variants=ablation,huggingface
    python -m benchmarks.decoding --preset=llama2_7b --prompt=128,1024 --variants=auto,mixed_2_4,int4,int8

Weights, tokens and caches are random: none changes the time, and no prompt need be read. A step is a 128th of what
`models.decode_loop` takes for as many, wall clock. Variants, in the order in which FlashDecoding++ adds them:

    baseline      online softmax, products by XLA
    A             asynchronous softmax
    A+B           and all products by the flat GEMM on tensor cores (route B)
    auto          and each product by the route that was measured as the fastest (A+B+C)
    mixed_2_4, ...  "auto" with the weights of the layers in few bits, any scheme of `quantize`; embedding and output
                  projection stay as they are
    huggingface   transformers' generate, eager, SDPA, its default cache; needs PyTorch on the same GPU

Beside a figure stands the part of the read bandwidth that weights, keys and values alone take: those of the variant,
so that fewer bits are no larger part. Appends to benchmarks/results/<device>_models.csv.
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
from benchmarks.arguments import integers
from benchmarks.rows import ModelRow, number
from models import decode_loop
from models.cache import KVCache
from models.compress import SCHEMES, summary
from models.decode_loop import Decoding, Settings, State
from models.decoder import Decoder, LayerWeights, Matrix
from models.llama import LlamaConfig
from models.presets import PRESETS, preset
from models.sampling import Sampling
from pallas_kernels import UnifiedMax
from pallas_kernels.core import device as device_lib
from pallas_kernels.flat_gemm import routes
from pallas_kernels.quantized_matmul.shapes import Shape
from pallas_kernels.quantized_matmul.weights import Weight

ABLATION = ("baseline", "A", "A+B", "auto")
VARIANTS = (*ABLATION, *SCHEMES, "huggingface")
Point = tuple[int, int]  # batch, prompt
TOKENS = 128  # that each row draws
READ_BANDWIDTH = {"sm90": 3.05e12}  # bytes a second that a large read takes on an H100


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that was measured, and the least bytes that it reads: weights, and the keys and values of each row."""

    time: timing.Timing
    nbytes: int

    @classmethod
    def of(cls, decoder: Decoder, point: Point, time: timing.Timing) -> "Step":
        """`decoder` may have shapes in place of arrays."""
        batch, prompt = point
        return cls(time, decoder.weight_bytes + batch * decoder.attention_bytes(prompt + TOKENS // 2))

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.time.median


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    config, dtype = preset(options.preset), jnp.dtype(options.dtype)
    out = options.out or rows.RESULTS / f"{rows.device_name()}_models.csv"
    print(
        f"{options.preset}: {config.num_parameters / 1e6:.0f} million parameters on {device_lib.current()}", flush=True
    )
    points = [(batch, prompt) for prompt in options.prompt for batch in options.batch]
    steps: dict[Point, dict[str, Step]] = {point: {} for point in points}
    shared = {"model": options.preset, "phase": "decode_step", "dtype": dtype.name, "remat": "", **rows.environment()}

    def record(name: str, point: Point, step: Step) -> None:
        # At once: the next may be too large for the memory.
        steps[point][name] = step
        _print(name, point, step)
        rows.append(out, [_row(shared, name, point, step)])

    for scheme, names in _by_weights(options.variants):
        decoder = random_decoder(config, dtype, scheme)
        memory = sum(leaf.nbytes for leaf in jax.tree.leaves(decoder))
        print(f"  {scheme or dtype.name}: {memory / 1e9:.2f} GB of weights; {summary(decoder)}", flush=True)
        for name in names:
            variant = as_variant(decoder, name)
            with _taking(name):
                for point in points:
                    record(name, point, Step.of(variant, point, time_step(variant, *point, repeats=options.repeats)))
        del decoder, variant
    if "huggingface" in options.variants:
        ours = jax.eval_shape(lambda: random_decoder(config, dtype))
        for point, measured in huggingface_steps(config, points):
            record("huggingface", point, Step.of(ours, point, measured))
    for (batch, prompt), measured in steps.items():
        for name, one in measured.items():
            if name in SCHEMES and (auto := measured.get("auto")):
                print(f"  {batch} x {prompt}: {name} is {auto.time.median / one.time.median:.2f} x auto")
            if name == "auto" and (theirs := measured.get("huggingface")):
                print(f"  {batch} x {prompt}: auto is {theirs.time.median / one.time.median:.2f} x huggingface")
    print(f"Appended to {out}.")
    return 0


# --- Ours ----------------------------------------------------------------------------------------------------


def random_decoder(config: LlamaConfig, dtype: jnp.dtype, scheme: Any = None) -> Decoder:
    """A decoder whose activations keep their size. With a scheme of `quantize` the weights of its layers are of that
    kind, with norms apart as models/compress.py makes them."""
    D, N, K, H, F, V = (
        getattr(config, name) for name in ("d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "vocab_size")
    )
    draw = jax.jit(
        lambda key, shape: (jax.random.normal(key, shape) * shape[-1] ** -0.5).astype(dtype), static_argnums=1
    )
    keys = iter(jax.random.split(jax.random.key(0), 4 * config.num_layers + 2))

    def weight(*shape: int) -> jax.Array:
        return draw(next(keys), shape)

    @functools.cache
    def packed(N: int, K: int) -> Weight:
        return Shape(1, N, K, scheme).make(dtype, jax.random.key(0))["weight"]

    def matrix(N: int, K: int) -> Matrix:
        # Layers may have the same numbers but not the same memory, which would be in the cache.
        return weight(N, K) if scheme is None else jax.tree.map(jnp.copy, packed(N, K))

    def norm_apart() -> jax.Array | None:
        return None if scheme is None else jnp.ones((D,), dtype)

    def bias(size: int, there: bool) -> jax.Array | None:
        return jnp.zeros((size,), dtype) if there else None

    norm = jnp.ones((H,), dtype) if config.qk_norm else None
    layers = [
        LayerWeights(
            qkv=matrix((N + 2 * K) * H, D),
            qkv_bias=bias((N + 2 * K) * H, config.attention_bias),
            query_norm=norm,
            key_norm=norm,
            out=matrix(D, N * H),
            out_bias=bias(D, config.attention_output_bias),
            gate_up=matrix(2 * F, D),
            down=matrix(D, F),
            attention_norm=norm_apart(),
            mlp_norm=norm_apart(),
        )
        for _ in range(config.num_layers)
    ]
    output = None if config.tie_embeddings else weight(V, D)
    return Decoder(weight(V, D), output, jnp.ones((D,), dtype), tuple(layers), config=config)


def as_variant(decoder: Decoder, name: str) -> Decoder:
    if name != "baseline":
        decoder = decoder.with_unified_max([UnifiedMax()] * len(decoder.layers))
    return dataclasses.replace(decoder, gemm_implementation="xla") if name in ("baseline", "A") else decoder


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
    size = -(-(prompt + TOKENS) // 64) * 64
    cache = KVCache.zeros(decoder.config, batch, size, decoder.dtype)
    settings = Settings(
        seeds=np.uint32(0),
        request_ids=np.arange(batch, dtype=np.int32),
        sampling=Sampling().arrays(),
        stop_tokens=np.full(8, -1, np.int32),
        limits=np.int32(2**30),
    )
    done, seconds = np.zeros(batch, bool), []
    for _ in range(repeats + 2):
        cache = dataclasses.replace(cache, lengths=jnp.full((batch,), prompt, jnp.int32))
        state = State(cache, jnp.zeros((batch,), jnp.int32), jnp.ones((batch,), jnp.int32))
        program = decode_loop.decode_program(decoder, state, done, settings, drawable=decoder.config.vocab_size)
        start, decoding = time.perf_counter(), Decoding(program, TOKENS)
        for _ in decoding:
            pass
        seconds.append((time.perf_counter() - start) / TOKENS)
        cache = decoding.state.cache
    return timing.summarize(seconds[2:], "wall")  # the first compiles, the second is still warming up


# --- transformers --------------------------------------------------------------------------------------------


def huggingface_steps(config: LlamaConfig, points: Sequence[tuple[int, int]]) -> Iterator[tuple[Any, timing.Timing]]:
    """The same of transformers: `generate` of 1 + 32 tokens, less that of 1, over 32: each takes the host as long."""
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
        max_position_embeddings=max(prompt for _, prompt in points) + 33,
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
        try:
            with torch.inference_mode():
                seconds(tokens, 2)
                measured = [(seconds(tokens, 33) - seconds(tokens, 1)) / 32 for _ in range(3)]
        except torch.OutOfMemoryError as error:
            print(f"  huggingface  {batch} x {prompt:5}: not enough memory: {str(error).split('. ')[1]}", flush=True)
            continue
        yield (batch, prompt), timing.summarize(measured, "wall")


# --- Rows ----------------------------------------------------------------------------------------------------


def _print(name: str, point: Point, step: Step) -> None:
    batch, prompt = point
    share = READ_BANDWIDTH.get(device_lib.current().arch or "")
    of_peak = f" = {step.rate / share:.3f} of {share / 1e12} TB/s" if share else ""
    print(
        f"  {name:12} {batch} x {prompt:5}: {step.time.median * 1e3:8.3f} ms a step, "
        f"{batch / step.time.median:8.1f} tokens/s, {step.rate / 1e9:6.0f} GB/s{of_peak}",
        flush=True,
    )


def _row(shared: dict[str, str], name: str, point: Point, step: Step) -> ModelRow:
    batch, prompt = point
    return ModelRow(
        **shared,
        batch=str(batch),
        length=str(prompt),
        implementation=name,
        median_ms=number(step.time.median * 1e3),
        spread=number(step.time.spread, 2),
        tokens_per_second=number(batch / step.time.median),
        mfu_percent="",
        gbs=number(step.rate / 1e9),
        attention_percent="",
    )


# --- Command line --------------------------------------------------------------------------------------------


def _by_weights(names: Sequence[str]) -> list[tuple[str | None, list[str]]]:
    """Our variants by the scheme of their weights, None first: those of one are measured on one decoder."""
    schemes = dict.fromkeys((None, *(name for name in names if name in SCHEMES)))
    groups = [(scheme, [name for name in names if name in ((scheme,) if scheme else ABLATION)]) for scheme in schemes]
    return [(scheme, of) for scheme, of in groups if of]


def _variants(text: str) -> list[str]:
    names = [one for name in text.split(",") for one in (ABLATION if name == "ablation" else (name,))]
    if unknown := [name for name in names if name not in VARIANTS]:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; known: ablation, {', '.join(VARIANTS)}")
    return names


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description="Times decoding alone.")
    parser.add_argument("--preset", default="llama2_7b", choices=PRESETS)
    parser.add_argument("--batch", type=integers, default=[1], help="comma-separated; default 1")
    parser.add_argument("--prompt", type=integers, default=[1024], help="tokens before; comma-separated; default 1024")
    parser.add_argument(
        "--variants", type=_variants, default=["auto"], help="ablation, or names, such as mixed_2_4; default auto"
    )
    parser.add_argument("--dtype", default="bfloat16", help="default bfloat16")
    parser.add_argument("--repeats", type=int, default=4, help="how often, of which the median is taken (default 4)")
    parser.add_argument("--out", type=Path, help="CSV file; default: benchmarks/results/<device>_models.csv")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
