# SPDX-License-Identifier: Apache-2.0
"""Fast kernels for JAX on the hardware people own. See README.md."""

from pallas_kernels import masks
from pallas_kernels.core.check import UnsupportedError
from pallas_kernels.core.dispatch import explain
from pallas_kernels.core.softmax import SoftmaxStats, UnifiedMax
from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.flash_attention.api import flash_attention
from pallas_kernels.flat_gemm.api import flat_gemm
from pallas_kernels.log_bessel.api import bessel_ratio_i, bessel_ratio_k, log_iv, log_kv
from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.quantize import quantize
from pallas_kernels.quantized_matmul.weights import IntWeight, MixedBitWeight
from pallas_kernels.sparse_matmul.api import sparse_matmul
from pallas_kernels.sparse_matmul.prune import prune_2_4, prune_4_8_pairs
from pallas_kernels.sparse_matmul.weights import Sparse24Weight

__all__ = [
    "DecodeStats",
    "IntWeight",
    "MixedBitWeight",
    "SoftmaxStats",
    "Sparse24Weight",
    "UnifiedMax",
    "UnsupportedError",
    "bessel_ratio_i",
    "bessel_ratio_k",
    "decode_attention",
    "explain",
    "flash_attention",
    "flat_gemm",
    "log_iv",
    "log_kv",
    "masks",
    "prune_2_4",
    "prune_4_8_pairs",
    "quantize",
    "quantized_matmul",
    "sparse_matmul",
]
__version__ = "0.1.0"

DecodeStats = SoftmaxStats  # the name it had while only decode_attention returned it
