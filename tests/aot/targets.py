# SPDX-License-Identifier: Apache-2.0
"""The accelerators that kernels are compiled for without having one.

libtpu holds the whole TPU compiler and needs only a topology's name. The CUDA compiler wants a description of the
GPU: the fields of XLA's GpuTargetConfigProto in text form.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from unittest import mock

from pallas_kernels.core import device

_GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: {shared_memory_optin}
  shared_memory_per_core: {shared_memory}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  core_count: {cores}  fpus_per_core: {fpus}  clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: {l2}  device_memory_size: 85899345920
  cuda_compute_capability {{ major: {major} minor: 0 {feature_extension} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{kind}"
"""

H100_CONFIG = _GPU_CONFIG.format(
    kind=device.H100.kind,
    major=9,
    feature_extension="feature_extension: ACCELERATED_FEATURES",  # the `a` of sm_90a: wgmma
    cores=132,
    fpus=128,
    clock=1.98,
    bandwidth=3352320000000,
    l2=52428800,
    shared_memory=233472,
    shared_memory_optin=232448,
)
A100_CONFIG = _GPU_CONFIG.format(
    kind=device.A100.kind,
    major=8,
    feature_extension="",
    cores=108,
    fpus=64,
    clock=1.41,
    bandwidth=2039000000000,
    l2=41943040,
    shared_memory=167936,
    shared_memory_optin=166912,
)


@dataclasses.dataclass(frozen=True)
class Target:
    """One accelerator to compile for.

    Attributes:
      name: as cases name it: "sm_90a", "v6e".
      device: what dispatch is told it runs on.
      topology: arguments of `jax.experimental.topologies.get_topology_desc`.
      num_devices: how many devices the topology has, all of one host.
    """

    name: str
    device: device.Device
    topology: Mapping[str, str]
    num_devices: int

    @contextlib.contextmanager
    def compiling(self) -> Iterator["Compiling"]:
        """Makes dispatch, and the compiler, believe that this accelerator is here."""
        from jax.experimental import topologies

        with contextlib.ExitStack() as stack:
            stack.enter_context(device.assume(self.device))
            if self.device.arch == "sm80":
                # Mosaic GPU asks the default device for its instruction set, and takes a CPU for a Hopper.
                from jax.experimental.mosaic.gpu import utils

                stack.enter_context(mock.patch.object(utils, "_infer_arch", return_value=(8, 0)))
            yield Compiling(self, tuple(topologies.get_topology_desc(**self.topology).devices))


@dataclasses.dataclass(frozen=True)
class Compiling:
    """What a case builds its abstract arguments with."""

    target: Target
    devices: tuple

    def array(self, shape: tuple[int, ...], dtype):
        """An abstract array on the first device."""
        import jax

        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(self.devices[0]))

    def mesh(self, shape: tuple[int, ...], axis_names: tuple[str, ...]):
        """A mesh over the first prod(shape) devices of the topology."""
        import jax
        import numpy as np

        return jax.sharding.Mesh(np.array(self.devices[: int(np.prod(shape))]).reshape(shape), axis_names)


def _cuda(name: str, gpu: device.Device, config: str) -> Target:
    # partitions x hosts x devices of a host
    topology = {"platform": "cuda", "topology_name": "", "target_config": config, "topology": "1x1x4"}
    return Target(name, gpu, topology, 4)


def _tpu(tpu: device.Device, layout: str, num_devices: int) -> Target:
    topology = {"platform": "tpu", "topology_name": f"{tpu.arch}:{layout}"}
    return Target(tpu.arch, tpu, topology, num_devices)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        _cuda("sm_90a", device.H100, H100_CONFIG),
        _cuda("sm_80", device.A100, A100_CONFIG),
        _tpu(device.TPU_V5E, "2x2", 4),
        _tpu(device.TPU_V5P, "2x2x1", 4),
        _tpu(device.TPU_V6E, "2x2", 4),
        _tpu(device.TPU_7X, "2x2x1", 8),
    )
}
HOPPER = ("sm_90a",)
AMPERE = ("sm_80",)
TPUS = ("v5e", "v5p", "v6e", "tpu7x")
