# SPDX-License-Identifier: Apache-2.0
"""Which query may see which key, without a T x S array.

    mask = Causal() & Segments(ids, ids)          # packed documents
    mask = Causal() & Window(4095, 0)             # sliding window of 4096
    mask = Causal() | Lengths(prefix_lengths)     # prefix language model

Masks are pytrees: pass them through jit, vmap, scan and shard_map like arrays.
"""

from pallas_kernels.masks.base import Mask, Tiles
from pallas_kernels.masks.dense import Dense, as_mask
from pallas_kernels.masks.lengths import Lengths
from pallas_kernels.masks.positions import Causal, Window
from pallas_kernels.masks.segments import Segments

__all__ = ["Causal", "Dense", "Lengths", "Mask", "Segments", "Tiles", "Window", "as_mask"]
