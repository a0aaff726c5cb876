# SPDX-License-Identifier: Apache-2.0
"""Which of the three routes a call takes: a look-up by M while tracing, so that it costs nothing when it runs.

    M < M1          A   mosaic_gpu with a VectorConfig    no tensor cores
    M1 <= M < M2    B   mosaic_gpu with a MatrixConfig    the weight is the wide operand of the tensor cores
                        (mosaic_tpu on TPUs, which have no A)
    M2 <= M         C   xla                               the library's matrix product

M1 is the first M at which B beats A, M2 the first at which C beats the better of both, of one weight [N, K] in one
orientation and dtype on one device: the two numbers of the paper. Curves may cross more often, where two routes are
within a few percent of each other, so it is the measured times that decide: those of the next number of rows that was
measured. `python -m pallas_kernels.flat_gemm.dataflow` measures them; the table is

    <device>/flat_gemm.dataflow.json    {"bfloat16,NK": {"4096,4096": {"M1": 4, "M2": 128, "us": {"A": {"1": 13.4}}}}}

in the user's cache or, failing that, beside the shipped configurations (core/tuning.py).

Source: Hong et al., "FlashDecoding++", 2023, section 5, "heuristic dataflow".
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from pallas_kernels.core import tuning
from pallas_kernels.core.device import MMA_ARCHS, Device
from pallas_kernels.core.dispatch import Call

# Kernels take so many rows; beyond there is C alone.
MOST_ROWS = 256
# More do not fit the registers of route A.
MOST_VECTOR_ROWS = 8
# Times that are so close, as a fraction, are alike.
TIE = 0.015
# M1 and M2 where there is no table: on Hopper nothing is padded.
_UNMEASURED = {"sm90": (3, 129)}


@dataclasses.dataclass(frozen=True)
class Route:
    """The answer for one call.

    Attributes:
      name: "A", "B" or "C".
      kernel: "A" or "B", whichever is better if mosaic_gpu is to run.
      why: for `pallas_kernels.explain`.
      implementations: what "auto" asks, in order.
    """

    name: str
    kernel: str
    why: str
    implementations: tuple[str, ...] = ("xla",)


def implementations(device: Device) -> dict[str, str]:
    """Which implementation is which route: TPUs have one kernel, of the matrix unit."""
    if device.platform == "tpu":
        return {"B": "mosaic_tpu", "C": "xla"}
    return {"A": "mosaic_gpu", "B": "mosaic_gpu", "C": "xla"}


@dataclasses.dataclass(frozen=True)
class Crossings:
    """Where the routes of one weight cross.

    Attributes:
      M1: the first number of rows at which B beats A; MOST_ROWS + 1 if it never does.
      M2: the first at which C beats both; MOST_ROWS + 1 if it never does.
      order: numbers of rows that were measured, and the routes from the fastest on, as in ((1, "ABC"), (8, "BCA")).
    """

    M1: int
    M2: int
    order: tuple[tuple[int, str], ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self):
        for name in ("M1", "M2"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= MOST_ROWS + 1:
                raise ValueError(f"Crossings.{name} must be an integer from 1 to {MOST_ROWS + 1}, got {value!r}.")

    def kernel(self, M: int) -> str:
        """The better of both kernels."""
        measured = self._measured(M).replace("C", "")
        return measured[0] if measured else "A" if M < self.M1 and M <= MOST_VECTOR_ROWS else "B"

    def route(self, M: int) -> str:
        measured = self._measured(M)
        return measured[0] if measured else "C" if M >= self.M2 else self.kernel(M)

    def _measured(self, M: int) -> str:
        return next((routes for rows, routes in sorted(self.order) if rows >= M), "")


def choose(call: Call, device: Device) -> Route:
    """The route of a call.

    A weight that was not measured takes the crossings of the one nearest to it in log N and log K, if that is within a
    factor of 2 in both. Without one, Hopper runs A for 1 and 2 rows and B up to 128; Ampere and Ada run A below 8 rows
    (what B pads to there) and B up to 64; everything else, TPUs too, takes C. A weight [K, N] never takes A.
    """
    s = call.sizes
    M, N, K = s["M"], s["N"], s["K"]
    part = table(device).get(key(call.arguments[0].dtype, call.option("transpose_w")), {})
    measured = {(n, k): found for (n, k), found in part.items() if max(n / N, N / n, k / K, K / k) <= 2}
    if measured:
        n, k = min(measured, key=lambda at: math.hypot(math.log(at[0] / N), math.log(at[1] / K)))
        crossings, source = measured[n, k], f"measured at N={n} K={k}"
    elif device.arch in MMA_ARCHS:
        crossings, source = Crossings(*_UNMEASURED.get(device.arch, (8, 65))), "not measured on this device"
    else:
        return Route("C", "B", "route C: not measured on this device")
    if not call.option("transpose_w"):
        crossings = dataclasses.replace(crossings, M1=1)  # A takes weights [N, K]
    name = crossings.route(M)
    why = f"route {name}: M={M}, M1={crossings.M1}, M2={crossings.M2}, {source}"
    kernel = implementations(device).get(name, "xla")
    return Route(name, crossings.kernel(M), why, tuple(dict.fromkeys((kernel, "xla"))))


def key(dtype: str, transpose_w: bool) -> str:
    """Name of a table's part.

    >>> key("bfloat16", True)
    'bfloat16,NK'
    """
    return f"{dtype},{'NK' if transpose_w else 'KN'}"


def table_name(device: Device) -> str:
    """Where the table of a device lies, under the user's cache and under the shipped tables."""
    return tuning.table_name(device.kind, "flat_gemm", "dataflow")


def table(device: Device) -> dict[str, dict[tuple[int, int], Crossings]]:
    """Part -> (N, K) -> crossings; the user's before the shipped. What cannot be read is as if not measured."""
    found: dict[str, dict[tuple[int, int], Crossings]] = {}
    for stored in reversed(tuning.stored_tables(table_name(device))):
        for part, weights in stored.items():
            found.setdefault(part, {}).update(_parse(weights))
    return found


def _parse(weights: Any) -> Mapping[tuple[int, int], Crossings]:
    entries = {}
    for shape, fields in weights.items() if isinstance(weights, dict) else ():
        try:
            N, K = map(int, shape.split(","))
            if min(N, K) >= 1:
                entries[N, K] = Crossings(fields["M1"], fields["M2"], _order(fields.get("us", {})))
        except (AttributeError, KeyError, TypeError, ValueError):
            continue
    return entries


def _order(curves: Mapping[str, Mapping[str, float]]) -> tuple[tuple[int, str], ...]:
    """Rows -> routes from the fastest on, of measured times. What is within TIE of the fastest goes in the order of the
    alphabet: bias, activation and residual cost a kernel nothing, and an A less than a B."""
    rows = sorted({int(M) for curve in curves.values() for M in curve})

    def order(M: int) -> str:
        times = {route: curve[str(M)] for route, curve in curves.items() if str(M) in curve}
        fastest = min(times.values())
        return "".join(sorted(times, key=lambda r: (0, 0, r) if times[r] <= fastest * (1 + TIE) else (1, times[r], r)))

    return tuple((M, order(M)) for M in rows)
