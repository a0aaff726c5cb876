# SPDX-License-Identifier: Apache-2.0
"""Loss and gradients of a global batch, wave by wave: one program for each layout, one sum over devices at the end.

Parameters are whole on every device. Each adds up the gradients of its own rows, of as many waves as there are; the sum
over devices, divided by the tokens of the whole batch, is that of any other way to cut the batch: losses are of tokens,
not of rows, devices or micro-batches.

Source: Ge et al., "ByteScale", 2025, section 2.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.core.varying import vary_like
from parallel.context import RingAttend
from parallel.hybrid.layout import Wave, arrays

AXIS = "context"  # of the mesh, all of whose devices are one axis of hybrid data parallelism
# (parameters, rows of one device, what attends for it) -> sum of weighted losses of its tokens
Loss = Callable[[Any, Mapping[str, jax.Array], RingAttend], jax.Array]


class Executor:
    """Runs plans on the devices of a mesh.

    >>> executor = Executor(loss, make_mesh("context:8"))                                        # doctest: +SKIP
    >>> loss, gradients = executor.gradients(params, waves(units, 8), documents, capacity=8192)  # doctest: +SKIP
    """

    def __init__(self, loss: Loss, mesh: Mesh):
        """Raises ValueError if devices are on another axis than `context`."""
        if mesh.shape[AXIS] != mesh.size:
            got = dict(mesh.shape)
            raise ValueError(f"Executor: all {mesh.size} devices must be on the mesh axis {AXIS}, got {got}")
        self.mesh, self._loss = mesh, loss
        self._programs: dict[tuple[int, ...], Callable] = {}

    @property
    def programs(self) -> int:
        """How many layouts have been met."""
        return len(self._programs)

    def gradients(
        self, params: Any, waves: Sequence[Wave], documents: Sequence[np.ndarray], capacity: int
    ) -> tuple[jax.Array, Any]:
        """(mean loss of a token, its gradients), of a global batch.

        Args:
          params: a pytree, the same on every device.
          waves: of parallel.hybrid.layout, for the devices of the mesh.
          documents: int32 [length] each.
          capacity: tokens of a device.

        Raises:
          ValueError: the waves are for another number of devices, or hold no token with a target.
        """
        for wave in waves:
            if sum(wave.groups) != self.mesh.size:
                raise ValueError(f"Executor: a wave of groups {list(wave.groups)} is not for {self.mesh.size} devices")
        tokens = 0.0
        total = self._nothing(params)
        rows = NamedSharding(self.mesh, P(AXIS))
        for wave in waves:
            held = arrays(wave, documents, capacity)
            tokens += float(held["weights"].sum())
            batch = {name: jax.device_put(x, rows) for name, x in held.items()}
            total = self._program(wave.groups)(params, total, batch)
        if not tokens:
            raise ValueError("Executor: the batch has no token with a target; documents need two tokens")
        return self._finish(total, jnp.float32(tokens))

    def _program(self, groups: tuple[int, ...]) -> Callable:
        """Adds the loss and the gradients of a wave to each device's own."""
        if groups not in self._programs:

            def add(params: Any, total: Any, batch: Mapping[str, jax.Array]) -> Any:
                attend = RingAttend(batch["positions"], batch["segment_ids"], AXIS, groups)
                # Each device's own: the sum over devices is taken once, of all waves.
                mine = vary_like(params, batch["tokens"])
                found = jax.value_and_grad(self._loss)(mine, batch, attend)
                return jax.tree.map(lambda a, b: a + b[None], total, found)

            self._programs[groups] = self._on_devices(add, (P(), P(AXIS), P(AXIS)), P(AXIS), donate_argnums=1)
        return self._programs[groups]

    def _nothing(self, params: Any) -> Any:
        """Zeros, [devices, ...] of each array: one on each device."""
        shapes = (jax.ShapeDtypeStruct((), jnp.float32), params)
        rows = NamedSharding(self.mesh, P(AXIS))
        make = lambda: jax.tree.map(lambda x: jnp.zeros((self.mesh.size, *x.shape), x.dtype), shapes)  # noqa: E731
        return jax.jit(make, out_shardings=rows)()

    @functools.cached_property
    def _finish(self) -> Callable:
        def mean(total: Any, tokens: jax.Array) -> Any:
            return jax.tree.map(lambda x: jax.lax.psum(x[0], AXIS) / tokens.astype(x.dtype), total)

        return self._on_devices(mean, (P(AXIS), P()), P())

    def _on_devices(self, function: Callable, in_specs: Any, out_specs: Any, **options: Any) -> Callable:
        specs: dict[str, Any] = {"in_specs": in_specs, "out_specs": out_specs, "axis_names": {AXIS}}
        return jax.jit(jax.shard_map(function, mesh=self.mesh, **specs), **options)
