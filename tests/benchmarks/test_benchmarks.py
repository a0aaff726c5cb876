# SPDX-License-Identifier: Apache-2.0
"""The benchmark driver on the CPU: right answers are timed, wrong ones are not, and rows survive the round trip."""

import dataclasses
import functools
import itertools
import sys
import time
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    baselines,
    decoding,
    fastattention,
    flat_gemm_sweep,
    live_tiles,
    log_bessel_speed,
    models,
    operations,
    plot,
    quantized_ablation,
    rows,
    run,
    table,
    timing,
    vit_compression,
)
from pallas_kernels import masks
from pallas_kernels.core import device
from pallas_kernels.core import timing as core_timing
from pallas_kernels.flash_attention.config import Sm80Config, Sm90Config
from pallas_kernels.flash_attention.shapes import SHAPES
from pallas_kernels.flat_gemm.config import MatrixConfig, VectorConfig
from pallas_kernels.flat_gemm.shapes import Shape
from pallas_kernels.quantized_matmul import lanes
from pallas_kernels.quantized_matmul import shapes as quantized_shapes
from tests import interpreters
from tests.quantized_matmul import threads

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


@pytest.mark.parametrize(("arch", "kind"), [("sm80", Sm80Config), ("sm90", Sm90Config)])
def test_the_kernels_of_an_architecture_may_be_asked_for(arch, kind):
    seen = []

    def spy(query, key, value, implementation, config=None):
        seen.append((implementation, type(config)))
        return FLASH_ATTENTION.function(query, key, value, implementation="xla")

    call = run.Measured("flash_attention", dataclasses.replace(FLASH_ATTENTION, function=spy), "square_128", "float32")
    measured, _ = run.measure_call(call, "forward", [f"mosaic_gpu@{arch}"], method="wall", budget=0)
    assert [row.implementation for row in measured] == [f"mosaic_gpu@{arch}"]
    assert ("mosaic_gpu", kind) in seen


def test_kernels_that_are_not_there_are_named():
    call = FLASH_ATTENTION.shapes["square_128"].make("float32", jax.random.key(0))
    with pytest.raises(ValueError, match=r"'xla' has no kernels for 'sm80' alone"):
        FLASH_ATTENTION.config(call, "xla", "sm80")


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
    assert core_timing.copies(x.nbytes) == 50  # 200 MiB of 4 MiB

    def count(first):
        calls.append(first)
        return first

    def call(x):
        return jax.pure_callback(count, jax.ShapeDtypeStruct((), x.dtype), x[0])

    timing.measure(call, [x], method="wall", budget=0, rotate=True)
    assert len(calls) == 50 * 7  # two runs before the five that count


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
    baseline = {"baseline": "", "ratio": ""}
    cudnn = dataclasses.replace(ROW, implementation="cudnn", median_us="6.25", **baseline)
    fa3 = dataclasses.replace(ROW, implementation="fa3", median_us="5", **baseline)
    older = dataclasses.replace(ROW, implementation="tokamax", commit="00000000", **baseline)  # compared with nothing
    rows.append(tmp_path / "h200.csv", [ROW, cudnn, fa3, older])
    text = "before\n<!-- benchmarks: flash_attention h200 -->\nold\n<!-- end benchmarks -->\nafter\n"
    filled = table.fill(text, tmp_path)
    assert filled.splitlines() == [
        "before",
        "<!-- benchmarks: flash_attention h200 -->",
        "| shape | direction | dtype | implementation | µs | TFLOP/s | % of roofline | vs cudnn | vs fa3 "
        "| best baseline | times as fast | commit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| `square_128` | forward | bfloat16 | xla | 12.5 | 3.2 | 0.5 | 0.5 | 0.4 | cudnn | 0.5 | abcdef01 |",
        "<!-- end benchmarks -->",
        "after",
    ]
    assert table.fill(filled, tmp_path) == filled
    assert "\nNot measured yet.\n" in table.fill(text.replace("flash", "decode"), tmp_path)


def test_tables_of_vision_transformers(tmp_path):
    where = {"commit": "abcdef01", "jax": "0.11.2", "device": "H100"}
    times = {"images_per_s": "1", "error": "0.01", "timing": "cupti", **where}
    slow = rows.VitRow(model="vit", batch="1", variant="float32", wall_us="90", busy_us="60", **times)
    fast = dataclasses.replace(slow, variant="int8", busy_us="40")
    rows.append(tmp_path / "h100_vit.csv", [slow, fast])
    small = rows.CompressionRow("int8", "0.9100", "0.9000", "0.9200", "1250", "3.2", "9", **where)
    dense = dataclasses.replace(small, variant="dense", accuracy="0.9150", bytes="4000", ratio="")
    rows.append(tmp_path / "vit_compression.csv", [small, dense])  # as they ended, not in the order of the table
    marks = [f"<!-- benchmarks: {what} -->\n<!-- end benchmarks -->" for what in ("vit h100", "compression vit")]
    filled = table.fill("\n".join(marks), tmp_path).splitlines()
    assert filled[3:5] == [
        "| `vit` | 1 | float32 | 60 | 90 | 1 | 1 | 0.01 | abcdef01 |",
        "| `vit` | 1 | int8 | 40 | 90 | 1 | 1.5 | 0.01 | abcdef01 |",
    ]
    assert filled[9:11] == [
        "| dense | 91.5% | 90.0% to 92.0% | +0.0 | 4,000 |  | abcdef01 |",
        "| int8 | 91.0% | 90.0% to 92.0% | -0.5 | 1,250 | 3.2 | abcdef01 |",
    ]
    vit_compression.plot([small, dense], tmp_path / "vit_compression.png")
    assert (tmp_path / "vit_compression.png").read_bytes().startswith(b"\x89PNG")


def test_log_bessel_speed(tmp_path, capsys):
    """What the driver measures is a table: ours beside SciPy, "shuffled / sorted"."""
    file = tmp_path / "cpu_log_bessel.csv"
    options = ["--implementations=xla,mosaic_gpu,scipy", "--dtypes=float64", "--regions=large", "--elements=4096"]
    assert log_bessel_speed.main([*options, f"--out={file}"]) == 0
    assert "mosaic_gpu   not run: log_bessel" in capsys.readouterr().out
    header, _, of_i, of_k = table.bessel_table(rows.read(file, rows.BesselRow))
    assert header.startswith("|  | region | type | `xla`, M/s | scipy, M/s | times scipy |")
    assert of_i.startswith("| log I | large | float64 |")
    assert of_k.startswith("| log K | large | float64 |")
    assert all(line.count(" / ") == 3 for line in (of_i, of_k))
    with jax.enable_x64(True), pytest.raises(AssertionError, match=r"log I of 1.0, 1.0 is wrong by 5.7e-01"):
        log_bessel_speed.check(
            jnp.asarray([0.0, 1.0]), "log I", (np.array([1.0, 2.0]), np.array([1.0, 3.0])), single=1e-6
        )


def test_plot(tmp_path):
    baseline = dataclasses.replace(ROW, implementation="cudnn", tflops="6.4")
    backward = dataclasses.replace(ROW, direction="forward_backward")
    plot.draw([ROW, baseline, backward], tmp_path / "h100.png")
    assert (tmp_path / "h100.png").read_bytes().startswith(b"\x89PNG")


def test_documents_have_offsets():
    arguments = SHAPES["mqa_packed_300"].make(jnp.bfloat16, jax.random.key(0))
    ids = np.asarray(arguments["mask"].right.query_ids)
    offsets = baselines.document_offsets(arguments["mask"].right, 2, 300)
    assert [offsets[0], offsets[-1]] == [0, 600]
    for begin, end in itertools.pairwise(offsets):
        assert len({(t // 300, ids[t // 300, t % 300]) for t in range(begin, end)}) == 1
    assert len(offsets) - 1 == sum(len(np.unique(row)) for row in ids)
    with pytest.raises(baselines.Unavailable, match="ascending"):
        baselines.document_offsets(masks.Segments(ids[:, ::-1], ids[:, ::-1]), 2, 300)
    with pytest.raises(baselines.Unavailable, match="same documents"):
        baselines.document_offsets(masks.Segments(ids, ids + 1), 2, 300)


@pytest.mark.parametrize(
    ("shape", "flags"),
    [
        ("square_128", {}),
        ("head_dim_72", {"is_causal": True}),
        ("window_500", {"is_causal": True, "local_window_size": (63, 0)}),
        ("ragged_113_203", None),  # theirs is aligned top-left
        ("mqa_packed_300", None),
        ("prefix_120", None),
    ],
)
def test_flags_say_what_the_mask_says(shape, flags):
    assert baselines._flags(SHAPES[shape].make(jnp.bfloat16, jax.random.key(0))) == flags


@pytest.mark.parametrize(
    ("shape", "flags", "entry"),
    [
        ("square_128", {"is_causal": False, "window_size": (-1, -1)}, "flash_mha"),
        ("ragged_113_203", {"is_causal": True, "window_size": (-1, -1)}, "flash_mha"),
        ("window_500", {"is_causal": False, "window_size": (63, 0)}, "flash_mha"),
        ("mqa_packed_300", {"is_causal": True, "window_size": (-1, -1)}, "flash_mha_varlen"),
    ],
)
def test_flash_attention_3_is_asked_for_the_same(monkeypatch, shape, flags, entry):
    def takes(name):
        def attend(query, *others, sinks, **given):
            called.append((name, given, query.shape))
            return query

        return attend

    called = []
    library = types.SimpleNamespace(**{name: takes(name) for name in ("flash_mha", "flash_mha_varlen")})
    monkeypatch.setitem(sys.modules, "dew_flash_attn", library)
    arguments = SHAPES[shape].make(jnp.bfloat16, jax.random.key(0))
    with device.assume(device.H200):
        [(attend, its_arguments)] = baselines.fa3(arguments, "forward")
    assert attend(its_arguments).shape == arguments["query"].shape
    B, T, N, H = arguments["query"].shape
    assert called == [(entry, flags, (B, T, N, H) if entry == "flash_mha" else (B * T, N, H))]


def test_a_dense_mask_is_the_same_mask(monkeypatch):
    """cuDNN is not here; what is asked of it is given to XLA."""
    by_xla = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *arrays, implementation, **options: by_xla(*arrays, **options)
    )
    arguments = SHAPES["mqa_packed_300"].make(jnp.bfloat16, jax.random.key(0))
    truth = run.Truth(FLASH_ATTENTION, arguments, "forward", exact=True)
    with device.assume(device.H200):
        candidates = baselines.cudnn_masked(arguments, "forward")
        assert len(candidates) == 2  # the array, and what cuDNN makes of it
        assert len(baselines.cudnn_masked(arguments, "forward_backward")) == 1
    for attend, prepared in candidates:
        call, arrays = operations.directed(attend, prepared, "forward", ())
        truth.check(jax.jit(call)(*arrays))


def test_an_external_candidate_times_itself():
    arguments = SHAPES["square_128"].make(jnp.float32, jax.random.key(0))
    truth = run.Truth(FLASH_ATTENTION, arguments, "forward", exact=True)
    right = baselines.External(
        lambda: [FLASH_ATTENTION.function(**arguments)], lambda budget: timing.Timing(budget, 0.0, "events")
    )
    assert run.time_fastest(FLASH_ATTENTION, [right], "forward", truth, "wall", 0.5).median == 0.5
    wrong = dataclasses.replace(right, outputs=lambda: [arguments["query"]])
    with pytest.raises(AssertionError, match="output"):
        run.time_fastest(FLASH_ATTENTION, [wrong], "forward", truth, "wall", 0.5)


def test_shapes_are_named_by_patterns():
    chosen = run._match(["d128_causal_*", "packed_16k", "nonsense"], SHAPES)
    assert chosen == ["d128_causal_2k", "d128_causal_8k", "d128_causal_16k", "packed_16k", "nonsense"]


def test_packed_documents_are_those_of_the_row():
    """Every draw fills the row with documents between the bounds, and operations are those of the draw that ran."""
    shape = dataclasses.replace(SHAPES["packed_16k"], T=2**14, S=2**14, N=1, K=1, H=8)
    for seed in range(3):
        mask = shape.make(jnp.bfloat16, jax.random.key(seed))["mask"]
        lengths = np.bincount(np.asarray(mask.right.query_ids)[0])
        assert lengths.sum() == 2**14
        assert lengths[:-1].min(initial=2**14) >= 128
        assert lengths.max() <= 2**14
        live = sum(n * (n + 1) / 2 for n in lengths)
        assert shape.flops("forward", mask) == pytest.approx(4 * 8 * live, rel=1e-6)


def test_operations_of_a_ragged_causal_call():
    ragged = SHAPES["ragged_1023_8191"]
    live = sum(8191 - 1023 + t + 1 for t in range(1023))
    assert ragged.flops() == pytest.approx(4 * ragged.B * ragged.N * ragged.H * live, rel=1e-6)


def test_time_for_each_live_tile():
    """Times in proportion to live tiles give 1 in every row."""
    names = ("d128_full_16k", "d128_causal_16k", "window_1k_16k")
    counts = {name: live_tiles.count(name) for name in names}
    assert counts["d128_causal_16k"] == {"empty": 16 * 8128, "mixed": 16 * 128, "full": 16 * 8128}
    measured = [
        dataclasses.replace(ROW, shape=name, median_us=str((counts[name]["mixed"] + counts[name]["full"]) / 1000))
        for name in names
    ]
    lines = live_tiles.table(measured)
    assert len(lines) == 2 + len(names)
    assert all(line.split(" | ")[-3:] == ["1", "1", "abcdef01 |"] for line in lines[2:])
    assert len(live_tiles.table(measured[1:])) == 2  # nothing to compare with


def test_fastattention(tmp_path, capsys):
    out = tmp_path / "cpu_fastattention.csv"
    small = ["--lengths=64", "--heads=2", "--preset=tiny", "--prompts=32", "--dtype=float32", "--budget=0"]
    assert fastattention.main(["--parts=operator,prefill", *small, f"--out={out}"]) == 0
    assert "up to 5.16" in capsys.readouterr().out
    measured = rows.read(out, rows.PaperRow)
    assert [(row.part, row.variant) for row in measured] == [
        (part, variant) for part in ("operator", "prefill") for variant in ("ours", "unfused", "unfused, stored")
    ]
    text = "<!-- benchmarks: fastattention_operator cpu -->\n<!-- end benchmarks -->"
    assert "times as fast as stored" in table.fill(text, tmp_path)


def test_two_levels_exchange_less():
    found = {(row.case, row.variant): float(row.value) for row in fastattention.exchanges([2048])}
    assert [found["full", width] for width in ("128", "256", "512", "1024")] == [48, 24, 12, 6]
    assert found["causal", "128"] == 3 * (16 + 1) / 2  # row i of 16 has i live blocks
    assert found["causal", "512"] == 3 * (4 + 1) / 2


def test_the_mask_of_all_tiles_does_not_grow():
    sizes = {(row.variant, row.length): float(row.value) for row in fastattention.memory([1024, 2**18])}
    assert sizes["M-mask, blocks to 1024", "1024"] == sizes["M-mask, blocks to 1024", str(2**18)] == 4
    assert sizes["S x S, 1 byte", str(2**18)] == pytest.approx(2**16, rel=1e-3)


@pytest.mark.parametrize("stored", [False, True])
def test_unfused_attention_is_attention(stored):
    arguments = dataclasses.replace(SHAPES["head_dim_72"], K=1).make(jnp.float32, jax.random.key(0))
    out = jax.jit(functools.partial(fastattention.unfused, stored=stored))(**arguments)
    np.testing.assert_allclose(out, FLASH_ATTENTION.specification(arguments), atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="takes no bias"):
        fastattention.unfused(**arguments, bias=None)


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


@pytest.mark.parametrize("shape", ["paged_window_sink", "int8_160", "drafted_5"])
def test_samples_of_decoding_are_parts_of_the_call(shape):
    operation = operations.OPERATIONS["decode_attention"]
    arguments = operation.shapes[shape].make("float32", jax.random.key(0))
    whole = operation.specification(arguments)
    for sample in operation.samples(arguments):
        np.testing.assert_allclose(
            whole[sample.output], operation.specification(sample.arguments), rtol=1e-6, atol=1e-7
        )


def test_driver_measures_what_has_no_gradient(tmp_path):
    argv = ["decode_attention", "--shapes=dense_203", "--budget=0", f"--out={tmp_path / 'cpu.csv'}"]
    assert run.main(argv) == 0
    assert [(row.direction, row.implementation) for row in rows.read(tmp_path / "cpu.csv", rows.Row)] == [
        ("forward", "xla")
    ]


@pytest.mark.parametrize("shape", ["swiglu_3", "silu_5", "leading_2_3"])
def test_samples_of_a_product_are_parts_of_it(shape):
    operation = operations.OPERATIONS["flat_gemm"]
    arguments = operation.shapes[shape].make("float32", jax.random.key(0))
    call, arrays = operations.directed(operation.specification, arguments, "forward_backward", operation.differentiable)
    leaves = jax.tree.leaves(jax.jit(call)(*arrays))
    truth = run.Truth(operation, arguments, "forward_backward", exact=False)
    truth.check(leaves)
    for i, which in enumerate(["output", "gradient 0", "gradient 1"]):
        with pytest.raises(AssertionError, match=which):
            truth.check([leaf * (1.01 if i == j else 1) for j, leaf in enumerate(leaves)])


def test_driver_measures_products(tmp_path, capsys):
    argv = ["flat_gemm", "--shapes=plain_8,silu_5", "--budget=0", f"--out={tmp_path / 'cpu.csv'}"]
    assert run.main([*argv, "--direction=forward", "--implementations=auto,cublas"]) == 0
    assert "multiplies, and takes no bias, residual, activation" in capsys.readouterr().out
    measured = rows.read(tmp_path / "cpu.csv", rows.Row)
    assert [(row.shape, row.implementation) for row in measured] == [
        ("plain_8", "xla"),
        ("plain_8", "cublas"),
        ("silu_5", "xla"),
    ]
    assert float(measured[0].tflops) == pytest.approx(2 * 8 * 192 * 256 / float(measured[0].median_us) / 1e6, rel=1e-3)


@pytest.mark.parametrize(("route", "kind"), [("A", VectorConfig), ("B", MatrixConfig)])
def test_a_route_may_be_asked_for(route, kind):
    operation = operations.OPERATIONS["flat_gemm"]
    arguments = operation.shapes["plain_8"].make("float32", jax.random.key(0))
    assert type(operation.config(arguments, "mosaic_gpu", route)) is kind
    for implementation, name in (("mosaic_gpu", "C"), ("xla", "A")):
        with pytest.raises(ValueError, match=f"no route '{name}'"):
            operation.config(arguments, implementation, name)


def test_sweep_of_tiles(tmp_path, monkeypatch, capsys):
    """There is no kernel for a CPU: what is asked of it is given to XLA."""
    asked = []

    real = flat_gemm_sweep.OPERATION

    def spy(*, implementation, config=None, **arguments):
        asked.append((implementation, config))
        return real.function(**arguments, implementation="xla")

    monkeypatch.setattr(flat_gemm_sweep, "OPERATION", dataclasses.replace(real, function=spy))
    out = tmp_path / "cpu_flat_gemm_sweep.csv"
    argv = ["--n=512,1024", "--k=2048", "--block_n=32,64,128", "--dtype=float32", "--budget=0", f"--out={out}"]
    assert flat_gemm_sweep.main(argv) == 0
    assert "left out: MatrixConfig.block_n must be one of (64, 128, 256, 512), got 32." in capsys.readouterr().out
    measured = rows.read(out, rows.SweepRow)
    assert [(row.n, row.implementation, row.block_n) for row in measured] == [
        (n, *tile) for n in ("512", "1024") for tile in (("xla", ""), ("mosaic_gpu", "64"), ("mosaic_gpu", "128"))
    ]
    assert ("mosaic_gpu", MatrixConfig(64, stages=2)) in asked
    nbytes = 4 * (8 * 2048 + 512 * 2048 + 8 * 512)
    assert float(measured[0].gbs) == pytest.approx(nbytes / float(measured[0].median_us) / 1e3, rel=2e-3)
    assert (tmp_path / "cpu_flat_gemm_sweep.png").read_bytes().startswith(b"\x89PNG")


def test_sweep_says_what_does_not_run(capsys):
    [row] = flat_gemm_sweep.sweep(Shape(8, 64, 32), "float32", [MatrixConfig(64)], "wall", 0)
    assert row.implementation == "xla"
    assert "mosaic_gpu MatrixConfig(block_n=64" in capsys.readouterr().out


def test_decoding_with_weights_of_few_bits(tmp_path, capsys):
    out = tmp_path / "cpu_models.csv"
    argv = ["--preset=tiny", "--prompt=8", "--variants=int4,auto", "--dtype=float32", "--repeats=1", f"--out={out}"]
    assert decoding.main(argv) == 0
    told = capsys.readouterr().out
    assert "float32: 0.00 GB of weights; 32.000 bits a weight in the layers" in told
    assert "int4: 0.00 GB of weights; 4.125 bits a weight in the layers (983,040 weights" in told  # 4 + 16 / 128
    auto, int4 = rows.read(out, rows.ModelRow)
    assert (auto.implementation, int4.implementation) == ("auto", "int4")
    ratio = float(auto.median_ms) / float(int4.median_ms)
    assert f"1 x 8: int4 is {ratio:.2f} x auto"[:-8] in told
    # The layers; the embedding, which is the output projection, and norms; keys and values of 8 + 64 tokens.
    nbytes = 983_040 * 4.125 / 8 + 4 * (320 * 128 + 9 * 128) + 2 * 4 * 4 * 2 * 32 * 72
    assert float(int4.gbs) * float(int4.median_ms) * 1e6 == pytest.approx(nbytes, rel=2e-3)


def test_no_two_layers_share_memory():
    decoder = decoding.random_decoder(decoding.preset("tiny"), jnp.dtype("float32"), "mixed_2_4")
    arrays = jax.tree.leaves(decoder.layers)
    assert len({array.unsafe_buffer_pointer() for array in arrays}) == len(arrays)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # words taken for numbers may be infinite
def test_ablation_of_quantized_matmul(tmp_path, monkeypatch, capsys):
    """What is timed with a part left out computes something else, and the rest is right."""
    name, shape = "one_chunk", quantized_shapes.Shape(8, 64, 256, four_bit_strips=0)
    real = quantized_ablation.OPERATION
    monkeypatch.setattr(
        quantized_ablation, "OPERATION", dataclasses.replace(real, shapes={name: shape}, memory_bound=False)
    )
    outputs, seconds = [], iter([6e-6, 3e-6, 10e-6, 12e-6])

    def measure(function, arrays, **options):
        compiled = function if isinstance(function, jax.stages.Compiled) else jax.jit(function)
        outputs.append(np.asarray(compiled(*arrays)))
        return timing.Timing(next(seconds), 0.0, options["method"])

    monkeypatch.setattr(timing, "measure", measure)
    out = tmp_path / "h100_quantized_ablation.csv"
    with device.assume(dataclasses.replace(device.H100, num_cores=2)), interpreters.mosaic_gpu(threads.STAND_INS):
        assert quantized_ablation.main([f"--shapes={name}", "--stages=2", f"--out={out}"]) == 0
    arguments = shape.make("bfloat16", jax.random.key(0))
    wanted = np.asarray(arguments["x"].astype(jnp.float32) @ arguments["weight"].dequantize(), np.float32)
    scale = np.abs(wanted).max()
    for output, right in zip(outputs, (False, False, True, True), strict=True):
        assert bool(np.abs(output.astype(np.float32) - wanted).max() < 0.02 * scale) is right
    told = capsys.readouterr().out
    assert "| 2 | yes | 12 |" in told
    assert "| 0.833 | 6 (50 % less) | 3 (75 % less) |" in told
    measured = rows.read(out, rows.AblationRow)
    assert [(row.shape, row.stages, row.scales_ahead) for row in measured] == [(name, "2", "no"), (name, "2", "yes")]
    assert [(row.scales_percent, row.decoding_percent) for row in measured] == [("40", "70"), ("50", "75")]


def test_words_as_they_are_are_multiplied_as_often():
    operands = [["word"] * 4] * 2, [[["scale"] * 4] * 2] * 2, [[list("abcdefgh")] * 4] * 2
    counts = []
    for strip in (lanes.strip, quantized_ablation.words_as_weights):
        do = mock.Mock()
        with mock.patch.object(lanes, "strip", strip):
            lanes.strips(do, [[0, 0], [0, 0]], *operands)
        counts.append([call.args[2] for call in do.mma.call_args_list])
    assert len(counts[0]) == 4 * 4 * 2
    assert counts[0] == counts[1]


def test_ablation_knows_its_shapes(capsys):
    with pytest.raises(SystemExit):
        quantized_ablation.main(["--shapes=none"])
    assert "--shapes: unknown none; see pallas_kernels/quantized_matmul/shapes.py" in capsys.readouterr().err
