# SPDX-License-Identifier: Apache-2.0
"""The one place that makes device meshes, and the rules by which arrays are laid out on them.

A mesh has up to four named axes, always in this order:

    data     different rows of the batch; with FSDP also a slice of every parameter
    context  different parts of a sequence
    model    different parts of a layer
    pipe     different layers

`context` and `model` communicate most, so they come after `data`: neighboring devices share the fastest links.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

AXES = ("data", "context", "model", "pipe")

# Smaller parameters stay whole on each device: gathering them costs more latency than their memory is worth.
FSDP_MIN_SIZE = 2**12


def parse_mesh(text: str) -> dict[str, int]:
    """Parses "data:4,model:2" into {"data": 4, "model": 2}; ValueError for anything else."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition(":"))
        if axis not in AXES:
            raise ValueError(f"mesh {text!r}: unknown axis {axis!r}; axes are {', '.join(AXES)}")
        if axis in sizes:
            raise ValueError(f"mesh {text!r}: axis {axis!r} is given twice")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"mesh {text!r}: the size of {axis!r} must be a positive integer, got {size!r}")
        sizes[axis] = int(size)
    return sizes


def make_mesh(sizes: dict[str, int] | str | None = None, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh of the given axis sizes, with automatic sharding propagation (AxisType.Auto).

    Args:
      sizes: axis name -> number of devices, or its text form "data:4,model:2"; None puts all devices on `data`.
        Axes not named have size 1, so every mesh has all of AXES. The product must divide the number of devices;
        if it is smaller, the first devices are used.
      devices: default all of them.

    Raises:
      ValueError: names the number of devices and the nearest sizes that fit it.
    """
    devices = jax.devices() if devices is None else devices
    if isinstance(sizes, str):
        sizes = parse_mesh(sizes)
    elif sizes is None:
        sizes = {"data": len(devices)}
    if unknown := set(sizes) - set(AXES):
        raise ValueError(f"unknown mesh axes {sorted(unknown)}; axes are {', '.join(AXES)}")
    wanted = math.prod(sizes.values())
    if wanted < 1 or len(devices) % wanted:
        text = ",".join(f"{axis}:{size}" for axis, size in sizes.items())
        message = f"mesh {text} needs {wanted} devices, which does not divide the {len(devices)} present; "
        message += f"nearest that do: {_nearest(wanted, len(devices))}"
        if devices[0].platform == "cpu":
            message += f" (to simulate more on a CPU, set the environment variable JAX_NUM_CPU_DEVICES={wanted})"
        raise ValueError(message)
    if jax.process_count() > 1 and wanted != len(devices):
        raise ValueError(f"with several processes a mesh must use all {len(devices)} devices, not {wanted}")
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:wanted])


def _nearest(wanted: int, present: int) -> str:
    divisors = [n for n in range(1, present + 1) if present % n == 0]
    below = [n for n in divisors if n < wanted][-1:]
    above = [n for n in divisors if n > wanted][:1]
    return " or ".join(map(str, below + above))


def batch_sharding(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Rows of a batch, array axis `axis`, spread over the mesh axis `data`."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "data"))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(
    params: Any,
    mesh: Mesh,
    *,
    fsdp: bool = False,
    is_stacked: Callable[[tuple[Any, ...]], bool] = lambda path: False,
) -> Any:
    """Lays out a pytree of parameters, or of optimizer state, which mirrors it.

    Without FSDP every device holds everything. With it (Zhao et al. 2023, arXiv:2304.11277; ZeRO-3 of Rajbhandari
    et al. 2020, arXiv:1910.02054) each array is cut along its largest axis that the size of `data` divides; the
    compiler gathers it where it is used and scatters its gradient.

    Args:
      params: arrays or ShapeDtypeStructs.
      is_stacked: says of a tree path (jax.tree_util) whether the array there has a leading layer axis. A scan takes
        one layer at a time, so that axis is never cut.

    Returns:
      A NamedSharding for each array.
    """

    def lay_out(path: tuple[Any, ...], array: Any) -> NamedSharding:
        spec = PartitionSpec()
        if fsdp:
            spec = fsdp_spec(np.shape(array), mesh.shape["data"], first_axis=1 if is_stacked(path) else 0)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(lay_out, params)


def fsdp_spec(shape: tuple[int, ...], size: int, *, first_axis: int = 0) -> PartitionSpec:
    """Cuts the largest axis from `first_axis` on that `size` divides; the whole array if none, or if it is small."""
    axes = [axis for axis in range(first_axis, len(shape)) if shape[axis] % size == 0]
    if not axes or size == 1 or math.prod(shape) < FSDP_MIN_SIZE:
        return PartitionSpec()
    largest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*(None,) * largest, "data")


# --- FSDP ----------------------------------------------------------------------------------------------------


def gather_parameters(graphdef: nnx.GraphDef, params: Any, *, dtype: DTypeLike) -> nnx.GraphDef:
    """The same model, with each cut parameter gathered in `dtype` where it is used, and its gradient scattered there.

    Left to itself, the compiler may as well move activations to the parameters' parts, which are far larger. Inside a
    scan over layers only one layer is whole at a time; in the backward pass too, provided that the model
    rematerializes (else the gathered copies of all layers are kept for it).

    Args:
      graphdef: a model's definition (nnx.split).
      params: its parameters, a nested dict of arrays laid out by `parameter_shardings`.
      dtype: what the model casts its matrices to anyway; gathering after the cast moves half as many bytes.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    model = nnx.merge(graphdef, shapes)
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param) and not variable.get_raw_value().sharding.is_fully_replicated:
            variable.set_metadata(
                on_get_value=(functools.partial(_gather, dtype=dtype, stored=variable.get_raw_value()),)
            )
    return nnx.split(model)[0]


def _gather(variable: nnx.Variable, value: jax.Array, *, dtype: DTypeLike, stored: jax.ShapeDtypeStruct) -> jax.Array:
    sharding = stored.sharding
    assert isinstance(sharding, NamedSharding)
    # A scan hands out one layer of a stacked parameter: without the leading axis, which is never cut.
    cut = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[len(stored.shape) - value.ndim :]))
    return _gather_and_scatter(value, cut, jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_and_scatter(x: jax.Array, cut: NamedSharding, dtype: jnp.dtype) -> jax.Array:
    x = jax.lax.with_sharding_constraint(x.astype(dtype), cut)
    return jax.lax.with_sharding_constraint(x, replicated(cut.mesh))


def _forward(x: jax.Array, cut: NamedSharding, dtype: jnp.dtype) -> tuple[jax.Array, None]:
    return _gather_and_scatter(x, cut, dtype), None


def _backward(cut: NamedSharding, dtype: jnp.dtype, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient.astype(jnp.float32), cut),)


_gather_and_scatter.defvjp(_forward, _backward)
