# SPDX-License-Identifier: Apache-2.0
import logging
import sys
import types

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from pallas_kernels.core import device, dispatch
from pallas_kernels.core.dispatch import Argument, Call, Refusal

CALL = Call("toy", (Argument("q", "bfloat16", (("B", 2), ("T", 4096), ("N", 16), ("H", 72))),), (("causal", True),))
WHY = "head dim H=72 needs padding to 128, which this implementation does not do for the backward pass"


@pytest.fixture
def toy(monkeypatch):
    """An op with a picky GPU implementation, one that does not import, and one that takes everything."""
    picky, anything = types.ModuleType("picky"), types.ModuleType("anything")
    vars(picky)["supports"] = lambda call, device: Refusal(WHY) if call.direction == "backward" else None
    vars(anything)["supports"] = lambda call, device: None
    modules = {"mosaic_gpu": picky, "xla": anything, "reference": anything}

    def load(op, implementation):
        if implementation == "mosaic_tpu":
            raise ModuleNotFoundError("No module named 'libtpu'", name="libtpu")
        return modules[implementation]

    monkeypatch.setattr(dispatch, "load", load)
    return modules


def test_auto_takes_the_first_that_accepts(toy):
    assert dispatch.choose(CALL, device=device.A100).implementation == "mosaic_gpu"
    backward = dispatch.choose(CALL.backward(), device=device.A100)
    assert backward.implementation == "xla"
    assert backward.refusals == (
        ("mosaic_gpu", Refusal(WHY)),
        ("mosaic_tpu", Refusal("its import failed: No module named 'libtpu'")),
    )


def test_a_refusal_says_why_which_call_and_what_to_try(toy):
    choice = dispatch.choose(CALL.backward(), "mosaic_gpu", device.A100)
    with pytest.raises(pk.UnsupportedError) as caught:
        _ = choice.module
    assert str(caught.value) == (
        'toy(implementation="mosaic_gpu") cannot run the gradient of this call.\n'
        f"  why : {WHY}\n"
        "  call: q bf16[B=2,T=4096,N=16,H=72] causal=True on NVIDIA A100-SXM4-80GB (sm80)\n"
        '  try : implementation="auto" (would run "xla")'
    )


def test_a_sequence_that_nothing_accepts_lists_every_reason(toy):
    choice = dispatch.choose(CALL.backward(), ("mosaic_gpu", "mosaic_tpu"), device.A100)
    text = choice.refusal_text()
    assert f"mosaic_gpu: {WHY}; mosaic_tpu: its import failed: No module named 'libtpu'" in text


def test_reference_is_never_automatic(toy):
    del toy["xla"]
    vars(toy["mosaic_gpu"])["supports"] = lambda call, device: Refusal("no")
    assert "reference" not in dispatch.AUTOMATIC
    assert dispatch.requested_names("auto") == ("mosaic_gpu", "mosaic_tpu", "xla")


def test_an_exception_in_supports_is_a_bug_and_flies(toy):
    def broken(call, device):
        raise NotImplementedError("a real bug")

    vars(toy["mosaic_gpu"])["supports"] = broken
    with pytest.raises(NotImplementedError, match="a real bug"):
        dispatch.choose(CALL, device=device.A100)


def test_an_import_that_fails_becomes_the_refusal(monkeypatch):
    dispatch.load.cache_clear()  # another test may have imported it
    monkeypatch.setitem(sys.modules, "pallas_kernels.flash_attention.mosaic_gpu", None)
    refusal = dispatch._ask(Call("flash_attention", ()), "mosaic_gpu", device.H100)
    assert refusal is not None
    assert "mosaic_gpu" in refusal.why


def test_the_choice_is_logged_once_per_call(toy, caplog):
    dispatch._logged.clear()
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        for _ in range(3):
            dispatch.choose(CALL, device=device.A100)
    assert [r.getMessage() for r in caplog.records] == [
        "toy forward: mosaic_gpu (q bf16[B=2,T=4096,N=16,H=72] causal=True on NVIDIA A100-SXM4-80GB (sm80))"
    ]


def test_explain_covers_every_call_of_a_program():
    x = jax.ShapeDtypeStruct((1, 16, 2, 8), jnp.float32)

    def program(x):
        y = pk.flash_attention(x, x, x, mask=pk.masks.Causal())
        return pk.flash_attention(y, x, x, implementation="reference")

    with device.assume(device.H100):
        table = str(pk.explain(program, x))
    assert table == (
        "flash_attention on NVIDIA H100 80GB HBM3 (sm90)\n"
        "  call     q f32[B=1,T=16,N=2,H=8] k f32[B=1,S=16,K=2,H=8] v f32[B=1,S=16,K=2,Hv=8] mask=Causal scale=0.3536\n"
        "  forward  xla\n"
        "    mosaic_gpu no: its tensor-core products take bfloat16 and float16, not float32; cast the inputs\n"
        "    mosaic_tpu no: its kernels are for TPUs, and this is gpu\n"
        "  backward xla\n"
        "    mosaic_gpu no: its tensor-core products take bfloat16 and float16, not float32; cast the inputs\n"
        "    mosaic_tpu no: its kernels are for TPUs, and this is gpu\n"
        "flash_attention on NVIDIA H100 80GB HBM3 (sm90)\n"
        "  call     q f32[B=1,T=16,N=2,H=8] k f32[B=1,S=16,K=2,H=8] v f32[B=1,S=16,K=2,Hv=8] scale=0.3536\n"
        "  forward  reference"
    )


def test_explain_says_when_it_saw_nothing():
    assert "no operation" in str(pk.explain(lambda x: x + 1, jnp.ones(3)))
