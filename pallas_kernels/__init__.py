# SPDX-License-Identifier: Apache-2.0
"""Fast kernels for JAX on the hardware people own. See README.md."""

from pallas_kernels import masks
from pallas_kernels.core.check import UnsupportedError
from pallas_kernels.core.dispatch import explain
from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.decode_attention.softmax import DecodeStats, UnifiedMax
from pallas_kernels.flash_attention.api import flash_attention
from pallas_kernels.flat_gemm.api import flat_gemm

__all__ = [
    "DecodeStats",
    "UnifiedMax",
    "UnsupportedError",
    "decode_attention",
    "explain",
    "flash_attention",
    "flat_gemm",
    "masks",
]
__version__ = "0.1.0"
