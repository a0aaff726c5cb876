# SPDX-License-Identifier: Apache-2.0
"""Where the tiles of a kernel come from. `xla` and `reference` have none.

An implementation with tiles adds its frozen, self-validating class to CONFIGS, and a case to `heuristic` and
`search_space`.
"""

from collections.abc import Iterator
from typing import Any

from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call

CONFIGS: dict[str, type] = {}


def kinds(implementation: str) -> tuple[type, ...]:
    """The configurations that an implementation takes."""
    return (CONFIGS[implementation],) if implementation in CONFIGS else ()


def heuristic(call: Call, device: Device, implementation: str) -> Any:
    """A good configuration without measuring anything."""
    raise ValueError(f"quantized_matmul has no configuration for {implementation!r}.")


def search_space(call: Call, device: Device, implementation: str) -> Iterator[Any]:
    """Configurations worth measuring."""
    raise ValueError(f"quantized_matmul has no configuration for {implementation!r}.")
