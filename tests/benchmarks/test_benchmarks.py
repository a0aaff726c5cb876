# SPDX-License-Identifier: Apache-2.0
"""The benchmark driver on the CPU: right answers are timed, wrong ones are not, and rows survive the round trip."""

import dataclasses
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import baselines, models, operations, plot, rows, run, table, timing
from pallas_kernels.core import device
from pallas_kernels.flash_attention.shapes import SHAPES

FLASH_ATTENTION = operations.OPERATIONS["flash_attention"]
ROW = rows.Row(
    op="flash_attention",
    shape="square_128",
    direction="forward",
    mask="full",
    dtype="bfloat16",
    implementation="xla",
    median_us="12.5",
    spread="0.01",
    tflops="3.2",
    gbs="100",
    percent_peak="0.5",
    baseline="cudnn",
    ratio="0.5",
    commit="abcdef01",
    jax="0.11.2",
    device="NVIDIA H100 80GB HBM3",
    timing="cupti",
)


def test_driver_writes_a_row_for_each_implementation(tmp_path, capsys):
    out = tmp_path / "cpu.csv"
    argv = ["flash_attention", "--shapes=square_128", "--implementations=auto,xla,jax_xla,cudnn", "--budget=0"]
    assert run.main([*argv, f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert "cuDNN needs an NVIDIA GPU" in printed
    measured = rows.read(out, rows.Row)
    # "auto" runs xla on a CPU, which is measured once.
    assert [(row.direction, row.implementation) for row in measured] == [
        ("forward", "xla"),
        ("forward", "jax_xla"),
        ("forward_backward", "xla"),
        ("forward_backward", "jax_xla"),
    ]
    ours, baseline = measured[:2]
    assert ours.baseline == "jax_xla"
    assert float(ours.ratio) == pytest.approx(float(baseline.median_us) / float(ours.median_us), rel=0.01)
    flops = 4 * 2 * 128 * 128 * 64  # two products of 2 N T S H
    assert float(ours.tflops) == pytest.approx(flops / float(ours.median_us) / 1e6, rel=1e-3)
    nbytes = 4 * (128 * 2 * 64) * 4  # query, key, value and output in float32
    assert float(ours.gbs) == pytest.approx(nbytes / float(ours.median_us) / 1e3, rel=1e-3)
    assert (ours.percent_peak, ours.timing, ours.device) == ("", "wall", "cpu")


def test_a_wrong_answer_is_not_timed(capsys):
    def wrong(query, key, value, implementation):
        return FLASH_ATTENTION.function(query, key, value, implementation="xla") * 1.01

    broken = dataclasses.replace(FLASH_ATTENTION, function=wrong)
    call = run.Measured("flash_attention", broken, "square_128", "float32", ("forward",))
    measured, failures = run.measure_call(call, "forward", ["xla", "jax_xla"], method="wall", budget=0)
    assert [row.implementation for row in measured] == ["jax_xla"]
    assert failures == 1
    assert "WRONG: output" in capsys.readouterr().out


def test_a_wrong_gradient_is_not_timed():
    @jax.custom_vjp
    def scaled(x):
        return x

    scaled.defvjp(lambda x: (x, None), lambda _, ct: (ct * 1.01,))

    def wrong(query, key, value, implementation):
        return FLASH_ATTENTION.function(query, key, scaled(value), implementation="xla")

    broken = dataclasses.replace(FLASH_ATTENTION, function=wrong)
    call = run.Measured("flash_attention", broken, "square_128", "float32")
    assert run.measure_call(call, "forward_backward", ["xla"], method="wall", budget=0) == ([], 1)


def test_what_breaks_leaves_the_others_alone(monkeypatch, capsys):
    def breaks(arguments, direction):
        raise RuntimeError("no such kernel\non this device")

    monkeypatch.setitem(baselines.BASELINES["flash_attention"], "cudnn", breaks)
    call = run.Measured("flash_attention", FLASH_ATTENTION, "square_128", "float32", ("forward",))
    measured, failures = run.measure_call(call, "forward", ["cudnn", "xla"], method="wall", budget=0)
    assert [row.implementation for row in measured] == ["xla"]
    assert failures == 0  # a baseline is not ours to mend
    assert "FAILED: RuntimeError: no such kernel on this device" in capsys.readouterr().out


def test_an_implementation_may_be_run_as_if_elsewhere(monkeypatch):
    seen = []

    def spy(query, key, value, implementation):
        seen.append((implementation, device.current().arch))
        return FLASH_ATTENTION.function(query, key, value, implementation="xla")

    call = run.Measured("flash_attention", dataclasses.replace(FLASH_ATTENTION, function=spy), "square_128", "float32")
    measured, _ = run.measure_call(call, "forward", ["xla@sm80"], method="wall", budget=0)
    assert [row.implementation for row in measured] == ["xla@sm80"]
    assert ("xla", "sm80") in seen


@pytest.mark.parametrize("name", ["everything_90_150", "per_head_dense_77_91"])
def test_samples_are_parts_of_the_whole(name):
    """What is held to the specification in large calls, here in small ones, where all of it is known."""
    arguments = SHAPES[name].make(jnp.float32, jax.random.key(0))
    call, arrays = operations.directed(
        FLASH_ATTENTION.specification, arguments, "forward_backward", FLASH_ATTENTION.differentiable
    )
    outputs = jax.jit(call)(*arrays)
    truth = run.Truth(FLASH_ATTENTION, arguments, "forward_backward", exact=False)
    assert len(truth.samples) == 2
    truth.check(outputs)
    truth.check(outputs[0])  # without gradients
    for i, which in enumerate(["output", "gradient 0", "gradient 1", "gradient 2"]):
        leaves = jax.tree.leaves(outputs)
        leaves[i] = leaves[i] * 1.01
        with pytest.raises(AssertionError, match=which):
            truth.check(leaves)


def test_large_calls_are_sampled_in_every_head_and_both_ends():
    arguments = SHAPES["ragged_113_203"].make(jnp.bfloat16, jax.random.key(0))
    one, some = operations.attention_samples(arguments, rows=8)
    assert one.arguments["query"].shape == (1, 113, 2, 64)  # a group of 2 heads
    assert one.arguments["key"].shape == (1, 203, 1, 64)
    batch, rows_ = some.output
    assert batch == slice(None)
    assert rows_[0] == 0
    assert rows_[-1] == 112


@pytest.mark.parametrize("shape", ["ragged_113_203", "window_500", "mqa_packed_300", "full_bias_60_75"])
def test_the_xla_baseline_computes_the_same(shape):
    arguments = SHAPES[shape].make(jnp.float32, jax.random.key(0))
    [(attend, its_arguments)] = baselines.BASELINES["flash_attention"]["jax_xla"](arguments, "forward")
    call, arrays = operations.directed(attend, its_arguments, "forward", ())
    expected = FLASH_ATTENTION.specification(arguments)
    np.testing.assert_allclose(jax.jit(call)(*arrays), expected, atol=1e-5, rtol=1e-5)


def test_baselines_refuse_what_they_would_ignore():
    arguments = SHAPES["everything_90_150"].make(jnp.float32, jax.random.key(0))
    reasons = {"jax_xla": "sink, soft_cap", "tokamax": "sink", "jax_mosaic_gpu": "bias, scale", "fa3": "soft_cap"}
    for name, reason in reasons.items():
        with pytest.raises(baselines.Unavailable, match=reason):
            baselines.BASELINES["flash_attention"][name](arguments, "forward")


def test_wall_clock_measures_waiting():
    def sleep(x):
        time.sleep(0.01)
        return x

    def slow(x):
        return jax.pure_callback(sleep, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    measured = timing.measure(slow, [np.ones(3, np.float32)], method="wall", budget=0)
    assert 0.01 <= measured.median < 1
    assert measured.method == "wall"


def test_rotation_divides_by_the_number_of_copies():
    calls = []
    x = jnp.ones(2**20, jnp.float32)
    assert timing._copies([x]) == 25  # 100 MiB of 4 MiB
    timing.measure(lambda x: (calls.append(x), x * 2)[1], [x], method="wall", budget=0, rotate=True)
    assert len(calls) == 25


def test_unknown_names_are_told_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        run.main(["flash_attention", "--shapes=square_129"])
    assert "unknown square_129; known: square_128, " in capsys.readouterr().err


def test_the_newest_row_counts(tmp_path):
    file = tmp_path / "h100.csv"
    other = dataclasses.replace(ROW, shape="other")
    rows.append(file, [ROW, other])
    rows.append(file, [dataclasses.replace(ROW, median_us="11")])
    assert [(row.shape, row.median_us) for row in rows.read(file, rows.Row)] == [
        ("square_128", "11"),
        ("other", "12.5"),
    ]


def test_rows_of_another_kind_are_not_mixed(tmp_path):
    file = tmp_path / "h100.csv"
    file.write_text("op,time\nflash_attention,3\n")
    with pytest.raises(ValueError, match="has the columns"):
        rows.append(file, [ROW])
    with pytest.raises(ValueError, match="does not hold rows of Row"):
        rows.read(file, rows.Row)


@pytest.mark.parametrize(
    ("known", "name"),
    [(device.H100, "h100"), (device.H200, "h200"), (device.A100, "a100"), (device.TPU_V6E, "v6e"), (device.CPU, "cpu")],
)
def test_device_names(known, name):
    assert rows.device_name(known) == name


@pytest.mark.parametrize("known", [device.H100, device.H200])
def test_percent_of_the_roofline(known):
    """2 ** 40 operations at 989e12 a second take longer than the few bytes, so arithmetic is the limit."""
    arguments = SHAPES["square_128"].make(jnp.bfloat16, jax.random.key(0))
    shape = dataclasses.replace(SHAPES["square_128"], B=2**12, T=2**10, S=2**10, N=1, K=1)
    call = run.Measured("flash_attention", dataclasses.replace(FLASH_ATTENTION, shapes={"x": shape}), "x", "bfloat16")
    call.arguments = arguments  # not made of that shape: it is large
    with device.assume(known):
        maker = run.RowMaker(call, "forward")
    flops = 4 * 2**12 * 2**20 * 64
    row = maker("xla", timing.Timing(2 * flops / 989e12, 0.0, "cupti"), None)
    assert (row.percent_peak, row.tflops) == ("50", "494.5")


def test_tables_are_written_between_markers(tmp_path):
    rows.append(tmp_path / "h100.csv", [ROW, dataclasses.replace(ROW, implementation="cudnn", baseline="", ratio="")])
    text = "before\n<!-- benchmarks: flash_attention h100 -->\nold\n<!-- end benchmarks -->\nafter\n"
    filled = table.fill(text, tmp_path)
    assert filled.splitlines() == [
        "before",
        "<!-- benchmarks: flash_attention h100 -->",
        "| shape | direction | dtype | implementation | µs | TFLOP/s | % of roofline | best baseline | times as fast "
        "| commit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| `square_128` | forward | bfloat16 | xla | 12.5 | 3.2 | 0.5 | cudnn | 0.5 | abcdef01 |",
        "<!-- end benchmarks -->",
        "after",
    ]
    assert table.fill(filled, tmp_path) == filled


def test_plot(tmp_path):
    baseline = dataclasses.replace(ROW, implementation="cudnn", tflops="6.4")
    backward = dataclasses.replace(ROW, direction="forward_backward")
    plot.draw([ROW, baseline, backward], tmp_path / "h100.png")
    assert (tmp_path / "h100.png").read_bytes().startswith(b"\x89PNG")


def test_models(tmp_path, monkeypatch):
    replaced = mock.Mock(side_effect=models.without_attention)
    monkeypatch.setattr(models, "without_attention", replaced)
    out = tmp_path / "models.csv"
    argv = ["--preset=tiny", "--dtype=float32", "--batch=1", "--length=32", "--prompt=32", "--new_tokens=8"]
    assert models.main([*argv, "--repeats=1", f"--out={out}"]) == 0
    train, prefill, decode = rows.read(out, rows.ModelRow)
    assert [row.phase for row in (train, prefill, decode)] == ["train", "prefill", "decode"]
    assert float(train.tokens_per_second) == pytest.approx(32e3 / float(train.median_ms), rel=1e-3)
    assert float(prefill.tokens_per_second) == pytest.approx(32e3 / float(prefill.median_ms), rel=1e-3)
    assert float(train.attention_percent) < 100
    assert replaced.called
    # Every weight is read once a token, 4 bytes each; keys and values come on top.
    weights = 4 * models.preset("tiny").num_parameters
    assert weights < float(decode.gbs) * float(decode.median_ms) * 1e6 < 1.2 * weights
