# SPDX-License-Identifier: Apache-2.0
"""Attention over devices against the same on one."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import flash_attention, masks
from parallel.context import context_attention, padded_length, ring_attention, zigzag
from parallel.mesh import make_mesh

# Packed documents of two rows of 128 tokens: whole multiples of 2 * 8.
DOCUMENTS = [[64, 16, 32, 16], [16, 96, 16]]
T = 128


def packed(devices: int, dtype: str = "float32", N: int = 8, K: int = 4, H: int = 16):
    """Arrays in the order of the devices, with positions, documents, and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, dout = (jax.random.normal(key, (2, T, N, H), dtype) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, T, K, H), dtype) for key in keys[2:])
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in DOCUMENTS]).astype(np.int32)
    ids = np.stack([np.repeat(np.arange(len(row)), row) for row in DOCUMENTS]).astype(np.int32)
    places = np.stack([zigzag(row, devices) for row in DOCUMENTS])
    order = lambda x: jnp.take_along_axis(x, places.reshape(*places.shape, *(1,) * (x.ndim - 2)), axis=1)  # noqa: E731
    return tuple(map(order, (q, k, v, jnp.asarray(positions), jnp.asarray(ids), dout)))


def on_one_device(q, k, v, positions, ids):
    mask = masks.Causal(positions, positions) & masks.Segments(ids, ids)
    return flash_attention(q, k, v, mask=mask, implementation="reference")


def gradients(attend, q, k, v, positions, ids, dout):
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, positions, ids), q, k, v)
    return out, *pull(dout)


@pytest.mark.parametrize("method", ["ring", "all_to_all"])
@pytest.mark.parametrize("mesh", ["context:2", "context:4", "data:2,context:2,model:2"])
def test_output_and_gradients_are_those_of_one_device(method, mesh):
    shape = make_mesh(mesh)
    arguments = packed(shape.shape["context"])
    attend = functools.partial(context_attention, mesh=shape, method=method)
    found = jax.jit(functools.partial(gradients, attend))(*arguments)
    expected = gradients(on_one_device, *arguments)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * float(jnp.abs(b).max()), err_msg=name)


def test_eight_devices_of_a_ring():
    """More devices than key heads."""
    mesh = make_mesh("context:8")
    arguments = packed(8)
    found = jax.jit(functools.partial(gradients, functools.partial(context_attention, mesh=mesh)))(*arguments)
    for a, b in zip(found, gradients(on_one_device, *arguments), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * float(jnp.abs(b).max()))


def test_float64_agrees_to_the_last_digits(float64):
    mesh, arguments = make_mesh("context:4"), packed(4, "float64")
    found = jax.jit(functools.partial(gradients, functools.partial(context_attention, mesh=mesh)))(*arguments)
    for a, b in zip(found, gradients(on_one_device, *arguments), strict=True):
        # LSE is float32, and the parts are merged by it.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("groups", [(4, 2, 1, 1), (1, 1, 2, 4), (2, 2, 2, 2), (1,) * 8])
def test_groups_are_rings_of_their_own(groups):
    """Hybrid data parallelism: documents of some devices each, in one program, with one exchange a hop. Numbers of
    documents repeat from group to group."""
    mesh, each = make_mesh("context:8"), 16
    keys = jax.random.split(jax.random.key(3), 4)
    q, dout = (jax.random.normal(key, (1, 8 * each, 4, 16)) for key in keys[:2])
    k, v = (jax.random.normal(key, (1, 8 * each, 2, 16)) for key in keys[2:])
    order, positions, whose = [], [], []
    for group, size in enumerate(groups):
        order.append(len(whose) + zigzag([size * each], size))
        positions += range(size * each)
        whose += [group] * (size * each)
    order = np.concatenate(order)
    positions = jnp.asarray(positions, jnp.int32)[None, order]
    ids = jnp.zeros_like(positions)
    rows = P(None, "context")
    attend = jax.shard_map(
        functools.partial(ring_attention, axis="context", groups=groups),
        mesh=mesh,
        in_specs=(rows,) * 5,
        out_specs=rows,
    )
    found = jax.jit(functools.partial(gradients, attend))(q, k, v, positions, ids, dout)
    apart = jnp.asarray(whose, jnp.int32)[None, order]
    for a, b in zip(found, gradients(on_one_device, q, k, v, positions, apart, dout), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * float(jnp.abs(b).max()))


def test_every_device_has_the_same_work():
    """Pairs of tokens that see each other, of each device's queries: within one part in a hundred, where contiguous
    pieces differ by four times."""
    positions = np.concatenate([np.arange(n) for row in DOCUMENTS[:1] for n in row])

    def of_devices(order):
        return (positions[order] + 1).reshape(8, -1).sum(1)

    zigzagged, contiguous = of_devices(zigzag(DOCUMENTS[0], 8)), of_devices(np.arange(T))
    assert zigzagged.max() == zigzagged.min()
    assert contiguous.max() > 4 * contiguous.min()


def test_the_program_keeps_no_visited_key():
    """Backward sends keys round again: what is kept from the forward pass is of this device alone, whatever the number
    of devices."""
    mesh, (q, k, v, positions, ids, _) = make_mesh("context:8"), packed(8)
    sharding = NamedSharding(mesh, P(None, "context"))
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in (q, k, v, positions, ids)]

    def loss(q, k, v, positions, ids):
        return jnp.sum(context_attention(q, k, v, positions, ids, mesh=mesh) ** 2)

    residuals = jax.eval_shape(
        lambda *a: jax.vjp(functools.partial(loss, positions=a[3], ids=a[4]), *a[:3])[1], *arrays
    )
    kept = sum(x.size for x in jax.tree.leaves(residuals))
    ours = sum(x.size for x in (q, k, v, positions, ids, q)) + q.shape[0] * q.shape[1] * q.shape[2]  # and out, lse
    assert kept <= ours + 2 * q.size  # the square's own


def test_bad_arguments_are_named():
    mesh, (q, k, v, positions, ids, _) = make_mesh("context:8"), packed(8)
    with pytest.raises(
        ValueError, match='needs a multiple of 8 key heads on each device, and there are 4; use method="ring"'
    ):
        context_attention(q, k, v, positions, ids, mesh=mesh, method="all_to_all")
    with pytest.raises(ValueError, match=r'method must be "ring" or "all_to_all", got \'tree\''):
        context_attention(q, k, v, positions, ids, mesh=mesh, method=cast(Any, "tree"))
    with pytest.raises(ValueError, match="T=100 must be a multiple of the 8 devices of context"):
        context_attention(q[:, :100], k[:, :100], v[:, :100], positions[:, :100], ids[:, :100], mesh=mesh)
    with pytest.raises(ValueError, match="a document of 20 tokens cannot be cut into 16 equal chunks; pad it to 32"):
        zigzag([16, 20], 8)
    ring = functools.partial(ring_attention, axis="context", groups=(4, 3, 1))
    with pytest.raises(
        ValueError, match=r"groups must have 8 devices together, and divide the largest, got \[4, 3, 1\]"
    ):
        jax.shard_map(ring, mesh=mesh, in_specs=(P(None, "context"),) * 5, out_specs=P(None, "context"))(
            q, k, v, positions, ids
        )
    assert [padded_length(n, 8) for n in (1, 16, 17)] == [16, 16, 32]
