# SPDX-License-Identifier: Apache-2.0
import types

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.core import device


def fake(platform, kind, **attributes):
    return types.SimpleNamespace(platform=platform, device_kind=kind, **attributes)


@pytest.mark.parametrize(
    ("kind", "capability", "arch", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", "9.0", "sm90", 989e12),
        ("NVIDIA H100 PCIe", "9.0", "sm90", 756e12),
        ("NVIDIA A100-SXM4-40GB", "8.0", "sm80", 312e12),
        ("NVIDIA L40S", "8.9", "sm89", 362e12),
        ("NVIDIA A10G", "8.6", "sm86", 70e12),
        ("NVIDIA GeForce RTX 5090", "12.0", "sm120", None),
    ],
)
def test_gpus_are_known_by_name_and_described_by_the_driver(kind, capability, arch, bf16):
    found = device.describe(fake("gpu", kind, compute_capability=capability, core_count=77))
    assert (found.platform, found.arch, found.num_cores) == ("gpu", arch, 77)
    assert found.peak_flops(jnp.bfloat16) == bf16


@pytest.mark.parametrize(
    ("kind", "arch"),
    [("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "tpu7x")],
)
def test_tpu_generations(kind, arch):
    assert device.describe(fake("tpu", kind)).arch == arch


def test_an_unknown_device_has_no_guessed_rates():
    unknown = device.describe(fake("tpu", "TPU v99"))
    assert unknown.peak_flops(jnp.bfloat16) is None
    assert unknown.memory_bandwidth is None


def test_current_is_the_default_device_unless_assumed():
    assert device.current().platform == jax.default_backend() == "cpu"
    with device.assume(device.H100):
        assert device.current() is device.H100
        with device.assume(device.TPU_V6E):
            assert device.current().arch == "v6e"
        assert device.current() is device.H100
    assert device.current().platform == "cpu"


def test_the_default_device_may_be_set_by_name_or_object():
    with jax.default_device(jax.devices("cpu")[1]):
        assert device.current().platform == "cpu"
    with jax.default_device("cpu"):
        assert device.current().platform == "cpu"
