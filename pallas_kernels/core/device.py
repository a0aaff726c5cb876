# SPDX-License-Identifier: Apache-2.0
"""What the hardware is. The only place in the project that asks.

>>> from pallas_kernels.core import device
>>> str(device.H100)
'NVIDIA H100 80GB HBM3 (sm90)'
"""

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator, as kernels and cost models see it.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: the vendor's name, for example "NVIDIA H100 80GB HBM3" or "TPU v5e".
      arch: instruction set that decides which kernels run: "sm90", "sm80", "v5e", ...; "" for a CPU.
      num_cores: streaming multiprocessors of a GPU, TensorCores of a TPU chip; None when unknown.
      memory_bandwidth: bytes per second between device memory and chip; None when unknown.
      rates: dense operations per second by dtype name; empty when unknown.
    """

    platform: str
    kind: str
    arch: str = ""
    num_cores: int | None = None
    memory_bandwidth: float | None = None
    rates: tuple[tuple[str, float], ...] = ()

    def peak_flops(self, dtype) -> float | None:
        """Dense matrix operations per second in `dtype` (float32 means TF32 on NVIDIA); None when unknown."""
        return dict(self.rates).get(jnp.dtype(dtype).name)

    def __str__(self) -> str:
        return f"{self.kind} ({self.arch})" if self.arch else self.kind


def _rates(bf16: float, *, float32: float | None = None, int8: float | None = None, fp8: float | None = None):
    """Vendor tables quote TFLOP/s (and TOP/s); everything here is per second."""
    table = {"bfloat16": bf16, "float16": bf16, "float32": float32, "int8": int8, "float8_e4m3fn": fp8}
    return tuple((name, rate * 1e12) for name, rate in table.items() if rate)


# Vendor data sheets, dense (no sparsity), SXM parts where there is a choice. `match` is looked up in the
# device kind that JAX reports; the longest match wins, so "H100 PCIe" overrides "H100".
_KNOWN: dict[str, Device] = {
    "H100": Device("gpu", "NVIDIA H100 80GB HBM3", "sm90", 132, 3.35e12, _rates(989, float32=495, int8=1979, fp8=1979)),
    "H100 PCIe": Device("gpu", "NVIDIA H100 PCIe", "sm90", 114, 2.0e12, _rates(756, float32=378, int8=1513, fp8=1513)),
    "H200": Device("gpu", "NVIDIA H200", "sm90", 132, 4.8e12, _rates(989, float32=495, int8=1979, fp8=1979)),
    "A100": Device("gpu", "NVIDIA A100-SXM4-80GB", "sm80", 108, 2.04e12, _rates(312, float32=156, int8=624)),
    "A10": Device("gpu", "NVIDIA A10", "sm86", 72, 0.6e12, _rates(125, float32=62.5, int8=250)),
    "RTX 3090": Device("gpu", "NVIDIA GeForce RTX 3090", "sm86", 82, 0.936e12, _rates(71, float32=35.6, int8=284)),
    "RTX 4090": Device(
        "gpu", "NVIDIA GeForce RTX 4090", "sm89", 128, 1.008e12, _rates(165, float32=82.6, int8=660, fp8=330)
    ),
    "A10G": Device("gpu", "NVIDIA A10G", "sm86", 80, 0.6e12, _rates(70, float32=35, int8=140)),
    "L40S": Device("gpu", "NVIDIA L40S", "sm89", 142, 0.864e12, _rates(362, float32=183, int8=733, fp8=733)),
    "L4": Device("gpu", "NVIDIA L4", "sm89", 58, 0.3e12, _rates(121, float32=60, int8=242, fp8=242)),
    "L40": Device("gpu", "NVIDIA L40", "sm89", 142, 0.864e12, _rates(181, float32=90.5, int8=362, fp8=362)),
    "T4": Device("gpu", "Tesla T4", "sm75", 40, 0.32e12, (("float16", 65e12), ("int8", 130e12))),
    "V100": Device("gpu", "Tesla V100-SXM2-32GB", "sm70", 80, 0.9e12, (("float16", 125e12),)),
    "TPU v4": Device("tpu", "TPU v4", "v4", 2, 1.2e12, _rates(275, int8=275)),
    "TPU v5 lite": Device("tpu", "TPU v5 lite", "v5e", 1, 0.82e12, _rates(197, int8=394)),
    "TPU v5": Device("tpu", "TPU v5", "v5p", 2, 2.765e12, _rates(459, int8=918)),
    "TPU v6 lite": Device("tpu", "TPU v6 lite", "v6e", 1, 1.64e12, _rates(918, int8=1836)),
    "TPU7x": Device("tpu", "TPU7x", "tpu7x", 2, 7.4e12, _rates(2307, fp8=4614)),
}

MMA_ARCHS = ("sm80", "sm86", "sm87", "sm89", "sm90")  # with mma.sync and cp.async: what Mosaic GPU kernels here take
H100, H200, A100 = _KNOWN["H100"], _KNOWN["H200"], _KNOWN["A100"]
TPU_V5E, TPU_V5P, TPU_V6E, TPU_7X = (_KNOWN[k] for k in ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"))
CPU = Device("cpu", "cpu")

_assumed: contextvars.ContextVar[Device | None] = contextvars.ContextVar("assumed_device", default=None)


@contextlib.contextmanager
def assume(device: Device) -> Iterator[Device]:
    """Dispatch as if `device` were here: to compile for it without it, or to see what would run on it.

    >>> from pallas_kernels.core import device
    >>> with device.assume(device.A100):
    ...     device.current().arch
    'sm80'
    """
    token = _assumed.set(device)
    try:
        yield device
    finally:
        _assumed.reset(token)


def current() -> Device:
    """The device that a computation traced now will run on: assumed, or JAX's default, or the first one."""
    if (assumed := _assumed.get()) is not None:
        return assumed
    default = jax.config.jax_default_device
    if isinstance(default, str):  # the documented "cpu"-like spelling
        return describe(jax.devices(default)[0])
    return describe(default if default is not None else jax.devices()[0])


def describe(device: Any) -> Device:
    """What this project knows about a `jax.Device`; unknown rates are None, never guessed."""
    platform = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
    kind = str(device.device_kind)
    matches = [name for name, known in _KNOWN.items() if known.platform == platform and re.search(rf"\b{name}\b", kind)]
    known = _KNOWN[max(matches, key=len)] if matches else Device(platform, kind)
    arch, cores = known.arch, known.num_cores
    if platform == "gpu":
        # What the driver reports beats the table: kernels launch one program per multiprocessor.
        capability = getattr(device, "compute_capability", None)
        arch = f"sm{str(capability).replace('.', '')}" if capability else arch
        cores = getattr(device, "core_count", None) or cores
    return dataclasses.replace(known, kind=kind, arch=arch, num_cores=cores)
