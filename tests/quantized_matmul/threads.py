# SPDX-License-Identifier: Apache-2.0
"""The 32 threads of a warp on arrays: the instructions of quantized_matmul/lanes.py as PTX defines them, in NumPy.

A word is uint32 [..., 32], an entry a thread; a sum is float32 [..., 32].
"""

import ml_dtypes
import numpy as np

GROUP, QUAD = np.divmod(np.arange(32), 4)  # g and c of thread 4 g + c


class Threads:
    def bits(self, word, shift, mask, base):
        return ((word >> np.uint32(shift)) & np.uint32(mask)) | np.uint32(base)

    def fma(self, a, b, c):
        # Products of two bfloat16 are exact in float64, and so is the sum, but for what bfloat16 would round away.
        total = halves(a).astype(np.float64) * halves(b).astype(np.float64) + halves(c).astype(np.float64)
        return words(total.astype(ml_dtypes.bfloat16))

    def both(self, word, half):
        x = halves(word)[..., half, :]
        return words(np.stack([x, x], -2))

    def mma(self, sums, a, b):
        a, b = [halves(x).astype(np.float32) for x in a], [halves(x).astype(np.float32) for x in b]
        shape = a[0].shape[:-2]
        wide, narrow = np.zeros((*shape, 16, 16), np.float32), np.zeros((*shape, 16, 8), np.float32)
        for half in range(2):
            for i in range(4):  # outputs g and g + 8; inputs 2 c + half and 8 more
                wide[..., GROUP + 8 * (i % 2), 2 * QUAD + half + 8 * (i // 2)] = a[i][..., half, :]
            for i in range(2):
                narrow[..., 2 * QUAD + half + 8 * i, GROUP] = b[i][..., half, :]
        total = wide @ narrow
        places = [(GROUP + 8 * (i // 2), 2 * QUAD + i % 2) for i in range(4)]
        return [x + total[..., row, column] for x, (row, column) in zip(sums, places, strict=True)]


def halves(word) -> np.ndarray:
    """Two bfloat16 of each word, [..., 2, 32]; a number is a constant."""
    word = np.asarray(word, np.uint32)
    word = word if word.ndim else np.full(32, word)
    parts = np.stack([word & np.uint32(0xFFFF), word >> np.uint32(16)], -2)
    return parts.astype(np.uint16).view(ml_dtypes.bfloat16)


def words(halves: np.ndarray) -> np.ndarray:
    parts = halves.view(np.uint16).astype(np.uint32)
    return parts[..., 0, :] | parts[..., 1, :] << np.uint32(16)
