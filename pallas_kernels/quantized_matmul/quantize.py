# SPDX-License-Identifier: Apache-2.0
"""Makes the weights of `quantized_matmul`: once, before a model runs, on any device.

    checks -> which strips get 4 bits -> outliers aside -> a grid for each group (fit.py) -> rounding -> words

Rounding has two ways with one signature, (w [groups, inputs, N'], special, fit) -> (codes, what is stored of grids):
`fit.plainly`, each weight by itself, and with a Hessian `gptq.compensated`, one input after another.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul import fit as fit_lib
from pallas_kernels.quantized_matmul import gptq, packing
from pallas_kernels.quantized_matmul.packing import CHUNK, ROWS, round_up
from pallas_kernels.quantized_matmul.shapes import GROUP_SIZES, Scheme
from pallas_kernels.quantized_matmul.weights import STRIP, IntWeight, MixedBitWeight, Outliers, Plane, Weight

OP = "quantize"
LARGEST_WEIGHT = 2.0**60  # its square, summed, is still a float32
FOUR_BIT_FRACTION = 1 / 8
Ranking = Literal["range", "error", "hessian", "random"]
RANKINGS = ("range", "error", "hessian", "random")
# A field of the packed statistics has 3, 3 or 4 bits (see `quantize`).
PACKED_CODES = (7, 7, 15)


def quantize(
    w: jax.Array | np.ndarray,
    scheme: Scheme = "mixed_2_4",
    *,
    group_size: int | None = None,
    four_bit_fraction: float = FOUR_BIT_FRACTION,
    strips: Ranking | np.ndarray | jax.Array = "range",
    hessian: jax.Array | np.ndarray | None = None,
    clip_scales: bool | Literal["clamp"] = False,
    outlier_fraction: float = 0.0,
    activation_bits: int | None = None,
    seed: int = 0,
) -> Weight:
    """A weight of a few bits that stands for w, for `quantized_matmul`.

    Letters: K inputs, N outputs. A strip is 16 consecutive inputs, S = ceil(K / 16) of them.

        scheme        bits a weight, scales included          scale for
        "mixed_2_4"   2.5625 (1 + four_bit_fraction)          16 inputs of an output, itself 4 bits (section 2.2)
        "int2"        2.375                                   a group of inputs of an output, default 64
        "int4"        4.125                                   ... default 128
        "int8"        8 + 32 / K                              an output

    >>> import jax, jax.numpy as jnp
    >>> w = jax.random.normal(jax.random.key(0), (512, 256))
    >>> [f"{jnp.mean((quantize(w, scheme).dequantize() - w) ** 2):.1e}" for scheme in ("int2", "mixed_2_4", "int4")]
    ['1.3e-01', '8.1e-02', '1.0e-02']

    Args:
      w: [K, N], of floating point, finite.
      scheme: as above.
      group_size: of an integer scheme: inputs that share a scale, a multiple of 16; the last group may be smaller.
      four_bit_fraction: of strips that get 4 bits, 0 to 1; rounded to whole strips.
      strips: which strips get 4 bits, those with the largest
        "range": mean over outputs of max w - min w;
        "error": squared error of 2 bits less that of 4;
        "hessian": sum of w[k, n]^2 / [H^-1][k, k], what the output loses (needs `hessian`);
        "random": drawn with `seed`, for comparison; or
        a boolean array [S] that says it of each strip; four_bit_fraction then has no say.
      hessian: [K, K], the sum of x^T x over inputs that are typical. Weights are then rounded one input after another,
        and those that are still to be rounded make up for the error of the others (gptq.py).
      clip_scales: as if statistics were packed as in section 2.5: of three neighboring 2-bit strips two have scale
        codes of only 3 bits, and the three share a word of 16. "clamp" cuts codes off at 7 instead of making the step
        larger. They are stored as always; `packed_bits_per_weight` counts what the packed form would need.
      outlier_fraction: of all weights, the largest ones in 2-bit strips, to be kept in bfloat16 with their places
        (32 bits each).
      activation_bits: 8, of "int8": multiply in integers, with rows of x rounded too.
      seed: of "random" strips.

    Returns:
      A MixedBitWeight or an IntWeight, [K, N].

    Raises:
      ValueError: a shape, fraction, group size or scheme out of range; weights that are not finite (how many, and where
        the first is); options that another scheme has.
      TypeError: w is not of floating point.

    Source: Li et al., "Fast and Efficient 2-bit LLM Inference on GPU", 2023, section 2. Zeros of scales are left out,
    4-bit strips have scales of two orders too, and scales are searched for: docs/adr/0007, README.md in this folder.
    """
    if scheme not in ("mixed_2_4", *GROUP_SIZES):
        known = ", ".join(f'"{name}"' for name in ("mixed_2_4", *GROUP_SIZES))
        raise ValueError(f"{OP}: scheme must be one of {known}, got {scheme!r}.")
    array = _checked(w)
    rounding = _rounding(hessian, array.shape[0])
    if scheme == "mixed_2_4":
        if group_size is not None or activation_bits is not None:
            raise ValueError(
                f'{OP}: group_size and activation_bits are for integer schemes; "mixed_2_4" has groups of 16.'
            )
        if array.shape[0] < STRIP:
            raise ValueError(f'{OP}: "mixed_2_4" needs K >= {STRIP}, a strip; w has shape {array.shape}.')
        four = choose_strips(array, strips, four_bit_fraction, hessian=hessian, seed=seed)
        return _mixed(array, four, clip_scales, _fraction("outlier_fraction", outlier_fraction), rounding)
    given = {
        "strips": isinstance(strips, str) and strips == "range",
        "clip_scales": clip_scales is False,
        "four_bit_fraction": four_bit_fraction == FOUR_BIT_FRACTION,
        "outlier_fraction": outlier_fraction == 0,
    }
    if foreign := [name for name, default in given.items() if not default]:
        raise ValueError(f'{OP}: {", ".join(foreign)} cannot be given for scheme "{scheme}", only for "mixed_2_4".')
    return _integers(array, scheme, group_size, activation_bits, rounding)


def choose_strips(
    w: jax.Array,
    strips: Ranking | np.ndarray | jax.Array,
    four_bit_fraction: float = FOUR_BIT_FRACTION,
    *,
    hessian: jax.Array | np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """bool [S], true for the strips of w [K, N] that get 4 bits; arguments are those of `quantize`."""
    S = -(-w.shape[0] // STRIP)
    if not isinstance(strips, str):
        chosen = np.asarray(strips)
        if chosen.shape != (S,) or chosen.dtype != bool:
            raise ValueError(f"{OP}: strips must be bool [S={S}] or a name, got {chosen.dtype} {chosen.shape}.")
        return chosen
    if strips not in RANKINGS:
        known = ", ".join(f'"{name}"' for name in RANKINGS)
        raise ValueError(f"{OP}: strips must be one of {known} or a boolean array, got {strips!r}.")
    if strips == "hessian" and hessian is None:
        raise ValueError(f'{OP}: strips="hessian" needs hessian=, the sum of x^T x over typical inputs.')
    count = round(_fraction("four_bit_fraction", four_bit_fraction) * S)
    if strips == "random":
        scores = np.random.default_rng(seed).random(S)
    elif strips == "hessian":
        scores = _sensitivity(w, _checked_hessian(hessian, w.shape[0]))
    else:
        scores = np.asarray(_RANKED[strips](_in_strips(w)))
    chosen = np.zeros(S, bool)
    chosen[np.argsort(-scores, kind="stable")[:count]] = True
    return chosen


@jax.jit
def _ranges(w: jax.Array) -> jax.Array:
    return jnp.mean(jnp.max(w, 1) - jnp.min(w, 1), 1)


@jax.jit
def _gains(w: jax.Array) -> jax.Array:
    """[S], the squared error that 4 bits save."""

    def error(group: jax.Array, most: float) -> jax.Array:
        grid, _ = fit_lib.FitStrip()(group, (jnp.float32(most), jnp.float32(15), jnp.float32(15)))
        return jnp.sum(grid.error(group))

    return jax.lax.map(lambda group: error(group, 3) - error(group, 15), w)


_RANKED: dict[str, Callable[[jax.Array], jax.Array]] = {"range": _ranges, "error": _gains}


def _sensitivity(w: jax.Array, hessian: np.ndarray) -> np.ndarray:
    """[S], the sum of w^2 / [H^-1]_kk: the least that the output's squared error grows by if w is set to 0."""
    # The diagonal of H^-1 = U^T U; H is scaled, which ranks nothing anew.
    inverse = np.sum(np.square(gptq.factor(hessian)), 0)
    of_inputs = np.sum(np.square(np.asarray(w, np.float64)), 1) / inverse
    return np.add.reduceat(of_inputs, np.arange(0, len(hessian), STRIP))


def _in_strips(w: jax.Array) -> jax.Array:
    """[S, 16, N'] of w [K, N], padded by 0, which has a place on every grid."""
    K, N = w.shape
    w = jnp.pad(w, ((0, -K % STRIP), (0, -N % ROWS)))
    return w.reshape(-1, STRIP, w.shape[1])


def _mixed(
    w: jax.Array, four: np.ndarray, clip_scales: bool | str, outlier_fraction: float, rounding: Callable
) -> MixedBitWeight:
    outliers = None
    if count := round(outlier_fraction * w.size):
        w, outliers = _without_outliers(np.array(w), four, count)
    # Largest q, largest scale code, and the code that the step is made for.
    limits = np.full(len(four), 15.0)
    if clip_scales not in (False, True, "clamp"):
        raise ValueError(f'{OP}: clip_scales must be True, False or "clamp", got {clip_scales!r}.')
    if clip_scales:
        limits[~four] = np.resize(PACKED_CODES, np.sum(~four))
    full = np.full_like(limits, 15) if clip_scales == "clamp" else limits
    special = tuple(jnp.asarray(x, jnp.float32) for x in (np.where(four, 15, 3), limits, full))
    codes, stored = rounding(_in_strips(w), special, fit_lib.FitStrip())
    N, index = w.shape[1], np.flatnonzero(four)
    tail_index = np.zeros(round_up(len(index), CHUNK), np.int32)
    tail_index[: len(index)] = index
    main = _plane(codes, stored, jnp.asarray(four), jnp.ones(len(four), bool), N, high=True)
    low = jax.tree.map(lambda x: x[tail_index], (codes, stored))
    real = jnp.arange(len(tail_index)) < len(index)
    tail = _plane(*low, jnp.ones(len(tail_index), bool), real, N, high=False)
    return MixedBitWeight(main, tail, jnp.asarray(tail_index), (w.shape[0], N), outliers)


@functools.partial(jax.jit, static_argnames=("N", "high"))
def _plane(codes: jax.Array, stored: fit_lib.TwoOrders, four: jax.Array, real: jax.Array, N: int, high: bool) -> Plane:
    """A plane of strips with codes [S, 16, N'], those that are `real`. Of those with 4 bits it gets the high or the low
    digits:

    q - z = 4 (q // 4 - z // 4) + (q % 4 - z % 4), and the 4 goes into the step.
    """
    take = (lambda x: x // 4) if high else (lambda x: x % 4)
    digits = jnp.where(four[:, None, None], take(codes), codes)
    zeros = jnp.where(four[:, None], take(stored.zeros), stored.zeros)
    steps = jnp.where(four[:, None] & high, 4 * stored.steps, stored.steps)
    # Padding has 0.
    scale_codes = jnp.where(real[:, None] & (jnp.arange(codes.shape[2]) < N), stored.scale_codes, 0)
    words = packing.to_words(jnp.moveaxis(digits, 1, 2), 2)
    words, scale_codes, zeros, steps = (
        jnp.pad(x, ((0, -len(x) % CHUNK), (0, 0))).T for x in (words, scale_codes, zeros, steps)
    )
    words = packing.blocked(packing.to_memory(words), CHUNK)
    return Plane(words, packing.pack_stats(scale_codes, zeros), packing.to_memory(steps))


def _without_outliers(w: np.ndarray, four: np.ndarray, count: int) -> tuple[jax.Array, Outliers]:
    """w [K, N] with 0 for its `count` largest entries in 2-bit strips, and these. 0 stays 0 on every grid."""
    K, N = w.shape
    sizes = np.abs(w.T)  # rows are outputs
    sizes[:, np.repeat(four, STRIP)[:K]] = -1
    count = min(count, int(np.sum(sizes >= 0)))
    places = np.sort(np.argpartition(sizes, sizes.size - count, axis=None)[sizes.size - count :])
    rows, columns = np.divmod(places, K)
    values = w[columns, rows]
    w[columns, rows] = 0
    pointers = np.searchsorted(rows, np.arange(N + 1)).astype(np.int32)
    column_dtype = np.uint16 if K <= 2**16 else np.int32
    outliers = Outliers(
        jnp.asarray(values, jnp.bfloat16), jnp.asarray(columns.astype(column_dtype)), jnp.asarray(pointers)
    )
    return jnp.asarray(w), outliers


def _integers(
    w: jax.Array, scheme: str, group_size: int | None, activation_bits: int | None, rounding: Callable
) -> IntWeight:
    K, N = w.shape
    if group_size is None:
        group_size = GROUP_SIZES[scheme]
    elif not isinstance(group_size, int) or group_size < 1 or group_size % STRIP:
        raise ValueError(f"{OP}: group_size must be a positive multiple of {STRIP}, or None, got {group_size!r}.")
    if activation_bits not in (None, 8):
        raise ValueError(f"{OP}: activation_bits must be 8 or None, got {activation_bits!r}.")
    if activation_bits and (scheme != "int8" or group_size is not None):
        raise ValueError(
            f'{OP}: activation_bits=8 multiplies int8 by int8: scheme "int8" without group_size, '
            f'got scheme "{scheme}", group_size={group_size}.'
        )
    bits, inputs = int(scheme[3:]), group_size or K
    w = jnp.pad(w, ((0, -K % inputs), (0, -N % ROWS)))
    groups = w.reshape(-1, inputs, w.shape[1])
    fit = fit_lib.FitGroup(bits, "float32" if group_size is None else "bfloat16")
    codes, (scale, zero) = rounding(groups, jnp.zeros(len(groups)), fit)
    scale = jnp.where(jnp.arange(w.shape[1]) < N, scale, 0)
    # Inputs that fill up the last chunk of words are 0, as those that fill up the last group are.
    fill = jnp.broadcast_to(zero[-1][:, None], (w.shape[1], -len(w) % (CHUNK * 32 // bits)))
    words = packing.pack(jnp.concatenate([codes.reshape(w.shape).T, fill], axis=1), bits)
    words = words[:, : ROWS * round_up(-(-K * bits // 32), CHUNK)]
    return IntWeight(words, scale, zero if bits == 2 else None, (K, N), bits, group_size, activation_bits)


def packed_bits_per_weight(weight: MixedBitWeight) -> float:
    """What a weight made with `clip_scales` would need if its statistics were packed as in section 2.5: a word of 16
    bits for three 2-bit strips of an output, and a scale code and a zero of 4 bits each for a 4-bit strip, which the
    stored form has twice. Steps, outliers and the index count as they are, without padding.

    Raises:
      ValueError: scale codes that do not fit, the number of them.
    """
    K, N = weight.shape
    four = np.asarray(weight.four_bit_strips())
    scale_codes = np.asarray(packing.unpack_stats(weight.main.stats)[0])[:N, : weight.strips][:, ~four]
    limits = np.resize(PACKED_CODES, scale_codes.shape[1])
    if too_large := int(np.sum(scale_codes > limits)):
        raise ValueError(
            f"{too_large} scale codes do not fit in 3 bits; quantize(..., clip_scales=True) makes them fit."
        )
    fours, S = int(np.sum(four)), weight.strips
    bits_of_strips = N * (32 * (S + fours) + 16 * -(-(S - fours) // 3) + 8 * fours)
    bits_of_steps = -(-N // ROWS) * 16 * S
    others = [weight.outliers, jnp.zeros(fours, jnp.int32)]
    return (bits_of_strips + bits_of_steps + 8 * sum(x.nbytes for x in jax.tree.leaves(others))) / (K * N)


def _checked(w: Any) -> jax.Array:
    """float32 [K, N]."""
    if not jnp.issubdtype(getattr(w, "dtype", type(w)), jnp.floating):
        raise TypeError(f"{OP}: w must be an array of floating point, got {getattr(w, 'dtype', type(w).__name__)}.")
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"{OP}: w must have shape [K, N], both above 0, got {tuple(w.shape)}.")
    array = jnp.asarray(w, jnp.float32)
    if bad := int(_count_bad(array)):
        k, n = np.argwhere(~(np.abs(array) <= LARGEST_WEIGHT))[0]
        raise ValueError(
            f"{OP}: {bad} of {array.size} weights are not finite or above 2^60 in size, the first at "
            f"[k={k}, n={n}]: {array[k, n]}."
        )
    return array


@jax.jit
def _count_bad(w: jax.Array) -> jax.Array:
    return jnp.sum(~(jnp.abs(w) <= LARGEST_WEIGHT))  # NaN compares false


def _checked_hessian(hessian: Any, K: int) -> np.ndarray:
    matrix = np.asarray(hessian, np.float64)
    if matrix.shape != (K, K):
        raise ValueError(f"{OP}: hessian must have shape [K, K] with K={K}, got {matrix.shape}.")
    if not np.isfinite(matrix).all() or not (np.diag(matrix) >= 0).all():
        raise ValueError(f"{OP}: hessian must be a finite sum of x^T x, whose diagonal is not negative.")
    return matrix


def _fraction(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{OP}: {name} must be from 0 to 1, got {value!r}.")
    return value


def _rounding(hessian: Any, K: int) -> Callable:
    """How weights are rounded once grids can be fitted."""
    if hessian is None:
        return fit_lib.plainly
    return functools.partial(gptq.compensated, hessian=_checked_hessian(hessian, K))
