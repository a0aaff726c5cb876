# SPDX-License-Identifier: Apache-2.0
"""python -m pallas_kernels.core.doctor: versions, devices, and what would run.

Exits with 1 when something that was asked for cannot work (a GPU is present but JAX does not see it), so that it can
stand at the head of a job script.
"""

import importlib.metadata
import pathlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.core import device as device_lib
from pallas_kernels.core import dispatch, tuning

PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "libtpu",
    "numpy",
    "flax",
    "optax",
    "orbax-checkpoint",
)
# Representative calls of each op, as names in its shapes.py.
CALLS = {
    "flash_attention": ("llama2_7b_prefill_4k", "head_dims_192_128", "vit_b16_224"),
    "decode_attention": ("batch_8_8k_page_16", "int8_160"),
    "flat_gemm": ("llama2_7b_qkv_m1", "llama2_7b_qkv_m128"),
    "quantized_matmul": ("llama2_7b_qkv_mixed_2_4_m1", "llama2_7b_qkv_int8_m8"),
    "sparse_matmul": ("llama2_7b_qkv_m64",),
}


def report() -> Iterator[str]:
    """The lines of the report."""
    yield f"pallas_kernels {pallas_kernels.__version__}, Python {platform.python_version()}"
    versions = ((name, _version(name)) for name in PACKAGES)
    yield "packages   " + ", ".join(f"{name} {version}" for name, version in versions if version)
    for known in dict.fromkeys(device_lib.describe(d) for d in jax.devices()):
        yield f"device     {sum(device_lib.describe(d) == known for d in jax.devices())} x {known} ({_rates(known)})"
    cache = tuning.cache_folder()
    shown = f"~/{cache.relative_to(pathlib.Path.home())}" if cache.is_relative_to(pathlib.Path.home()) else cache
    yield f"tuning     {shown} ({_entries(cache)} entries)"
    for problem in problems():
        yield f"problem    {problem}"
    for op, names in CALLS.items():
        function = getattr(pallas_kernels, op)
        shapes = dispatch.load(op, "shapes").SHAPES
        for name in names:
            yield f"\n{name}: {dispatch.explain(function, **shapes[name].abstract(jnp.bfloat16))}"


def problems() -> Iterator[str]:
    """What stands in the way of a faster device, each with its fix."""
    if _nvidia_gpu() and jax.default_backend() == "cpu":
        yield "an NVIDIA GPU is present but JAX runs on the CPU: pip install 'pallas_kernels[cuda]'"
    if pathlib.Path("/dev/accel0").exists() and jax.default_backend() == "cpu":
        yield "a TPU is present but JAX runs on the CPU: pip install 'pallas_kernels[tpu]'"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _rates(device: device_lib.Device) -> str:
    rate, bandwidth = device.peak_flops(jnp.bfloat16), device.memory_bandwidth
    if rate is None or bandwidth is None:
        return "peak rates unknown"
    return f"{rate / 1e12:.0f} bf16 TFLOP/s, {bandwidth / 1e12:.2f} TB/s"


def _entries(root: pathlib.Path) -> int:
    return sum(len(table) for table in tuning.TuningResult.load(root).tables.values())


def _nvidia_gpu() -> bool:
    if not shutil.which("nvidia-smi"):
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0


def main() -> int:
    print("\n".join(report()))
    return 1 if list(problems()) else 0


if __name__ == "__main__":
    sys.exit(main())
