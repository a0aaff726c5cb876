"""models/training.py: the loss, the optimizer and the step, against plain computations and other batchings."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from flax import nnx

from models.data import Documents, PackedRows
from models.llama import Llama, LlamaConfig
from models.training import (
    cross_entropy,
    initial_state,
    is_matrix,
    is_stacked,
    language_model_loss,
    make_evaluate,
    make_optimizer,
    make_schedule,
    make_train_step,
    microbatches,
)
from parallel import mesh as mesh_module
from parallel.mesh import batch_sharding, gather_parameters, make_mesh, parameter_shardings

CONFIG = LlamaConfig(
    vocab_size=64,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=64,
    max_positions=64,
    tie_embeddings=True,
)


def make_model(dtype=jnp.float32) -> Llama:
    return Llama(CONFIG, rngs=nnx.Rngs(0), dtype=dtype)


@functools.cache
def parameters():
    return jax.jit(lambda: nnx.to_pure_dict(nnx.split(make_model())[1]))()


def model_with_parameters(dtype=jnp.float32) -> Llama:
    graphdef, _ = nnx.split(nnx.eval_shape(functools.partial(make_model, dtype)))
    return nnx.merge(graphdef, parameters())


def make_batch(rows=8, seq_len=24, seed=0) -> dict[str, np.ndarray]:
    """Packed documents of 1 to 20 tokens, so that the weights of the rows differ."""
    generator = np.random.default_rng(seed)
    documents = [generator.integers(CONFIG.vocab_size, size=n) for n in generator.integers(1, 20, rows * seq_len)]
    packed = PackedRows(Documents.join(documents), seq_len)
    chosen = [packed[i] for i in range(rows)]
    return {name: np.stack([row[name] for row in chosen]) for name in chosen[0]}


def largest_difference(a, b) -> float:
    return max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# --- Loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logits_per_chunk", [1, 5 * 3 * 11, 10**9])  # 7 = 5 + 2: the last chunk is not full
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_cross_entropy(logits_per_chunk, z_loss):
    B, T, D, V = 3, 7, 4, 11
    generator = np.random.default_rng(0)
    hidden, matrix = generator.normal(size=(B, T, D)).astype("f"), generator.normal(size=(D, V)).astype("f")
    targets, weights = generator.integers(V, size=(B, T)), generator.integers(0, 3, size=(B, T)).astype("f")

    logits = hidden.astype(np.float64) @ matrix
    log_z = scipy.special.logsumexp(logits, axis=-1)
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    expected = np.sum(weights * (log_z - chosen + z_loss * log_z**2))
    error = scipy.special.softmax(logits, axis=-1) * (1 + 2 * z_loss * log_z)[..., None] - np.eye(V)[targets]
    expected_gradient = (weights[..., None] * error) @ matrix.T.astype(np.float64)

    def loss(hidden, matrix):
        return cross_entropy(
            lambda h: h @ matrix, hidden, targets, weights, z_loss=z_loss, logits_per_chunk=logits_per_chunk
        )

    found, (gradient, matrix_gradient) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, matrix)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        matrix_gradient, np.einsum("btd,btv->dv", hidden, weights[..., None] * error), rtol=1e-4, atol=1e-5
    )


def test_logits_never_exist_whole():
    B, T, D, V = 2, 64, 8, 4096

    def loss(matrix, hidden):
        return cross_entropy(
            lambda h: h @ matrix, hidden, jnp.zeros((B, T), int), jnp.ones((B, T)), logits_per_chunk=B * V
        )

    compiled = jax.jit(jax.grad(loss)).lower(jnp.zeros((D, V)), jnp.zeros((B, T, D))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < B * T * V * 4


def test_language_model_loss_of_bfloat16_is_that_of_the_logits():
    batch, model = make_batch(), model_with_parameters(jnp.bfloat16)

    @jax.jit
    def logits_and_loss(batch):
        logits = model(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
        return logits, *language_model_loss(model, batch)

    logits, loss, weight = logits_and_loss(batch)
    assert logits.dtype == jnp.float32
    log_p = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=-1)
    chosen = np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, -np.sum(chosen * batch["weights"]), rtol=1e-5)
    assert weight == batch["weights"].sum()


# --- Packed documents leak nothing ---------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 8])
def test_packed_documents_leak_nothing(devices):
    """Document A changed, every logit of B and the gradient of B's loss by B's embeddings stay the same bits."""
    mesh = make_mesh({"data": devices})
    graphdef, params = nnx.split(model_with_parameters())
    params = jax.device_put(params, parameter_shardings(params, mesh))
    # Rows of three documents A, B, C with other borders in each row; B is the middle one.
    B, T = 8, 32
    generator = np.random.default_rng(0)
    segment_ids, positions = np.ones((B, T), np.int32), np.zeros((B, T), np.int32)
    for row in range(B):
        first, second = 5 + row, 15 + 2 * row
        segment_ids[row, first:] += 1
        segment_ids[row, second:] += 1
        for begin, end in ((0, first), (first, second), (second, T)):
            positions[row, begin:end] = np.arange(end - begin)
    of_b = segment_ids == 2
    tokens = generator.integers(CONFIG.vocab_size, size=(B, T), dtype=np.int32)
    changed = np.where(segment_ids == 1, (tokens + 1 + segment_ids) % CONFIG.vocab_size, tokens)

    @jax.jit
    def logits_and_gradient(params, batch):
        model = nnx.merge(graphdef, params)

        def loss_of_b(x):
            h = model.hidden(x, positions=batch["positions"], segment_ids=batch["segment_ids"])
            return cross_entropy(model.logits, h, batch["targets"], batch["weights"]), model.logits(h)

        (_, logits), gradient = jax.value_and_grad(loss_of_b, has_aux=True)(model.embed(batch["tokens"]))
        return logits, gradient

    def run(tokens):
        batch = {
            "tokens": tokens,
            "targets": np.roll(tokens, -1, axis=1) * of_b,
            "weights": of_b.astype(np.float32),
            "segment_ids": segment_ids,
            "positions": positions,
        }
        logits, gradient = logits_and_gradient(params, jax.device_put(batch, batch_sharding(mesh)))
        assert len(logits.sharding.device_set) == devices
        return np.asarray(logits), np.asarray(gradient)

    logits, gradient = run(tokens)
    other_logits, other_gradient = run(changed)
    assert np.array_equal(logits[of_b], other_logits[of_b])
    assert np.array_equal(gradient[of_b], other_gradient[of_b])
    assert not gradient[~of_b].any()  # B's loss sees only B
    assert gradient[of_b].any(axis=-1).sum() >= of_b.sum() - B  # its last token predicts into C: roll's target there
    assert not np.array_equal(logits[segment_ids == 1], other_logits[segment_ids == 1])


# --- Optimizer -----------------------------------------------------------------------------------------------


def test_schedules():
    for name, last in (("cosine", 0.1), ("linear", 0), ("constant", 1), ("wsd", 0)):
        schedule = make_schedule(name, 2.0, steps=100, warmup=10)
        np.testing.assert_allclose([schedule(i) for i in range(10)], np.arange(1, 11) * 0.2, rtol=1e-6)
        np.testing.assert_allclose(schedule(100), 2.0 * last, atol=1e-6)
        assert make_schedule(name, 2.0, steps=5, warmup=0)(0) == 2.0
        assert make_schedule(name, 2.0, steps=5, warmup=1)(0) == 2.0
    # Half way down the cosine from 2.0 to 0.2.
    np.testing.assert_allclose(make_schedule("cosine", 2.0, 110, 10)(60), 1.1, rtol=1e-5)
    assert make_schedule("wsd", 2.0, 100, 10)(79) == 2.0
    np.testing.assert_allclose(make_schedule("wsd", 2.0, 100, 10)(90), 1.0, rtol=1e-6)
    with pytest.raises(ValueError, match="unknown schedule 'x'; choose one of cosine, linear, constant, wsd"):
        make_schedule("x", 1.0, 10, 0)
    with pytest.raises(ValueError, match="warmup must be at least 0 and below the 10 steps, got 10"):
        make_schedule("cosine", 1.0, 10, 10)


def test_only_matrices_decay():
    params = parameters()
    zeros = jax.tree.map(jnp.zeros_like, params)
    for name in ("adamw", "lamb"):
        optimizer = make_optimizer(name, 0.1, weight_decay=0.5)
        updates, _ = jax.jit(optimizer.update)(zeros, jax.jit(optimizer.init)(params), params)
        moved = jax.tree.map(lambda update: bool(update.any()), updates)
        assert moved == is_matrix(params)
    assert moved["blocks"]["attention"]["query"]["kernel"]
    assert moved["embedding"]["embedding"]
    assert not moved["blocks"]["mlp_norm"]["scale"]  # [L, D]: a vector in each layer
    assert not moved["final_norm"]["scale"]


def test_lamb_treats_stacked_layers_as_separate_parameters():
    generator = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return jnp.asarray(generator.normal(size=shape) * scale, jnp.float32)

    # Layers of very different size: one common trust ratio would be far off.
    layers = [{"kernel": normal(3, 4, scale=s), "scale": normal(4, scale=s)} for s in (0.01, 1.0, 100.0)]
    gradients = [{"kernel": normal(3, 4), "scale": normal(4)} for _ in layers]
    stack = lambda trees: {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *trees)}  # noqa: E731
    ours = make_optimizer("lamb", 0.1, weight_decay=0.01, clip=None)
    theirs = optax.lamb(0.1, b1=0.9, b2=0.95, weight_decay=0.01, mask=is_matrix)
    found, _ = jax.jit(ours.update)(stack(gradients), ours.init(stack(layers)), stack(layers))
    expected, _ = jax.jit(theirs.update)(gradients, theirs.init(layers), layers)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, stack(expected))


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="unknown optimizer 'sgd'; choose one of adamw, lamb"):
        make_optimizer("sgd", 0.1)


# --- Step ----------------------------------------------------------------------------------------------------


@functools.cache
def train(*, accumulate=1, devices=1, fsdp=False, dtype=jnp.float32):
    """Three steps on one batch: (state, metrics of each step, the step function, the batch)."""
    mesh = make_mesh({"data": devices})
    optimizer = make_optimizer("adamw", 1e-3)
    graphdef, state = initial_state(
        functools.partial(make_model, dtype),
        optimizer,
        params=parameters(),
        lay_out=functools.partial(parameter_shardings, mesh=mesh, fsdp=fsdp, is_stacked=is_stacked),
    )
    batch = jax.device_put(microbatches(make_batch(), accumulate), batch_sharding(mesh, axis=1))
    graphdef = gather_parameters(graphdef, state.params, dtype=dtype)
    # The programs are tiny and run a few times: compiling them well would take longer than it saves.
    quickly = {"xla_backend_optimization_level": 0}
    step = (
        make_train_step(graphdef, optimizer, shardings=state.shardings)
        .lower(state, batch)
        .compile(compiler_options=quickly)
    )
    metrics = []
    for _ in range(3):
        state, found = step(state, batch)
        metrics.append(jax.device_get(found))
    return state, metrics, step, batch


def test_loss_falls():
    _, metrics, _, _ = train()
    losses = [m["loss"] for m in metrics]
    assert losses[0] == pytest.approx(np.log(CONFIG.vocab_size), rel=0.1)
    assert losses[0] > losses[1] > losses[2]
    assert all(m["finite"] for m in metrics)


def test_accumulation_equals_one_big_batch():
    state, metrics, _, _ = train()
    other, other_metrics, _, _ = train(accumulate=4)
    assert largest_difference(state.params, other.params) < 1e-5
    for found, expected in zip(other_metrics, metrics, strict=True):
        for name in found:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4)
    with pytest.raises(ValueError, match="a batch of 8 rows cannot be cut into 3 equal microbatches"):
        microbatches(make_batch(), 3)


@pytest.mark.parametrize("fsdp", [False, True])
def test_eight_devices_equal_one(fsdp, monkeypatch):
    monkeypatch.setattr(mesh_module, "FSDP_MIN_SIZE", 64)
    one, *_ = train()
    eight, *_ = train(devices=8, fsdp=fsdp)
    assert largest_difference(jax.device_get(one.params), jax.device_get(eight.params)) < 1e-5
    kernel = eight.params["blocks"]["mlp"]["up"]["kernel"]
    moment = optax.tree_utils.tree_get(eight.opt_state, "mu")["blocks"]["mlp"]["up"]["kernel"]
    for array in (kernel, moment):
        part = array.addressable_shards[0].data.size
        assert part * (8 if fsdp else 1) == array.size


def test_fsdp_moves_parameters_and_never_activations(monkeypatch):
    monkeypatch.setattr(mesh_module, "FSDP_MIN_SIZE", 64)
    *_, step, batch = train(devices=8, fsdp=True)
    collective = re.compile(r" (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
    moved = [line.split(" = ")[1] for line in step.as_text().splitlines() if collective.search(line)]
    shapes = [
        [int(size) for size in shape.split(",") if size]
        for line in moved
        for shape in re.findall(r"\w+\[([\d,]*)\]", collective.split(line)[0])
    ]
    assert [CONFIG.d_model, CONFIG.d_ff] in shapes
    seq_len = batch["tokens"].shape[-1]
    assert not any(seq_len in shape for shape in shapes)


def test_bfloat16_keeps_float32_masters():
    state, metrics, _, _ = train(dtype=jnp.bfloat16)
    _, reference, _, _ = train()
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert metrics[-1]["loss"] == pytest.approx(reference[-1]["loss"], rel=2e-2)


def test_a_step_that_is_not_finite_changes_nothing():
    state, _, step, batch = train()
    before = jax.device_get(state)
    copy = jax.device_put(before, state.shardings)
    state, metrics = step(copy, batch | {"weights": batch["weights"] * np.nan})
    assert not metrics["finite"]
    assert np.isnan(metrics["loss"])
    assert jax.tree.all(jax.tree.map(np.array_equal, before, jax.device_get(state)))
    state, metrics = step(state, batch)
    assert metrics["finite"]
    assert int(state.step) == 4


def test_clipping_bounds_the_gradient():
    # Seen in Adam's first moment: the size of its first step is the same whatever the gradient's.
    optimizer = make_optimizer("adamw", 1.0, clip=0.5)
    clip = optax.clip_by_global_norm(0.5)
    gradients = {"a": jnp.full((4,), 100.0)}
    state = optimizer.init(gradients)
    _, (_, state) = optimizer.update(gradients, state, gradients)
    expected, _ = clip.update(gradients, clip.init(gradients))
    np.testing.assert_allclose(optax.tree_utils.tree_get(state, "mu")["a"], 0.1 * expected["a"], rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(expected["a"]), 0.5, rtol=1e-5)


def test_initial_parameters():
    optimizer = make_optimizer("adamw", 1e-2)
    mesh = make_mesh("data:8")
    lay_out = functools.partial(parameter_shardings, mesh=mesh, fsdp=True, is_stacked=is_stacked)
    _, made = initial_state(make_model, optimizer, lay_out=lay_out)
    assert largest_difference(jax.device_get(made.params), parameters()) == 0  # however they are sharded
    graphdef, state = initial_state(make_model, optimizer, params=parameters())
    assert dataclasses.asdict(nnx.merge(graphdef, state.params).config) == dataclasses.asdict(CONFIG)
    jax.tree.map(lambda x: x.delete(), state)  # as a step does
    assert np.isfinite(parameters()["embedding"]["embedding"]).all()


def test_evaluation_is_weighted_by_token():
    model, batch = model_with_parameters(), make_batch()
    graphdef, params = nnx.split(model)
    evaluate = make_evaluate(graphdef)
    halves = [{name: array[part] for name, array in batch.items()} for part in (slice(0, 2), slice(2, 8))]
    loss, weight = jax.jit(functools.partial(language_model_loss, model))(batch)
    assert evaluate(params, [batch]) == pytest.approx(float(loss / weight), rel=1e-6)
    assert evaluate(params, halves) == pytest.approx(float(loss / weight), rel=1e-5)
