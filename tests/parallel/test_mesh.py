"""parallel/mesh.py on eight simulated devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from parallel.mesh import batch_sharding, fsdp_spec, make_mesh, parameter_shardings, parse_mesh, replicated


def test_every_mesh_has_all_axes():
    mesh = make_mesh("data:4,model:2")
    assert dict(mesh.shape) == {"data": 4, "context": 1, "model": 2, "pipe": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert dict(make_mesh().shape)["data"] == len(jax.devices()) == 8
    assert make_mesh({"data": 2}).devices.ravel().tolist() == jax.devices()[:2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("date:8", "unknown axis 'date'; axes are data, context, model, pipe"),
        ("data", "the size of 'data' must be a positive integer, got ''"),
        ("data:0", "the size of 'data' must be a positive integer, got '0'"),
        ("data:x", "got 'x'"),
        ("data:2,data:2", "axis 'data' is given twice"),
        ("", "unknown axis ''"),
        ("data:3", "mesh data:3 needs 3 devices, which does not divide the 8 present; nearest that do: 2 or 4"),
        (
            "data:4,model:3",
            "mesh data:4,model:3 needs 12 devices, which does not divide the 8 present; nearest that do: 8",
        ),
        ("data:16", "JAX_NUM_CPU_DEVICES=16"),
    ],
)
def test_bad_meshes(text, message):
    with pytest.raises(ValueError, match="mesh") as error:
        make_mesh(text)
    assert message in str(error.value)


def test_unknown_axis_in_a_dict():
    with pytest.raises(ValueError, match=r"unknown mesh axes \['x'\]"):
        make_mesh({"x": 2})
    assert parse_mesh(" data : 4 , pipe:2") == {"data": 4, "pipe": 2}


@pytest.mark.parametrize(
    ("shape", "first_axis", "spec"),
    [
        ((1024, 512), 0, P("data")),
        ((512, 1024), 0, P(None, "data")),
        ((1024, 1024, 8), 1, P(None, "data")),  # not the layer axis, though it is as long
        ((1023, 512), 0, P(None, "data")),  # 8 does not divide 1023
        ((1023, 511), 0, P()),
        ((512,), 0, P()),  # too small to be worth gathering
        ((), 0, P()),
    ],
)
def test_fsdp_spec(shape, first_axis, spec):
    assert fsdp_spec(shape, 8, first_axis=first_axis) == spec
    assert fsdp_spec(shape, 1, first_axis=first_axis) == P()


def test_parameter_shardings():
    mesh = make_mesh("data:8")
    params = {"blocks": {"kernel": jnp.zeros((64, 32, 64))}, "embedding": jnp.zeros((320, 64)), "scale": jnp.zeros(64)}
    whole = parameter_shardings(params, mesh)
    assert {sharding.spec for sharding in jax.tree.leaves(whole)} == {P()}
    cut = parameter_shardings(params, mesh, fsdp=True, is_stacked=lambda path: path[0].key == "blocks")
    assert {name: jax.tree.leaves(tree)[0].spec for name, tree in cut.items()} == {
        "blocks": P(None, None, "data"),
        "embedding": P("data"),
        "scale": P(),
    }
    placed = jax.device_put(params, cut)
    assert placed["blocks"]["kernel"].addressable_shards[0].data.shape == (64, 32, 8)


def test_batch_sharding():
    mesh = make_mesh("data:8")
    assert batch_sharding(mesh, axis=1).spec == P(None, "data")
    assert jax.device_put(jnp.zeros((16, 3)), batch_sharding(mesh)).addressable_shards[0].data.shape == (2, 3)
    assert replicated(mesh).is_fully_replicated
