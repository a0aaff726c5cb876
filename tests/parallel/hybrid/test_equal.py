# SPDX-License-Identifier: Apache-2.0
"""However a global batch is cut, its loss and its gradients are those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.llama import Llama, LlamaConfig
from models.training import language_model_loss
from parallel.context import padded_length
from parallel.hybrid.execute import Executor
from parallel.hybrid.layout import Wave, rounded, waves
from parallel.hybrid.plan import CostModel, Unit, pack, units_of
from parallel.mesh import make_mesh

DEVICES, CAPACITY = 8, 256
LENGTHS = [2048, 128, 700, 250, 131, 1024, 256, 300, 128, 190, 513, 160, 129]  # packed, alone, on 2, 4 and 8 devices
COST = CostModel(1e-9, 1e-6, 0.0, 1.0, 1.0, layers=2, capacity=CAPACITY, link=1e12, host_link=1.0)
CONFIG = LlamaConfig(
    vocab_size=64,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    tie_embeddings=True,
    max_positions=2048,
)


@functools.cache
def model():
    graphdef, state = nnx.split(Llama(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32))
    return graphdef, nnx.to_pure_dict(state)


def loss_of(params, batch, attend=None):
    graphdef, _ = model()
    batch = {name: x.reshape(1, -1) if x.ndim == 1 else x for name, x in batch.items()}
    return language_model_loss(nnx.merge(graphdef, params), batch, attend=attend)[0]


@functools.cache
def documents():
    random = np.random.default_rng(0)
    return [random.integers(0, CONFIG.vocab_size, n).astype(np.int32) for n in LENGTHS]


@functools.cache
def on_one_device():
    """Each document by itself, in a row of its own length padded to one size."""
    longest = max(LENGTHS)
    fields = {"tokens": [], "targets": [], "weights": []}
    for document in documents():
        n = len(document)
        fields["tokens"].append(np.pad(document, (0, longest - n)))
        fields["targets"].append(np.pad(document[1:], (0, longest - n + 1)))
        fields["weights"].append((np.arange(longest) < n - 1).astype(np.float32))
    batch = {name: jnp.asarray(np.stack(rows)) for name, rows in fields.items()}
    batch["positions"] = jnp.broadcast_to(jnp.arange(longest, dtype=jnp.int32), batch["tokens"].shape)
    batch["segment_ids"] = (jnp.asarray(LENGTHS)[:, None] <= batch["positions"]).astype(jnp.int32)
    tokens = sum(LENGTHS) - len(LENGTHS)
    return jax.jit(jax.value_and_grad(lambda params: loss_of(params, batch) / tokens))(model()[1])


def static():
    """Data times context parallelism: rows of 2048 tokens, each on all devices."""
    rows = pack([padded_length(n, DEVICES) for n in LENGTHS], DEVICES * CAPACITY)
    return [Wave((DEVICES,), (Unit(tuple(row), DEVICES, 1.0),)) for row in rows]


def in_turn():
    """Groups by length, in the order of the batch."""
    units = [rounded(unit, LENGTHS, COST) for unit in units_of(LENGTHS, COST, DEVICES)]
    return waves([Unit(unit.sequences, unit.devices, 1.0) for unit in units], DEVICES)


def balanced():
    return waves([rounded(unit, LENGTHS, COST) for unit in units_of(LENGTHS, COST, DEVICES)], DEVICES)


def test_loss_and_gradients():
    """Of three plans, by one executor: what is compiled for one serves the others."""
    executor = Executor(loss_of, make_mesh(f"context:{DEVICES}"))
    loss_of_one, of_one = on_one_device()
    for plan in (static, in_turn, balanced):
        loss, gradients = executor.gradients(model()[1], plan(), documents(), CAPACITY)
        np.testing.assert_allclose(loss, loss_of_one, rtol=1e-5, err_msg=plan.__name__)
        for path, expected in jax.tree.leaves_with_path(of_one):
            found = functools.reduce(lambda tree, key: tree[key.key], path, gradients)
            atol = 1e-5 * float(jnp.abs(expected).max())
            np.testing.assert_allclose(found, expected, rtol=0, atol=atol, err_msg=f"{plan.__name__} {path}")
    # Of each layout one program, however often a plan like it comes.
    before = executor.programs
    executor.gradients(model()[1], balanced(), documents(), CAPACITY)
    assert executor.programs == before


def test_devices_take_different_numbers_of_documents():
    count = [0] * DEVICES
    for wave in balanced():
        first = 0
        for group, unit in zip(wave.groups, wave.units, strict=True):
            for device in range(first, first + group):
                count[device] += unit is not None
            first += group
    assert max(count) > min(count)


def test_bad_plans_are_named():
    executor = Executor(loss_of, make_mesh(f"context:{DEVICES}"))
    with pytest.raises(ValueError, match=r"a wave of groups \[4\] is not for 8 devices"):
        executor.gradients(model()[1], [Wave((4,), (None,))], documents(), CAPACITY)
    with pytest.raises(ValueError, match="the batch has no token with a target; documents need two tokens"):
        executor.gradients(model()[1], waves([Unit((0,), 1, 1.0)], 8), [np.zeros(1, np.int32)], CAPACITY)
    with pytest.raises(ValueError, match="all 8 devices must be on the mesh axis context"):
        Executor(loss_of, make_mesh("data:2,context:4"))
    windowed = nnx.eval_shape(lambda: Llama(LlamaConfig(**{**vars(CONFIG), "sliding_window": 4}), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="attend= has no sliding_window=4"):
        windowed.hidden(jnp.zeros((1, 4, 32)), attend=lambda q, k, v, implementation: q)
