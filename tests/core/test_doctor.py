# SPDX-License-Identifier: Apache-2.0
import pallas_kernels
from pallas_kernels.core import doctor


def test_report_names_versions_devices_and_choices(capsys):
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert f"pallas_kernels {pallas_kernels.__version__}" in out
    assert "8 x cpu (peak rates unknown)" in out
    assert "llama2_7b_prefill_4k: flash_attention on cpu" in out
    assert "  forward  xla" in out
    assert "llama2_7b_qkv_m1: flat_gemm on cpu" in out
    assert "(route C: not measured on this device)" in out


def test_a_gpu_that_jax_does_not_see_is_a_problem(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_nvidia_gpu", lambda: True)
    assert doctor.main() == 1
    assert "an NVIDIA GPU is present but JAX runs on the CPU: pip install" in capsys.readouterr().out
