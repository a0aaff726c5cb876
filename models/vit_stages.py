# SPDX-License-Identifier: Apache-2.0
"""The stages of a compressed vision transformer, each for several seeds at a time: one program, vmapped.

    dense      from random parameters, by labels
    prune      from a dense run: 2:4 masks, then distilled from the dense model                        stage 1
    quantize   from a pruned run (or a dense one): calibrated, then distilled under fake quantization  stage 2

    run = train(stage, start, train_images, test_images)        Run: parameters [S, ...], accuracy of each seed, losses
    run.save(folder); Run.load(folder)

No steps are a stage, too: one-shot pruning, quantization after training. Labels below 0 are not there, and unsupervised
distillation (weights.hard = 0) looks at none.

Source: Yu et al., "Boost Vision Transformer with GPU-Friendly Sparsity and Quantization", 2023 (GPUSQ-ViT).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from flax import nnx

from models import distill, images, qat
from models.arithmetic import FLOATING, FakeQuantized, Pair
from models.checkpoint import CheckpointError, check_free, open_safetensors, whole_folder
from models.images import Augmentation, Images
from models.qat import Observer
from models.tokenizer import read_json, write_json
from models.training import make_schedule
from models.vit import ViT, ViTConfig
from models.vit_compress import Pattern, calibrated, flat_names, integers, masks_of, pruning_masks, save_compressed_vit

Kind = Literal["dense", "prune", "quantize"]
CALIBRATION, TESTED = 256, 500  # images at a time
AUGMENTATION = Augmentation()
_FILE, _VERSION = "state.safetensors", 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage does.

    Attributes:
      kind: "dense", "prune" or "quantize".
      steps: of the optimizer; 0 trains nothing.
      batch_size, learning_rate, weight_decay: of AdamW with a cosine schedule and a tenth of the steps of warmup.
      weights: of the parts of the loss; a dense model has labels only.
      pattern: of "prune".
      bits, observer, percentile: of "quantize".
      layers: weights of layers in stage 2, from the losses of stage 1.
      teacher: of "quantize", the run it starts from or the dense model at its beginning.
      seeds: how many models, of seeds `seed`, `seed` + 1, ...
    """

    kind: Kind
    steps: int
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    weights: distill.Weights = dataclasses.field(default_factory=distill.Weights)
    pattern: Pattern = "2:4"
    bits: int = 8
    observer: Observer = "percentile"
    percentile: float = 99.9
    layers: distill.LayerWeights = "proportional"
    teacher: Literal["start", "dense"] = "start"
    seeds: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.kind not in ("dense", "prune", "quantize"):
            raise ValueError(f'Stage: kind must be "dense", "prune" or "quantize", got {self.kind!r}')
        for name, least in (("steps", 0), ("batch_size", 1), ("seeds", 1), ("learning_rate", 0), ("weight_decay", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"Stage: {name} must be at least {least}, got {getattr(self, name)}")
        if self.teacher not in ("start", "dense"):
            raise ValueError(f'Stage: teacher must be "start" or "dense", got {self.teacher!r}')


@dataclasses.dataclass(frozen=True)
class Run:
    """What a stage leaves.

    Attributes:
      config: of the models.
      params: nested dict, [S, ...].
      dense: parameters of the dense models that it came from, or of its own.
      accuracy: [S], share of the test images.
      layer_losses: [S, L], mean feature losses of the last tenth of stage 1; None before that.
      pattern: to which the matrices are pruned, or None.
      scales: of activations of blocks and of ends, [S, ...], after "quantize"; None before.
      bits: after "quantize".
      seconds: of training and testing.
    """

    config: ViTConfig
    params: Any
    dense: Any
    accuracy: np.ndarray
    layer_losses: np.ndarray | None = None
    pattern: Pattern | None = None
    scales: tuple[dict[str, Any], dict[str, Any]] | None = None
    bits: int | None = None
    seconds: float = 0.0

    @property
    def seeds(self) -> int:
        return len(self.accuracy)

    def arithmetic(self) -> Pair:
        """With a leading axis of seeds; FLOATING before "quantize"."""
        if self.scales is None or self.bits is None:
            return FLOATING
        return Pair(FakeQuantized(self.scales[0], self.bits), FakeQuantized(self.scales[1], 8))

    def export(self, folder: str | Path, seed: int = 0) -> int:
        """Writes the integer model of one of the seeds (vit_compress.py); returns its bytes. After "quantize"."""
        if self.bits is None:
            raise ValueError(
                'export: the run is not quantized; train.py --stage="quantize" --start=this run makes it so'
            )
        params, fake = jax.tree.map(lambda x: x[seed], (self.params, self.arithmetic()))
        return save_compressed_vit(folder, self.config, params, integers(params, fake, self.pattern))

    @property
    def dense_nbytes(self) -> int:
        """Of one dense model in float32."""
        return sum(x.nbytes for x in jax.tree.leaves(self.dense)) // self.seeds

    def save(self, folder: str | Path, *, overwrite: bool = False, **details: Any) -> None:
        """Writes the folder, whole or not at all; `details` into its run.json."""
        folder = Path(folder)
        check_free(folder, overwrite=overwrite)
        trees = {"params": self.params, "dense": self.dense}
        if self.scales is not None:
            trees |= {"blocks": self.scales[0], "ends": self.scales[1]}
        with whole_folder(folder) as new:
            tensors = {f"{tree}.{name}": np.asarray(x) for tree in trees for name, x in flat_names(trees[tree])}
            safetensors.numpy.save_file(tensors, new / _FILE)
            values = {
                "version": _VERSION,
                "vit": dataclasses.asdict(self.config),
                "accuracy": self.accuracy.tolist(),
                "layer_losses": None if self.layer_losses is None else self.layer_losses.tolist(),
                "pattern": self.pattern,
                "bits": self.bits,
                "seconds": self.seconds,
            }
            write_json(new / "run.json", values | details)

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """CheckpointError for a folder that is none of `save`'s; names the file."""
        folder = Path(folder)
        if not (folder / "run.json").is_file():
            raise CheckpointError(f"{folder}: holds no run of train.py --task=vit, which has a run.json")
        values = read_json(folder / "run.json")
        if values.get("version") != _VERSION:
            raise CheckpointError(f"{folder / 'run.json'}: version {values.get('version')!r}, this reads {_VERSION}")
        file = open_safetensors(folder / _FILE)
        trees: dict[str, Any] = {}
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            *path, last = name.split(".")
            tree = functools.reduce(lambda tree, part: tree.setdefault(part, {}), path, trees)
            tree[last] = jnp.asarray(file.get_tensor(name))
        losses = values["layer_losses"]
        return cls(
            config=ViTConfig(**values["vit"]),
            params=trees["params"],
            dense=trees["dense"],
            accuracy=np.asarray(values["accuracy"]),
            layer_losses=None if losses is None else np.asarray(losses),
            pattern=values["pattern"],
            scales=(trees["blocks"], trees["ends"]) if "blocks" in trees else None,
            bits=values["bits"],
            seconds=values["seconds"],
        )


def train(
    stage: Stage,
    start: Run | ViTConfig,
    train_images: Images,
    test_images: Images,
    *,
    augmentation: Augmentation | None = AUGMENTATION,
    dtype: Any = jnp.float32,
    report: Callable[[int, dict[str, np.ndarray]], object] | None = None,
) -> Run:
    """Runs a stage for all its seeds.

    Args:
      stage: what to do.
      start: a run of as many seeds to go on from; for "dense" the architecture.
      train_images, test_images: resized as the model needs; labels below 0 are not there.
      augmentation: of the images of training.
      dtype: of computation; parameters are float32.
      report: called after a step with its number and each loss [S].

    Raises:
      ValueError: a start that does not fit the stage; a loss that is not finite.
    """
    config = check_start(stage, start)
    began = time.perf_counter()
    make = functools.partial(ViT, config, dtype=dtype, param_dtype=jnp.float32)
    graphdef = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))[0]
    seeds = range(stage.seed, stage.seed + stage.seeds)
    if isinstance(start, Run):
        params, dense, pattern = start.params, start.dense, start.pattern
    else:
        made = [nnx.to_pure_dict(nnx.split(make(rngs=nnx.Rngs(seed)))[1]) for seed in seeds]
        params, pattern = jax.tree.map(lambda *parts: jnp.stack(parts), *made), None
        dense = params
    teacher = dense if stage.teacher == "dense" else params
    masks: Any = jax.tree.map(lambda _: None, params)
    if stage.kind == "prune":
        masks, pattern = pruning_masks(params, stage.pattern), stage.pattern
        params = qat.apply_masks(params, masks)
    elif pattern is not None:
        # The pattern of stage 1: what it left out is 0.
        masks = masks_of(params)
    run = Run(config, params, dense, np.zeros(stage.seeds), pattern=pattern)
    if isinstance(start, Run):
        run = dataclasses.replace(run, layer_losses=start.layer_losses)
    if stage.kind == "quantize":
        run = dataclasses.replace(run, scales=_scales(stage, graphdef, params, train_images, seeds), bits=stage.bits)
    rho = _rho(stage, run)
    params, losses = _fit(stage, graphdef, run, teacher, masks, rho, train_images, augmentation, seeds, report)
    run = dataclasses.replace(run, params=params)
    if stage.kind == "dense":
        run = dataclasses.replace(run, dense=params)
    if losses is not None and stage.kind == "prune":
        run = dataclasses.replace(run, layer_losses=losses)
    found = accuracy(graphdef, run, test_images)
    return dataclasses.replace(run, accuracy=found, seconds=time.perf_counter() - began)


def accuracy(graphdef: nnx.GraphDef, run: Run, test_images: Images) -> np.ndarray:
    """[S], the share of the images that have a label which each model classifies rightly."""

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, None))
    def classes(params: Any, arithmetic: Pair, pixels: jax.Array) -> jax.Array:
        return jnp.argmax(nnx.merge(graphdef, params)(pixels, arithmetic), axis=-1)

    parts = range(0, len(test_images), TESTED)
    pixels = images.normalized(test_images.pixels)
    found = [np.asarray(classes(run.params, run.arithmetic(), pixels[at : at + TESTED])) for at in parts]
    known = test_images.labels >= 0
    return (np.concatenate(found, axis=1) == test_images.labels)[:, known].mean(axis=1)


def check_start(stage: Stage, start: Run | ViTConfig) -> ViTConfig:
    """The architecture; ValueError if a stage cannot go on from there."""
    if isinstance(start, ViTConfig):
        if stage.kind != "dense":
            raise ValueError(f'train: "{stage.kind}" goes on from a run; say which one, --start=FOLDER')
        return start
    if stage.kind == "dense":
        raise ValueError('train: "dense" starts from random parameters, of a ViTConfig')
    if start.seeds != stage.seeds:
        raise ValueError(f"train: the run to start from has {start.seeds} seeds, this stage {stage.seeds}")
    if start.bits is not None or (stage.kind == "prune" and start.pattern is not None):
        done = "quantized" if start.bits is not None else "pruned"
        raise ValueError(f'train: the run to start from is {done} already, and "{stage.kind}" would come after it')
    return start.config


def _scales(
    stage: Stage, graphdef: nnx.GraphDef, params: Any, train_images: Images, seeds: range
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Of activations, [S, ...], each seed from images of its own."""
    found = []
    for i, seed in enumerate(seeds):
        chosen = np.random.default_rng(seed).permutation(len(train_images))[:CALIBRATION]
        pixels = images.normalized(train_images.pixels[chosen])
        own = jax.tree.map(lambda x, i=i: x[i], params)
        options: dict[str, Any] = {"bits": stage.bits, "observer": stage.observer, "percentile": stage.percentile}
        pair = calibrated(graphdef, own, pixels, **options)
        found.append((dict(pair.blocks.scales), dict(pair.ends.scales)))
    return jax.tree.map(lambda *parts: jnp.stack(parts), *found)


def _rho(stage: Stage, run: Run) -> jax.Array:
    """[S, L of the last half], weights of layers."""
    last = critical(run.config)
    if stage.kind != "quantize" or run.layer_losses is None:
        return jnp.ones((stage.seeds, last))
    return jnp.asarray([distill.layer_weights(own, stage.layers) for own in run.layer_losses], jnp.float32)


def critical(config: ViTConfig) -> int:
    """How many of the last layers are distilled: later ones decide, and have features worth mimicking."""
    return max(1, config.num_layers // 2)


def _fit(
    stage: Stage,
    graphdef: nnx.GraphDef,
    run: Run,
    teacher: Any,
    masks: Any,
    rho: jax.Array,
    train_images: Images,
    augmentation: Augmentation | None,
    seeds: range,
    report: Callable[[int, dict[str, np.ndarray]], object] | None,
) -> tuple[Any, np.ndarray | None]:
    """Parameters after the steps, and mean feature losses [S, L] of the last tenth of them."""
    if not stage.steps:
        return run.params, None
    schedule = make_schedule("cosine", stage.learning_rate, stage.steps, stage.steps // 10)
    optimizer = optax.adamw(schedule, weight_decay=stage.weight_decay, mask=_decayed)
    last, distilled = critical(run.config), stage.kind != "dense"

    def outputs(params: Any, arithmetic: Pair, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, params)
        hidden, of_blocks = model.features(pixels, arithmetic)
        return model.logits(hidden, arithmetic.ends), of_blocks[-last:]

    def losses(params: Any, teacher: Any, arithmetic: Pair, rho: jax.Array, batch: dict[str, jax.Array]) -> Any:
        student = outputs(params, arithmetic, batch["images"])
        if not distilled:
            hard = distill.hard_loss(student[0], batch["labels"])
            return hard, {"hard": hard, "layers": jnp.zeros(last)}
        return distill.loss(student, outputs(teacher, FLOATING, batch["images"]), batch["labels"], stage.weights, rho)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @jax.vmap
    def step(params: Any, state: Any, teacher: Any, masks: Any, arithmetic: Pair, rho: jax.Array, batch: Any) -> Any:
        batch = {"images": images.inputs(batch), "labels": batch["labels"]}
        (value, parts), gradients = jax.value_and_grad(losses, has_aux=True)(params, teacher, arithmetic, rho, batch)
        updates, state = qat.masked(optimizer, masks).update(gradients, state, params)
        return optax.apply_updates(params, updates), state, parts | {"loss": value}

    params = jax.tree.map(jnp.copy, run.params)  # consumed; the teacher's may be the same
    state = jax.jit(jax.vmap(optimizer.init))(params)
    data = _batches(train_images, stage, augmentation, seeds)
    tail: list[np.ndarray] = []
    for number in range(1, stage.steps + 1):
        params, state, parts = step(params, state, teacher, masks, run.arithmetic(), rho, next(data))
        if number > stage.steps - max(1, stage.steps // 10):
            tail.append(parts["layers"])
        if report is not None:
            report(number, parts)
    if not np.isfinite(np.asarray(parts["loss"])).all():
        raise ValueError(
            f"train: the loss is {np.asarray(parts['loss'])} after {stage.steps} steps; lower learning_rate"
        )
    return params, np.mean(jax.device_get(tail), axis=0)


def _decayed(params: Any) -> Any:
    """Matrices, not biases, norms, tokens or positions."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def _batches(
    train_images: Images, stage: Stage, augmentation: Augmentation | None, seeds: range
) -> Iterator[dict[str, np.ndarray]]:
    """[S, B, ...], each seed in an order of its own: of images that a loss looks at, without labels that none may."""
    if stage.kind == "dense" or stage.weights.soft == stage.weights.feature == 0:
        train_images = train_images.labelled()
        if not len(train_images):
            raise ValueError(f'train: no image has a label, and nothing else is learnt in "{stage.kind}"')
    elif stage.weights.hard == 0:
        train_images = dataclasses.replace(train_images, labels=np.full_like(train_images.labels, -1))
    iterators = [images.batches(train_images, stage.batch_size, seed=seed, augmentation=augmentation) for seed in seeds]
    for parts in zip(*iterators, strict=True):
        yield {name: np.stack([part[name] for part in parts]) for name in parts[0]}
