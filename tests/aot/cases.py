# SPDX-License-Identifier: Apache-2.0
"""The kernels that are compiled for hardware that is not here. To add one, write its builder and its `Case`.

A builder gets a `targets.Compiling` and returns the jitted function and its abstract arguments. It imports the kernel
itself, because only the subprocess that compiles pays for it, and because an import may fail without its compiler.
"""

import dataclasses
from collections.abc import Callable, Mapping

from tests.aot.targets import AMPERE, HOPPER, TPUS, Compiling


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel at one shape, for some targets.

    Attributes:
      name: unique; says the op, the implementation, and what is special about the shape.
      targets: names in `targets.TARGETS`.
      build: compiling -> (jitted function, arguments).
      hot: whether a register spill in it is a failure.
      skip: target -> the reason why it is known not to compile there; counted, not hidden.
      timeout: seconds before the compiler counts as hung.
    """

    name: str
    targets: tuple[str, ...]
    build: Callable[[Compiling], tuple[Callable, tuple]]
    hot: bool = False
    skip: Mapping[str, str] = dataclasses.field(default_factory=dict)
    timeout: int = 300


def _smoke_hopper(compiling: Compiling):
    import jax
    import jax.numpy as jnp

    from tests.aot.smoke import mosaic_gpu_sm90

    x = compiling.array((512, 512), jnp.bfloat16)
    return jax.jit(mosaic_gpu_sm90.matmul), (x, x)


def _smoke_ampere(compiling: Compiling):
    import jax
    import jax.numpy as jnp

    from tests.aot.smoke import mosaic_gpu_sm80

    x = compiling.array((512, 512), jnp.bfloat16)
    return jax.jit(mosaic_gpu_sm80.matmul), (x, x)


def _smoke_tpu(compiling: Compiling):
    import jax
    import jax.numpy as jnp

    from tests.aot.smoke import mosaic_tpu

    x = compiling.array((512, 512), jnp.bfloat16)
    return jax.jit(mosaic_tpu.matmul), (x, x)


CASES: tuple[Case, ...] = (
    Case("smoke/mosaic_gpu_sm90", HOPPER, _smoke_hopper, hot=True),
    Case("smoke/mosaic_gpu_sm80", AMPERE, _smoke_ampere, hot=True),
    Case("smoke/mosaic_tpu", TPUS, _smoke_tpu),
)


def find(name: str) -> Case:
    """The case of that name."""
    return {case.name: case for case in CASES}[name]
