# SPDX-License-Identifier: Apache-2.0
"""The 32 threads of a warp on arrays: the instructions of quantized_matmul/lanes.py as PTX defines them, in NumPy.

A word is uint32 [..., 32], an entry a thread; a sum is float32 [..., 32].
"""

import functools
import inspect

import jax
import ml_dtypes
import numpy as np

from pallas_kernels.quantized_matmul import lanes, packing

GROUP, QUAD = np.divmod(np.arange(32), 4)  # g and c of thread 4 g + c


class Threads:
    def bits(self, word, shift, mask, base):
        return ((word >> np.uint32(shift)) & np.uint32(mask)) | np.uint32(base)

    def fma(self, a, b, c):
        # Products of two bfloat16 are exact in float64, and so is the sum, but for what bfloat16 would round away.
        total = exact(a) * exact(b) + exact(c)
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


def exact(word) -> np.ndarray:
    """These in float64, by their bits: below the smallest normal number processors may be set to take 0."""
    bits = halves(word).view(np.uint16).astype(np.int64)
    exponent, mantissa = bits >> 7 & 0xFF, bits & 0x7F
    size = np.ldexp((mantissa + np.where(exponent > 0, 128, 0)).astype(np.float64), np.maximum(exponent, 1) - 134)
    return np.where(bits >> 15, -size, size)


def words(halves: np.ndarray) -> np.ndarray:
    parts = halves.view(np.uint16).astype(np.uint32)
    return parts[..., 0, :] | parts[..., 1, :] << np.uint32(16)


def scales(stats, steps):
    """`ptx.scales` by the threads of four warps."""
    pairs = np.empty((2, 64, 16), np.uint32)
    for warp in range(4):
        pair = _uint32(steps[warp].reshape(4, 2, 2))  # [c, pair]
        computed = lanes.scales(Threads(), [w[0] for w in _words(stats, warp, 1)], [pair[QUAD, p] for p in range(2)])
        for p, output, i in np.ndindex(2, 2, 4):
            pairs[p, 16 * warp + GROUP + 8 * output, 4 * QUAD + i] = computed[p][output][i]
    return list(pairs)


def strips(sums, words, scales, x, *, stretches):
    """`ptx.strips` by the threads of four warps."""
    of_threads = [[[_sums(s, warp, m) for m in range(0, s.shape[1], 8)] for s in sums] for warp in range(4)]
    for warp, parts in enumerate(of_threads):
        own = _words(words, warp, 4), [_words(one, warp, 4) for one in scales]
        of_threads[warp] = lanes.strips(Threads(), parts, *own, _rows(x), stretches)
    return [_array(s, [parts[i] for parts in of_threads]) for i, s in enumerate(sums)]


def integers(total, words, x, scale=None, *, bits):
    """`ptx.integers` by the threads of four warps."""
    of_threads = []
    for warp in range(4):
        sums = [_sums(total, warp, m) for m in range(0, total.shape[1], 8)]
        start = sums if scale is None else [[np.zeros_like(y) for y in tile] for tile in sums]
        parts = lanes.integers(Threads(), start, _words(words, warp, 4), _rows(x), bits)
        if scale is not None:
            factors = [f[0] for f in _words(scale, warp, 1) for _ in range(2)]
            parts = [
                [y + z * f for y, z, f in zip(*both, factors, strict=True)] for both in zip(sums, parts, strict=True)
            ]
        of_threads.append(parts)
    return _array(total, of_threads)


def strip(words, scales, *, j):
    """`ptx.strip` by the threads of four warps."""
    own = [(_words(words, warp, 4), [_words(one, warp, 4) for one in scales]) for warp in range(4)]
    return _operand([lanes.strip(Threads(), *of_warp, j) for of_warp in own])


def stretch(words, scales=None, *, j, bits):
    """`ptx.stretch` by the threads of four warps."""
    of_warps = []
    for warp in range(4):
        own = None if scales is None else [w[0] for w in _words(scales, warp, 1)]
        of_warps.append(lanes.stretch(Threads(), _words(words, warp, 4), own, j, bits))
    return _operand(of_warps)


def _operand(of_warps) -> np.ndarray:
    """[64, 64] of [warp][output g or g + 8][8 words], as wgmma reads registers."""
    out = np.empty((64, 64), ml_dtypes.bfloat16)
    for warp, weights in enumerate(of_warps):
        for output, p, half in np.ndindex(2, 8, 2):
            out[16 * warp + GROUP + 8 * output, 8 * p + 2 * QUAD + half] = halves(weights[output][p])[half]
    return out


def take_digits(words, stats, steps):
    """`ring.take_digits`, of references' contents."""
    return words.reshape(64, 16), stats.reshape(64, 4), steps


def take_codes(words, scale=None):
    """`ring.take_codes`, of references' contents."""
    taken = [words.reshape(64, 16)]
    return taken if scale is None else [*taken, np.repeat(_uint32(np.stack([scale, scale], -1))[:, None], 4, axis=1)]


def take(ring, arrays, output, chunk):
    """Words and scales of `Ring.take_words` and `Ring.take_scales`, from where the ring copies them."""
    blocks = np.minimum(output // 16 + np.arange(4), len(arrays[0]) - 1)
    rows = (16 * blocks[:, None] + np.arange(16)).ravel()
    if ring.per_group:
        words, *scales = arrays
        columns = [
            np.repeat(scale[chunk // ring.per_group, rows].astype(np.float32)[:, None], 4, axis=1) for scale in scales
        ]
        return packing.unblocked(words, 16)[rows, 16 * chunk : 16 * (chunk + 1)], *columns
    planes, number = (arrays[3:6], chunk - ring.mains) if chunk >= ring.mains else (arrays[:3], chunk)
    planes = packing.unblocked(planes[0], 16), packing.unblocked(planes[1], 4), planes[2]
    of_chunk = [slice(size * number, size * (number + 1)) for size in (16, 4, 16)]
    return [plane[of_rows, here] for plane, of_rows, here in zip(planes, (rows, rows, blocks), of_chunk, strict=True)]


def take_rows(ring, x, chunk, index=None, *, rows, stretches):
    """`Ring.take_rows`, from where the ring copies them."""
    strips = _strips_of(chunk, index, inputs=ring.inputs, mains=ring.mains)
    strips = strips.reshape(-1, 4)[list(stretches)].ravel()
    inputs = (16 * strips[:, None] + np.arange(16)).ravel()
    read = x[np.minimum(np.arange(rows), len(x) - 1)][:, np.minimum(inputs, x.shape[1] - 1)]
    return np.where(inputs < x.shape[1], read, 0).astype(x.dtype)


def _strips_of(chunk, index, *, inputs, mains) -> np.ndarray:
    """Which strips of x a chunk multiplies with."""
    if index is not None and chunk >= mains:
        return index[16 * (chunk - mains) + np.arange(16)]
    return inputs // 16 * chunk + np.arange(inputs // 16)


def take_rows_in_order(x, chunk, index=None, *, rows, inputs, mains):
    """`ring.take_rows_in_order`: pairs of a strip come where wgmma reads those of a thread."""
    strips = _strips_of(chunk, index, inputs=inputs, mains=mains)
    places = (16 * strips[:, None] + np.arange(16)).reshape(-1, 4, 8, 2).swapaxes(1, 2).ravel()
    read = np.where(places < x.shape[1], x[:, np.minimum(places, x.shape[1] - 1)], 0)
    return np.pad(read, ((0, rows - len(x)), (0, 0))).astype(x.dtype)


def _words(words, warp: int, count: int) -> list[list[np.ndarray]]:
    """[output g or g + 8][count adjacent words of thread c]."""
    return [[words[16 * warp + GROUP + 8 * output, count * QUAD + i] for i in range(count)] for output in range(2)]


def _rows(x) -> list[list[list[np.ndarray]]]:
    """[tile][stretch][pair of inputs] of rows [8 m, 64 j]: thread 4 g + c has row g and 16 inputs of each stretch."""
    pairs = _uint32(x.reshape(len(x) // 8, 8, -1, 4, 8, 2))  # [tile, g, stretch, c, pair]
    return [[[p[GROUP, j, QUAD, f] for f in range(8)] for j in range(p.shape[1])] for p in pairs]


def _uint32(x) -> np.ndarray:
    """Words of pairs of bfloat16 [..., 2]."""
    return np.ascontiguousarray(x).view(np.uint32)[..., 0]


def _places(warp: int, m: int):
    """Output and row of x that a thread's four sums are for."""
    return [(16 * warp + GROUP + 8 * (i // 2), m + 2 * QUAD + i % 2) for i in range(4)]


def _sums(total, warp: int, m: int) -> list[np.ndarray]:
    return [total[place] for place in _places(warp, m)]


def _array(like, of_threads) -> np.ndarray:
    out = np.empty_like(like)
    for warp, parts in enumerate(of_threads):
        for tile, sums in enumerate(parts):
            for place, part in zip(_places(warp, 8 * tile), sums, strict=True):
                out[place] = part
    return out


def _stand_in(function):
    def of_equation(eqn, *values):
        results = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.outvars]
        arguments = jax.tree.unflatten(eqn.params["pytree_args"], values)
        constants = inspect.getclosurevars(eqn.params["mgpu_fn"]).nonlocals
        run = functools.partial(function, constants)
        return jax.tree.leaves(jax.pure_callback(lambda *a: run(*jax.tree.map(np.asarray, a)), results, *arguments))

    return of_equation


# For `interpreters.mosaic_gpu`: of constants that an inline function closes over, and arrays.
STAND_INS = {
    "quantized_scales": _stand_in(lambda its, *arrays: scales(*arrays)),
    "quantized_strips": _stand_in(lambda its, *arrays: strips(*arrays, stretches=its["stretches"])),
    "quantized_integers": _stand_in(lambda its, *arrays: [integers(*arrays, bits=its["bits"])]),
    "quantized_strip": _stand_in(lambda its, *arrays: [strip(*arrays, j=its["j"])]),
    "quantized_stretch": _stand_in(lambda its, *arrays: [stretch(*arrays, j=its["j"], bits=its["bits"])]),
    "quantized_take_digits": _stand_in(lambda its, *arrays: take_digits(*arrays)),
    "quantized_take_codes": _stand_in(lambda its, *arrays: take_codes(*arrays)),
    "quantized_take_rows_in_order": _stand_in(
        lambda its, *arrays: [take_rows_in_order(*arrays, rows=its["rows"], inputs=its["inputs"], mains=its["mains"])]
    ),
    "quantized_take_words": _stand_in(lambda its, slots, slot, *arrays: take(its["ring"], *arrays)[:1]),
    "quantized_take_scales": _stand_in(lambda its, slots, slot, *arrays: take(its["ring"], *arrays)[1:]),
    "quantized_take_rows": _stand_in(
        lambda its, slots, slot, *arrays: [
            take_rows(its["ring"], *arrays, rows=its["rows"], stretches=its["stretches"])
        ]
    ),
    **dict.fromkeys(("quantized_start", "quantized_start_scales", "quantized_wait"), lambda equation, *values: []),
}
