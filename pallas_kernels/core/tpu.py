# SPDX-License-Identifier: Apache-2.0
"""What kernels for TPUs share: sizes to plan with, and a matrix product.

>>> padded_bytes(3, 64, "bfloat16")     # 16 rows of 128 lanes
4096
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

LANES = 128  # of a vector register
# On-chip memory that kernels plan with: all generations since v5e have at least twice that.
VMEM_BYTES = 2**25


def round_up(n: int, to: int) -> int:
    """The next multiple."""
    return n + -n % to


def sublanes(dtype) -> int:
    """Rows of a tile on the chip: 8 of 32 bits, and as many more as narrower numbers share a register's row."""
    return 32 // jnp.dtype(dtype).itemsize


def padded_bytes(rows: int, columns: int, dtype) -> int:
    """On-chip memory of an array [rows, columns], which takes whole tiles."""
    return round_up(rows, sublanes(dtype)) * round_up(columns, LANES) * jnp.dtype(dtype).itemsize


def dot(a: Any, b: Any, contract: tuple[int, int]) -> Any:
    """Inside a kernel: a product on the matrix unit over one axis of each, accumulated in float32. Operands of float32
    are not rounded to bfloat16."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
