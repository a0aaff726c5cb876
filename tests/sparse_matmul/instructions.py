# SPDX-License-Identifier: Apache-2.0
"""What the inline instructions of pallas_kernels/sparse_matmul/ptx.py do, on arrays: for the interpreter, from the PTX
ISA's drawings of fragments and of metadata."""

import jax
import numpy as np

THREAD = np.arange(128)
ROW, QUAD = THREAD // 32 * 16 + THREAD % 32 // 4, THREAD % 4  # of a warpgroup; rows ROW and ROW + 8


def kept_values(words: np.ndarray, dtype) -> np.ndarray:
    """[64, 32 bytes] of the left operand of a product, words [128, 4] of its threads."""
    held = np.ascontiguousarray(words).view(np.uint8).reshape(128, 4, 4)
    out = np.zeros((64, 32), np.uint8)
    for register, (down, right) in enumerate([(0, 0), (8, 0), (0, 16), (8, 16)]):
        for byte in range(4):
            out[ROW + down, right + 4 * QUAD + byte] = held[:, register, byte]
    return out.view(dtype)


def places(words: np.ndarray, dtype) -> np.ndarray:
    """Which two of four are kept: [64, 16 groups, 2] of metadata [128] for 64 inputs of a type."""
    out = np.zeros((64, 16, 2), int)
    if dtype == np.int8:
        for nibble in range(8):
            four = words >> np.uint32(4 * nibble)
            out[ROW + 8 * (QUAD % 2), 8 * (QUAD // 2) + nibble] = np.stack([four & 3, four >> 2 & 3], -1)
        return out
    for nibble in range(4):
        for half in range(2):
            four = words >> np.uint32(16 * half + 4 * nibble)
            out[ROW + 8 * half, 4 * QUAD + nibble] = np.stack([four & 3, four >> 2 & 3], -1)
    return out


def expanded(kept: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Dense [64, 4 groups] of kept [64, 2 groups] and places [64, groups, 2]."""
    rows, groups = at.shape[:2]
    dense = np.zeros((rows, groups, 4), kept.dtype)
    np.put_along_axis(dense, at, kept.reshape(rows, groups, 2), 2)
    return dense.reshape(rows, -1)


def products(sums: np.ndarray, values: np.ndarray, meta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """sums [64, R] and the two products of a step: values [128, 8], meta [128, words], x [R, 128 bytes]."""
    total = np.array(sums)
    for i in range(2):
        at = places(meta[:, i], x.dtype) if meta.shape[1] == 2 else places(meta[:, 0], x.dtype)[:, 8 * i : 8 * i + 8]
        dense = expanded(kept_values(values[:, 4 * i : 4 * i + 4], x.dtype), at).astype(sums.dtype)
        columns = x[:, i * dense.shape[1] :][:, : dense.shape[1]].astype(sums.dtype)
        total += dense @ columns.T
    return total


def take(values: np.ndarray, metadata: np.ndarray) -> list[np.ndarray]:
    """Registers of a step: [128, 8] and [128, words] of values [32, 128 bytes] and metadata [words, 128]."""
    held = np.ascontiguousarray(values).view(np.uint32).reshape(2, 128, 4)
    return [held.swapaxes(0, 1).reshape(128, 8), np.ascontiguousarray(metadata.T)]


def dense_products(sums: np.ndarray, w: np.ndarray, x: np.ndarray) -> np.ndarray:
    return sums + w.astype(sums.dtype) @ x.T.astype(sums.dtype)


def products_of_warps(sums: np.ndarray, kept: tuple[list[np.ndarray], list[np.ndarray]], x: np.ndarray) -> np.ndarray:
    """As `products`, of what each thread holds of each product, [128, 16 bytes], and words [128]."""
    values = [np.ascontiguousarray(one).view(np.uint32) for one in kept[0]]
    return products(sums, np.concatenate(values, axis=1), np.stack(kept[1], axis=1), x)


def _stand_in(function):
    def of_equation(eqn, *values):
        results = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.outvars]
        arguments = jax.tree.unflatten(eqn.params["pytree_args"], values)

        def run(*arrays):
            return [np.asarray(out) for out in function(results, *jax.tree.map(np.asarray, arrays))]

        return jax.tree.leaves(jax.pure_callback(run, results, *arguments))

    return of_equation


STAND_INS = {
    "sparse_zeros": _stand_in(lambda results: [np.zeros(results[0].shape, results[0].dtype)]),
    "sparse_nothing": _stand_in(lambda results: [np.zeros(kind.shape, kind.dtype) for kind in results]),
    "sparse_take": _stand_in(lambda results, values, metadata, zero: take(values, metadata)),
    "sparse_multiply": _stand_in(lambda results, *arrays: [products(*arrays)]),
    "sparse_mma": _stand_in(lambda results, *arrays: [products_of_warps(*arrays)]),
    "dense_multiply": _stand_in(lambda results, *arrays: [dense_products(*arrays)]),
    "sparse_wait": _stand_in(lambda results, *kept: [np.int32(0)]),
    "sparse_ended": _stand_in(lambda results, sums: [sums]),
    "sparse_as_float32": _stand_in(lambda results, sums: [sums.astype(np.float32)]),
}
