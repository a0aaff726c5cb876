# SPDX-License-Identifier: Apache-2.0
"""Trains or fine-tunes a language model of the Llama family, or a vision transformer (--task=vit).

    python train.py --preset=tiny --data=kjv --steps=400 --batch_size=4 --seq_len=128 --out=runs/tiny
    python train.py --checkpoint=smollm2 --data=notes.jsonl --steps=200 --seq_len=1024 --out=runs/notes
    python train.py --task=vit --stage=dense --out=runs/dense
    python train.py --task=vit --stage=prune --start=runs/dense --out=runs/pruned
    python train.py --task=vit --stage=quantize --start=runs/pruned --out=runs/int8
    python train.py --preset=llama_1b --data=random --remat=full --batch_size=8 --seq_len=4096 --out=runs/speed

The first command takes one to two minutes on two CPU cores (about 5,000 tokens/s) and ends at an evaluation perplexity
of about 5.6 per byte. Fine-tuning SmolLM2-135M takes about 3 seconds per 256 tokens there. Run again with the same
flags, an interrupted run continues exactly where it stood; SIGTERM saves and exits 0. The folder --out then holds
checkpoints, loss.csv, loss_curve.png, TensorBoard events and export/, a Hugging Face folder for
`python infer.py --checkpoint=OUT/export`. The last line printed is a summary in JSON.

Exit codes: 0 finished or saved after SIGTERM, 1 the loss became NaN or a save failed, 2 bad input.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from models import distill, vit_stages
from models.checkpoint import check_free, load_model, save_checkpoint
from models.data import PackedRows, batches, evaluation_batches, load_documents
from models.images import CORPORA, load_images
from models.llama import Llama, LlamaConfig
from models.presets import preset
from models.run_folder import RunFolder, SaveError
from models.tokenizer import Tokenizer
from models.training import (
    OPTIMIZERS,
    SCHEDULES,
    Batch,
    TrainState,
    initial_state,
    is_stacked,
    make_evaluate,
    make_optimizer,
    make_schedule,
    make_train_step,
    microbatches,
)
from models.vit import VIT_PRESETS
from pallas_kernels.core import device
from parallel.mesh import batch_sharding, gather_parameters, make_mesh, parameter_shardings

# An evaluation takes at most this many batches, spread over the evaluation data.
EVALUATION_BATCHES = 16
# These may change when a run continues: they do not change what is computed, or only the order of sums.
FREE_SETTINGS = ("out", "overwrite", "mesh", "fsdp", "eval_every", "save_every", "keep")


class NonFiniteError(RuntimeError):
    """The loss or the gradient of a step is NaN or infinite."""


# --- Flags ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One run; the flags of the same names say what each means."""

    preset: str | None = None
    checkpoint: str | None = None
    data: str
    eval_fraction: float
    out: str
    overwrite: bool
    steps: int
    batch_size: int
    seq_len: int
    accumulate: int
    optimizer: str
    learning_rate: float
    schedule: str
    warmup: int
    weight_decay: float
    clip: float
    mesh: str | None
    fsdp: bool
    dtype: str
    remat: str | None
    implementation: str
    eval_every: int
    save_every: int
    keep: int
    seed: int


def define_flags() -> flags.FlagValues:
    """Flags of their own, so that importing this file defines none in the importing program."""
    values = flags.FlagValues()
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    floating = functools.partial(flags.DEFINE_float, flag_values=values)
    boolean = functools.partial(flags.DEFINE_boolean, flag_values=values)
    choice = functools.partial(flags.DEFINE_enum, flag_values=values)

    choice("task", "language", ("language", "vit"), "what to train; --task=vit --help shows the flags of vit")
    string("preset", None, "train this model from scratch, on bytes: tiny, small, llama_1b, ... (default tiny)")
    string("checkpoint", None, 'fine-tune this one: "smollm2", a Hugging Face folder or a .gguf file')
    string(
        "data",
        "kjv",
        "text, .jsonl, .npy or .npz file, a folder, or a corpus: kjv, python, random; several with commas",
    )
    floating("eval_fraction", 0.05, "share of the documents held out for evaluation")
    string("out", None, "folder for everything that the run writes", required=True)
    boolean("overwrite", False, "replace the run that --out holds instead of continuing it")

    integer("steps", 100, "optimizer steps")
    integer("batch_size", 8, "rows in a step, over all devices and microbatches")
    integer("seq_len", 256, "tokens in a row")
    integer("accumulate", 1, "microbatches that a step is computed in, one after the other, to save memory")
    choice("optimizer", "adamw", OPTIMIZERS, "optimizer")
    floating("learning_rate", None, "peak; default 0.003 from scratch, 0.00005 for a checkpoint")
    choice("schedule", "cosine", SCHEDULES, "learning rate after the warmup")
    integer("warmup", None, "steps of rising learning rate; default a tenth of the steps")
    floating("weight_decay", 0.1, "decay of matrices")
    floating("clip", 1.0, "largest global norm of the gradient; 0 for any")

    string("mesh", None, 'devices, such as "data:8"; default all of them')
    boolean("fsdp", False, "shard parameters and optimizer state over the mesh's data axis; saves most with --remat")
    choice("dtype", None, ("bfloat16", "float32"), "of computation; default float32 on a CPU, else bfloat16")
    string("remat", None, "recompute in the backward pass to save memory: full, attention, dots, dots_and_attention")
    string("implementation", "auto", "of flash_attention")

    integer("eval_every", 50, "steps between evaluations; 0 for only the last")
    integer("save_every", 50, "steps between checkpoints; 0 for only the last")
    integer("keep", 3, "newest checkpoints that stay")
    integer("seed", 0, "of the first parameters and of the order of the data")
    boolean("help", False, "show this")
    return values


def parse_flags(argv: Sequence[str]) -> Settings | None:
    """Settings of a command line, defaults filled in; None if it only asks for help, which is then printed."""
    values = define_flags()
    if any(argument in ("--help", "-help", "-h") for argument in argv[1:]):
        print(f"{__doc__}{values.get_help()}")
        return None
    rest = values(argv)[1:]
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}; flags are written --name=value")
    chosen: dict[str, Any] = {field.name: values[field.name].value for field in dataclasses.fields(Settings)}
    if values["task"].value != "language":
        raise ValueError("--task=vit is one word, with its equals sign: it has flags of its own")
    if chosen["preset"] and chosen["checkpoint"]:
        raise ValueError("--preset trains from scratch and --checkpoint fine-tunes; pass one of them")
    if not chosen["checkpoint"]:
        chosen["preset"] = chosen["preset"] or "tiny"
    defaults = {
        "learning_rate": 5e-5 if chosen["checkpoint"] else 3e-3,
        "warmup": chosen["steps"] // 10,
        "dtype": "float32" if jax.default_backend() == "cpu" else "bfloat16",
    }
    return Settings(**chosen | {name: value for name, value in defaults.items() if chosen[name] is None})


# --- Preparation: everything that can find fault with the input -----------------------------------------------


@dataclasses.dataclass
class Run:
    """A run that is ready to train; `fit` moves `state` and `data` forward."""

    settings: Settings
    config: LlamaConfig
    tokenizer: Tokenizer
    mesh: Mesh
    folder: RunFolder
    schedule: Callable[[int], Any]
    graphdef: nnx.GraphDef
    state: TrainState
    data: grain.DatasetIterator[dict[str, np.ndarray]]
    evaluation_rows: PackedRows | None
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[[Any, Iterator[Batch]], float]

    def place(self, batch: dict[str, np.ndarray], axis: int = 0) -> Batch:
        """Puts this process's rows (array axis `axis`) of a batch on the devices."""
        return jax.device_put(batch, batch_sharding(self.mesh, axis=axis))

    def next_batch(self) -> Batch:
        """[A, B, T] arrays of the next step."""
        return self.place(microbatches(next(self.data), self.settings.accumulate), axis=1)


def prepare(settings: Settings) -> Run:
    """Loads, checks, restores and compiles; ValueError if the input is at fault."""
    check_settings(settings)
    mesh = make_mesh(settings.mesh)
    check_mesh(settings, mesh)
    make_model, tokenizer, params = find_model(settings)
    config = nnx.eval_shape(make_model).config
    if settings.seq_len > config.max_positions:
        raise ValueError(f"seq_len={settings.seq_len} exceeds the model's {config.max_positions} positions")

    documents = load_documents(settings.data, tokenizer, vocab_size=config.vocab_size, seed=settings.seed)
    train, evaluation = documents.split(settings.eval_fraction)
    data = batches(PackedRows(train, settings.seq_len), settings.batch_size, seed=settings.seed)

    deciding = {k: v for k, v in dataclasses.asdict(settings).items() if k not in FREE_SETTINGS}
    deciding |= {"model": dataclasses.asdict(config), "data_fingerprint": documents.fingerprint()}
    folder = RunFolder(settings.out, deciding, keep=settings.keep, overwrite=settings.overwrite)

    schedule = make_schedule(settings.schedule, settings.learning_rate, settings.steps, settings.warmup)
    optimizer = make_optimizer(
        settings.optimizer, schedule, weight_decay=settings.weight_decay, clip=settings.clip or None
    )
    lay_out = functools.partial(parameter_shardings, mesh=mesh, fsdp=settings.fsdp, is_stacked=is_stacked)
    graphdef, state = initial_state(make_model, optimizer, params=params, lay_out=lay_out)
    if folder.latest_step is not None:
        state, position = folder.restore(state)
        data.set_state(position)

    gathering = gather_parameters(graphdef, state.params, dtype=settings.dtype)
    run = Run(
        settings=settings,
        config=config,
        tokenizer=tokenizer,
        mesh=mesh,
        folder=folder,
        schedule=schedule,
        graphdef=graphdef,
        state=state,
        data=data,
        evaluation_rows=None if evaluation is None else PackedRows(evaluation, settings.seq_len),
        train_step=make_train_step(gathering, optimizer, shardings=state.shardings),
        evaluate=make_evaluate(gathering),
    )
    compile_step(run)
    return run


def check_settings(settings: Settings) -> None:
    for name in ("steps", "batch_size", "seq_len", "accumulate", "keep"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}")
    for name in ("eval_every", "save_every", "weight_decay", "clip", "learning_rate"):
        if not 0 <= getattr(settings, name) < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {getattr(settings, name)}")


def check_mesh(settings: Settings, mesh: Mesh) -> None:
    unused = [axis for axis, size in mesh.shape.items() if axis != "data" and size > 1]
    if unused:
        raise ValueError(f"mesh axis {unused[0]!r} is not used by train.py; put all devices on data")
    parts = settings.accumulate * mesh.shape["data"]
    if settings.batch_size % parts:
        raise ValueError(
            f"batch_size={settings.batch_size} must be a multiple of accumulate * data = {settings.accumulate} * "
            f"{mesh.shape['data']} = {parts}; nearest: {max(1, round(settings.batch_size / parts)) * parts}"
        )


def find_model(settings: Settings) -> tuple[Callable[[], Llama], Tokenizer, Any]:
    """(what makes the model, its tokenizer, parameters to start from or None)."""
    types: dict[str, Any] = {
        "dtype": jnp.dtype(settings.dtype),
        "param_dtype": jnp.float32,
        "remat": settings.remat,
        "implementation": settings.implementation,
    }
    if settings.checkpoint is None:
        config, tokenizer, params = preset(settings.preset or ""), Tokenizer.bytes(), None
    else:
        model, tokenizer = load_model(settings.checkpoint, **types)
        config, params = model.config, nnx.to_pure_dict(nnx.split(model)[1])
    return lambda: Llama(config, rngs=nnx.Rngs(settings.seed), **types), tokenizer, params


def compile_step(run: Run) -> None:
    """Compiles the step ahead of time: a call that no implementation accepts fails here, and no step's time
    includes it."""
    position = run.data.get_state()
    batch = run.next_batch()
    run.data.set_state(position)
    start = time.perf_counter()
    run.train_step = run.train_step.lower(run.state, batch).compile()
    print(f"compiled in {time.perf_counter() - start:.1f} s")


# --- Training ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run achieved; its JSON form is the last line that train.py prints.

    Attributes:
      steps: taken in all, by earlier processes too.
      loss: of the last step, nats per token.
      eval_perplexity: of the last evaluation, per token.
      tokens_per_second: median over steps.
      mfu: model FLOP/s over the peak of the devices, from that median; None where the peak is unknown.
      seconds: of training, without preparation.
      interrupted: stopped by SIGTERM before the last step.
    """

    steps: int
    loss: float | None
    eval_perplexity: float | None
    tokens_per_second: float | None
    mfu: float | None
    seconds: float
    interrupted: bool


class Reporter:
    """Reads the metrics of finished steps, one step behind the device so that it never waits for the host."""

    def __init__(self, run: Run, progress: tqdm):
        self.run = run
        self.progress = progress
        self.pending: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        self.seconds: list[float] = []
        self.loss: float | None = None
        self.eval_loss: float | None = None
        self.resume_clock()

    def resume_clock(self) -> None:
        """Step times count from now; called after anything that is not a step."""
        self.last = time.perf_counter()

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self.pending.append((step, metrics))
        if len(self.pending) > 1:
            self._report(*self.pending.popleft())

    def drain(self) -> None:
        """Waits for all steps and reports them."""
        while self.pending:
            self._report(*self.pending.popleft())

    def _report(self, step: int, metrics: dict[str, jax.Array]) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now
        if not values.pop("finite"):
            raise NonFiniteError(
                f"step {step}: the loss is {values['loss']} and the gradient norm {values['gradient_norm']}"
            )
        self.loss = values["loss"]
        self.run.folder.record(
            step=step,
            **values,
            learning_rate=float(self.run.schedule(step - 1)),
            tokens_per_second=self.tokens_per_step / self.seconds[-1],
        )
        self.progress.update()
        self._describe()

    def evaluate(self, step: int) -> None:
        rows = self.run.evaluation_rows
        if rows is None:
            return
        size = self.run.settings.batch_size // self.run.settings.accumulate
        chosen = evaluation_batches(rows, size, limit=EVALUATION_BATCHES)
        self.eval_loss = self.run.evaluate(self.run.state.params, map(self.run.place, chosen))
        self.run.folder.record(step=step, eval_loss=self.eval_loss)
        self._describe()

    def _describe(self) -> None:
        loss = "" if self.loss is None else f"loss {self.loss:.3f}"
        rate, mfu = self.tokens_per_second(last=10), self.mfu(last=10)
        speed = "" if rate is None else f", {rate:,.0f} tokens/s, MFU {'n/a' if mfu is None else f'{mfu:.1%}'}"
        perplexity = "" if self.eval_loss is None else f", eval perplexity {math.exp(self.eval_loss):.2f}"
        self.progress.set_postfix_str(loss + speed + perplexity, refresh=False)

    @property
    def tokens_per_step(self) -> int:
        return self.run.settings.batch_size * self.run.settings.seq_len

    def tokens_per_second(self, last: int | None = None) -> float | None:
        """Median over the last steps, or over all."""
        seconds = self.seconds[-last:] if last else self.seconds
        return self.tokens_per_step / statistics.median(seconds) if seconds else None

    def mfu(self, last: int | None = None) -> float | None:
        """Model FLOP/s (three forward passes; recomputation does not count) over the devices' peak."""
        rate, peak = self.tokens_per_second(last), device.current().peak_flops(self.run.settings.dtype)
        if rate is None or peak is None:
            return None
        return 3 * self.run.config.flops_per_token(self.run.settings.seq_len) * rate / (peak * self.run.mesh.size)

    def summary(self, steps: int, seconds: float) -> Summary:
        return Summary(
            steps=steps,
            loss=self.loss,
            eval_perplexity=None if self.eval_loss is None else math.exp(self.eval_loss),
            tokens_per_second=self.tokens_per_second(),
            mfu=self.mfu(),
            seconds=seconds,
            interrupted=steps < self.run.settings.steps,
        )


def fit(run: Run) -> Summary:
    """Trains to the last step, or until SIGTERM, and saves.

    Raises:
      NonFiniteError: a loss or gradient was NaN or infinite.
      SaveError: a checkpoint could not be written.
    """
    settings, folder = run.settings, run.folder
    start, first = time.perf_counter(), int(run.state.step)
    folder.start_records(first)
    with (
        terminated() as stop,
        tqdm(total=settings.steps, initial=first, desc="training", unit="step", dynamic_ncols=True) as progress,
    ):
        reporter = Reporter(run, progress)
        step = first
        try:
            while step < settings.steps and not stop:
                run.state, metrics = run.train_step(run.state, run.next_batch())
                step += 1
                reporter.add(step, metrics)
                last = step == settings.steps or bool(stop)
                due = [last or (every and step % every == 0) for every in (settings.eval_every, settings.save_every)]
                if any(due):
                    reporter.drain()  # nothing is saved before all of it is known to be finite
                    if due[0] and not stop:
                        reporter.evaluate(step)
                    if due[1]:
                        folder.save(run.state, run.data.get_state())
                    reporter.resume_clock()
            folder.wait()
        finally:
            folder.draw(f"{settings.preset or settings.checkpoint} on {settings.data}")
    return reporter.summary(step, time.perf_counter() - start)


@contextlib.contextmanager
def terminated() -> Iterator[list[int]]:
    """Collects SIGTERMs in a list instead of dying of them: it is true once one has come."""
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)


# --- Vision transformers -------------------------------------------------------------------------------------


def define_vit_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    floating = functools.partial(flags.DEFINE_float, flag_values=values)
    choice = functools.partial(flags.DEFINE_enum, flag_values=values)
    stage, weights = vit_stages.Stage(kind="dense", steps=0), distill.Weights()

    choice("task", "vit", ("vit",), "a vision transformer, compressed in stages (GPUSQ-ViT)")
    choice("stage", "dense", ("dense", "prune", "quantize"), "train; prune to two of four and distill; quantize, too")
    string("start", None, "folder of the run that prune and quantize go on from")
    choice("preset", "vit_tiny_28", tuple(VIT_PRESETS), "model of the dense stage")
    choice("data", "mnist_5k", CORPORA, "images")
    integer("test_per_class", 100, "images of each class that are for testing")
    integer("labels_per_class", 0, "images of each class whose label is known in training; 0 for all")
    string("out", None, "folder for the run; quantize also writes the integer model, OUT/export", required=True)
    flags.DEFINE_boolean("overwrite", False, "replace the run that --out holds", flag_values=values)
    integer("seeds", stage.seeds, "models that are trained at a time, of seeds --seed, --seed + 1, ...")
    integer("seed", stage.seed, "of the first")
    integer("steps", 400, "optimizer steps; 0 only prunes, or only calibrates")
    integer("batch_size", stage.batch_size, "images in a step, of each seed")
    floating("learning_rate", stage.learning_rate, "peak, of a cosine after a tenth of the steps")
    floating("weight_decay", stage.weight_decay, "decay of matrices")
    floating("hard", weights.hard, "weight of the labels; 0 looks at none: unsupervised")
    floating("soft", weights.soft, "weight of the teacher's soft labels")
    floating("feature", weights.feature, "weight of the features of the last half of the blocks")
    floating("temperature", weights.temperature, "of soft labels")
    choice("layers", stage.layers, ("proportional", "uniform", "inverse"), "weights of blocks in quantize")
    choice("teacher", stage.teacher, ("start", "dense"), "of quantize: the run it starts from, or the dense model")
    choice("pattern", stage.pattern, ("2:4", "4:8"), "of prune: 4:8 keeps pairs, for 4 bits")
    integer("bits", stage.bits, "of quantize: 8 or 4")
    choice("observer", stage.observer, ("percentile", "max", "mse"), "how ranges of activations are chosen")
    floating("percentile", stage.percentile, "of the first of these")
    choice("dtype", "float32", ("float32", "bfloat16"), "of computation")
    flags.DEFINE_boolean("help", False, "show this", flag_values=values)
    return values


def train_vit(argv: Sequence[str]) -> int:
    """A stage of models/vit_stages.py; the last line is a summary in JSON."""
    values = define_vit_flags()
    if any(argument in ("--help", "-help", "-h") for argument in argv[1:]):
        print(f"{vit_stages.__doc__}{values.get_help()}")
        return 0
    try:
        if rest := values(argv)[1:]:
            raise ValueError(f"unexpected argument {rest[0]!r}; flags are written --name=value")
        weights = distill.Weights(values.hard, values.soft, values.feature, values.temperature)
        own = {field.name for field in dataclasses.fields(vit_stages.Stage)} - {"kind", "weights"}
        chosen: dict[str, Any] = {name: values[name].value for name in own}
        stage = vit_stages.Stage(kind=values.stage, weights=weights, **chosen)
        check_free(Path(values.out), values.overwrite)
        start = vit_stages.Run.load(values.start) if values.start else VIT_PRESETS[values.preset]
        train, test = load_images(values.data).split(values.test_per_class, seed=0)
        if values.labels_per_class:
            train = train.with_labels(values.labels_per_class, seed=0)
        size = vit_stages.check_start(stage, start).image_size
        train, test = train.resized(size), test.resized(size)
        with tqdm(total=stage.steps, desc=stage.kind, unit="step", dynamic_ncols=True) as progress:
            run = vit_stages.train(
                stage, start, train, test, dtype=jnp.dtype(values.dtype), report=lambda step, parts: progress.update()
            )
        run.save(values.out, overwrite=values.overwrite, stage=dataclasses.asdict(stage), start=values.start)
        summary: dict[str, Any] = {"accuracy": run.accuracy.tolist(), "seconds": run.seconds}
        if stage.kind == "dense":
            summary["bytes"] = run.dense_nbytes
        elif stage.kind == "quantize":
            nbytes = run.export(Path(values.out) / "export")
            summary |= {"bytes": nbytes, "ratio": run.dense_nbytes / nbytes}
            print(f"{nbytes:,} bytes in {values.out}/export, {summary['ratio']:.2f} times fewer than in float32")
    except (ValueError, OSError, flags.Error) as error:
        return fail(str(error), 2)
    print(json.dumps(summary))
    return 0


# --- Command -------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    if "--task=vit" in argv:
        return train_vit(argv)
    try:
        settings = parse_flags(argv)
        if settings is None:
            return 0
        run = prepare(settings)
    except (ValueError, OSError, flags.Error) as error:
        return fail(str(error), 2)
    print(
        f"{run.config.num_parameters:,} parameters on {run.mesh.size} x {device.current()}, "
        f"step {int(run.state.step)} of {settings.steps}, into {run.folder.path}"
    )
    try:
        summary = fit(run)
        if not summary.interrupted:
            export = run.folder.path / "export"
            save_checkpoint(export, nnx.merge(run.graphdef, run.state.params), run.tokenizer, overwrite=True)
            print(f"exported to {export}")
        print(json.dumps(dataclasses.asdict(summary)))
        return 0
    except NonFiniteError as error:
        return fail(f"{error}; {run.folder.describe_latest()}. Lower --learning_rate or look at the data.", 1)
    except (SaveError, OSError) as error:
        return fail(str(error), 1)
    finally:
        run.folder.close()


def fail(message: str, code: int) -> int:
    print("train.py: error: " + " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv))
