# SPDX-License-Identifier: Apache-2.0
"""Weights as the kernel for Hopper takes them, 64 outputs and 128 bytes of a row of x at a time: a step of a block.

    Sparse    values [B, S, 32, 128 bytes], metadata [B, words, 128]     to shared memory, from there to registers
    Dense     [64 B, 128 S bytes], integers                              to shared memory, where products read them

B blocks, S steps. Each says what memory its steps take, how they come there, and starts their products (ptx.py).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sparse_matmul import ptx
from pallas_kernels.sparse_matmul.config import TILE
from pallas_kernels.sparse_matmul.weights import Sparse24Weight

Ref = Any


class Sparse:
    """Two of four: products read what is kept from registers."""

    copies = 2  # of a step

    def __init__(self, weight: Sparse24Weight):
        values = weight.values
        self.dtype = values.dtype
        self.blocks, self.steps = len(values), values.shape[1] // ptx.PRODUCTS
        self._words = ptx.meta_words(self.dtype)
        self.arrays = values.reshape(self.blocks, self.steps, -1, ptx.elements(self.dtype)), weight.metadata

    def memory(self, stages: int, blocks: int) -> tuple[Any, Any]:
        """Shared memory for so many steps of so many blocks."""
        values = plgpu.SMEM((stages, blocks, *self.arrays[0].shape[2:]), self.dtype)
        return values, plgpu.SMEM((stages, blocks, self._words, 128), jnp.uint32)

    def copy(
        self, arrays: tuple[Ref, Ref], slots: tuple[Ref, Ref], first: Any, blocks: int, step: Any, full: Ref
    ) -> None:
        """A step of blocks from `first` on; what is not there becomes zeros."""
        own = pl.ds(first, blocks)
        plgpu.copy_gmem_to_smem(arrays[0].at[own, step], slots[0], full)
        plgpu.copy_gmem_to_smem(arrays[1].at[own, pl.ds(step * self._words, self._words)], slots[1], full)

    def start(self, sums: jax.Array, slots: tuple[Ref, Ref], block: Any, x: Ref, zero: Any) -> tuple[jax.Array, Any]:
        """Sums of a block with a step's products, which go on, and what they read until `wait`."""
        kept = ptx.take(slots[0].at[block], slots[1].at[block], zero)
        return ptx.multiply(sums, kept, x), kept

    def nothing(self) -> Any:
        """In place of what products before the first read."""
        return ptx.nothing(self.dtype)

    def wait(self, read: list[Any], started: int) -> Any:
        """Until all products are done but the last `started`; the zero of the next `start`."""
        return ptx.wait([metadata for _, metadata in read], started)


class Dense:
    """Integers, [K, N] from outside."""

    copies = 1

    def __init__(self, w: jax.Array):
        inputs = ptx.elements(w.dtype)
        self.dtype = w.dtype
        # Products of integers want both operands along K.
        turned = jnp.pad(w.T, ((0, -w.shape[1] % TILE), (0, -w.shape[0] % inputs)))
        self.blocks, self.steps = turned.shape[0] // TILE, turned.shape[1] // inputs
        self.arrays = (turned,)

    def memory(self, stages: int, blocks: int) -> tuple[Any]:
        return (ptx.slots(stages, blocks * TILE, self.dtype),)

    def copy(self, arrays: tuple[Ref], slots: tuple[Ref], first: Any, blocks: int, step: Any, full: Ref) -> None:
        inputs = ptx.elements(self.dtype)
        here = arrays[0].at[pl.ds(first * TILE, blocks * TILE), pl.ds(step * inputs, inputs)]
        plgpu.copy_gmem_to_smem(here, slots[0], full)

    def start(self, sums: jax.Array, slots: tuple[Ref], block: Any, x: Ref, zero: Any) -> tuple[jax.Array, Any]:
        return ptx.multiply_dense(sums, slots[0].at[pl.ds(block * TILE, TILE)], x), ()

    def nothing(self) -> Any:
        return ()

    def wait(self, read: list[Any], started: int) -> Any:
        return ptx.wait([], started)
