# SPDX-License-Identifier: Apache-2.0
"""The search for the crossings on curves that are known, and the look-up of what it found."""

import dataclasses
import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import UnsupportedError, explain, flat_gemm
from pallas_kernels.core import device, dispatch, tuning
from pallas_kernels.flat_gemm import api, dataflow, routes, xla
from pallas_kernels.flat_gemm import config as config_lib
from pallas_kernels.flat_gemm.config import MatrixConfig, VectorConfig
from pallas_kernels.flat_gemm.routes import Crossings
from pallas_kernels.flat_gemm.shapes import MODELS, SHAPES, Shape

NEVER = routes.MOST_ROWS + 1


def search(a, b, c):
    """Crossings of three functions of M."""
    functions = {"A": a, "B": b, "C": c}
    curves = dataflow.profile(lambda route, M: functions[route](M))
    assert tuple(curves["A"]) == dataflow.ROWS == (1, 2, 3, 4, 8, 16, 32, 64, 128, 256)
    return dataflow.crossings(curves)


@pytest.mark.parametrize(
    ("a", "b", "c", "found"),
    [
        pytest.param(lambda M: M, lambda M: 3.5, lambda M: 100 / M, Crossings(4, 32), id="one after the other"),
        pytest.param(lambda M: M, lambda M: 2.5, lambda M: 99, Crossings(3, NEVER), id="3 is asked, too"),
        pytest.param(lambda M: 1, lambda M: 1, lambda M: 1, Crossings(NEVER, NEVER), id="a draw is no win"),
        pytest.param(lambda M: 1, lambda M: 2, lambda M: 3, Crossings(NEVER, NEVER), id="A alone"),
        pytest.param(lambda M: 3, lambda M: 2, lambda M: 1, Crossings(1, 1), id="C alone"),
        pytest.param(
            lambda M: 2,
            lambda M: 1 if M in (2, 16, 32) else 3,
            lambda M: 9,
            Crossings(16, NEVER),
            id="B once, then twice",
        ),
        pytest.param(
            lambda M: 5,
            lambda M: 4,
            lambda M: 1 if M in (8, 128, 256) else 9,
            Crossings(1, 128),
            id="C once, then twice",
        ),
        pytest.param(
            lambda M: 9, lambda M: 4, lambda M: 1 if M == 256 else 9, Crossings(1, 256), id="C beyond the cap as well"
        ),
        pytest.param(
            lambda M: 9, lambda M: 1 if M == 256 else 10, lambda M: 99, Crossings(NEVER, NEVER), id="B at the cap"
        ),
        pytest.param(
            lambda M: 1 if M <= 4 else math.inf, lambda M: 2, lambda M: 3, Crossings(8, NEVER), id="A refuses above 4"
        ),
        pytest.param(lambda M: math.inf, lambda M: math.inf, lambda M: 1, Crossings(NEVER, 1), id="kernels refuse"),
        pytest.param(lambda M: 10, lambda M: 2 if M >= 8 else 11, lambda M: 5, Crossings(8, 1), id="C from the start"),
    ],
)
def test_where_curves_cross(a, b, c, found):
    assert search(a, b, c) == found


def test_routes_of_crossings():
    found = Crossings(4, 32)
    assert [found.route(M) for M in (1, 3, 4, 31, 32, 257)] == ["A", "A", "B", "B", "C", "C"]
    # Where C wins from the start the better kernel is still known, for who names mosaic_gpu.
    assert [Crossings(8, 1).kernel(M) for M in (1, 8)] == ["A", "B"]
    with pytest.raises(ValueError, match="M1 must be an integer from 1 to 257, got 0"):
        Crossings(0, 5)


def test_what_two_numbers_lose_is_told():
    """C is faster at 8 alone: two numbers would send 8 to B, which takes 4 where 1 would do; measured times do not."""
    curves = dataflow.profile(lambda route, M: {"A": 5, "B": 4, "C": 1 if M == 8 else 9}[route])
    assert dataflow.loss(curves, dataflow.crossings(curves)) == 3
    assert "(alone they would lose 300.0%)" in next(dataflow.report("out", 64, 32, curves))
    measured = {"64,32": dataflow.entry(curves)}
    assert routes._parse(measured)[64, 32].route(8) == "C"
    assert [routes._parse(measured)[64, 32].route(M) for M in (1, 4, 5, 9, 256)] == ["B", "B", "C", "B", "B"]
    assert routes._parse(measured)[64, 32].kernel(8) == "B"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A user's cache, and no shipped tables."""
    monkeypatch.setenv("PALLAS_KERNELS_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(tuning, "_SHIPPED", tmp_path / "shipped")
    return tmp_path


def put(folder, entries, part="bfloat16,NK", known=device.H100):
    stored = {weight: {"M1": M1, "M2": M2, "us": {}} for weight, (M1, M2) in entries.items()}
    dataflow.store(folder / routes.table_name(known), part, stored)


def route(M, N, K, known=device.H100, dtype=jnp.bfloat16, transpose_w=True):
    x, w = jax.ShapeDtypeStruct((M, K), dtype), jax.ShapeDtypeStruct((N, K) if transpose_w else (K, N), dtype)
    return routes.choose(api.describe(x, w, transpose_w=transpose_w), known)


def test_without_a_table(cache):
    assert [route(M, 4096, 4096).name for M in (1, 2, 3, 128, 129)] == ["A", "A", "B", "B", "C"]
    assert [route(M, 4096, 4096, known=device.A100).name for M in (1, 7, 8, 64, 65)] == ["A", "A", "B", "B", "C"]
    assert [route(M, 4096, 4096, transpose_w=False).name for M in (1, 129)] == ["B", "C"]
    assert route(1, 4096, 4096, known=device.CPU).name == "C"
    assert route(1, 4096, 4096, known=device.TPU_V6E).implementations == ("xla",)


def test_the_nearest_weight_of_the_same_part(cache):
    put(cache / "user", {(4096, 4096): (2, 16), (4096, 16384): (4, 64)})
    put(cache / "user", {(4096, 4096): (3, 32)}, part="bfloat16,KN")
    assert route(3, 4096, 65536).why.endswith("not measured on this device")  # nothing within a factor of 2
    found = route(3, 4096, 7000)
    assert (found.name, found.why) == ("B", "route B: M=3, M1=2, M2=16, measured at N=4096 K=4096")
    assert route(3, 4096, 9000).name == "A"  # nearer to 16384, by ratios
    assert route(3, 4096, 4096, transpose_w=False).name == "B"
    assert route(17, 4096, 4096, transpose_w=False).name == "B"
    assert route(7, 4096, 4096, dtype=jnp.float16).why.endswith("not measured on this device")


def test_the_user_s_table_goes_before_the_shipped(cache):
    put(cache / "shipped", {(64, 64): (2, 16), (64, 512): (2, 16)})
    put(cache / "user", {(64, 64): (4, 32)})
    assert "M1=4, M2=32" in route(1, 64, 64).why
    assert "M1=2, M2=16" in route(1, 64, 512).why


@pytest.mark.parametrize(
    "stored", ["[1]", "no json", '{"bfloat16,NK": {"a,b": {}, "64,64": {"M1": 0, "M2": 3}, "0,1": 2}}']
)
def test_what_cannot_be_read_was_not_measured(cache, stored):
    file = cache / "user" / routes.table_name(device.H100)
    file.parent.mkdir(parents=True)
    file.write_text(stored)
    assert route(1, 64, 64).why.endswith("not measured on this device")


def test_auto_asks_in_the_order_of_the_table_and_explain_says_why(cache):
    put(cache / "user", {(12288, 4096): (2, 16)})
    with device.assume(device.H100):
        for M, name, asked in ((1, "A", ("mosaic_gpu", "xla")), (8, "B", ("mosaic_gpu", "xla")), (16, "C", ("xla",))):
            told = explain(flat_gemm, **SHAPES[f"llama2_7b_qkv_m{M}"].abstract(jnp.bfloat16))
            assert told[0].requested == asked
            assert f"(route {name}: M={M}, M1=2, M2=16, measured at N=12288 K=4096)" in str(told)


def test_what_a_refusal_says_to_try_is_what_auto_would_run(cache):
    """Where the table says C, "auto" does not ask the kernels at all."""
    put(cache / "user", {(12288, 4096): (2, 16)})
    with device.assume(device.H100), pytest.raises(UnsupportedError, match='would run "xla"'):
        explain(flat_gemm, **SHAPES["llama2_7b_qkv_m16"].abstract(jnp.bfloat16), implementation="mosaic_tpu")


def test_configurations_are_of_the_better_route(cache):
    put(cache / "user", {(12288, 4096): (2, 16)})
    for M, kind in ((1, VectorConfig), (2, MatrixConfig), (64, MatrixConfig)):
        call = api.describe(
            jax.ShapeDtypeStruct((M, 4096), jnp.bfloat16),
            jax.ShapeDtypeStruct((12288, 4096), jnp.bfloat16),
            transpose_w=True,
        )
        assert config_lib.kinds(call, device.H100, "mosaic_gpu")[0] is kind
        assert isinstance(config_lib.heuristic(call, device.H100, "mosaic_gpu"), kind)
        space = list(config_lib.search_space(call, device.H100, "mosaic_gpu"))
        assert len(set(space)) == len(space) > 1
        assert {type(config) for config in space} == {kind}


def test_a_tuned_configuration_of_the_other_route_is_a_miss(cache):
    put(cache / "user", {(12288, 4096): (2, 16)})
    with device.assume(device.H100):
        choice = explain(flat_gemm, **SHAPES["llama2_7b_qkv_m8"].abstract(jnp.bfloat16))[0]
    choice = dataclasses.replace(choice, implementation="mosaic_gpu")
    name = tuning.table_name(device.H100.kind, "flat_gemm", "mosaic_gpu")
    for tuned, found in ((MatrixConfig(256), MatrixConfig(256)), (VectorConfig(), MatrixConfig(64, num_splits=1))):
        stored = {tuning.key(choice.call, "mosaic_gpu"): dataclasses.asdict(tuned)}
        with tuning.use(tuning.TuningResult({name: stored})):
            assert tuning.resolve(choice, MatrixConfig, lambda *_: MatrixConfig(64)) == found


@pytest.fixture
def kernels(monkeypatch):
    """Kernels that XLA plays, up to 16 rows. Lists the configurations that ran."""
    ran = []

    def supports(call, known):
        return dispatch.Refusal("more than 16 rows") if call.sizes["M"] > 16 else None

    def forward(x, w, bias, residual, *, config, **options):
        ran.append((len(x), config))
        return xla.forward(x, w, bias, residual, **options)

    module = types.ModuleType("pallas_kernels.flat_gemm.mosaic_gpu")
    module.supports, module.forward = supports, forward
    monkeypatch.setitem(sys.modules, module.__name__, module)
    dispatch.load.cache_clear()
    yield ran
    dispatch.load.cache_clear()


def test_a_named_kernel_takes_the_better_route(cache, kernels):
    put(cache / "user", {(192, 256): (4, 1)}, part="float32,NK")
    for M, kind in ((1, VectorConfig), (4, MatrixConfig)):
        arguments = dataclasses.replace(SHAPES["plain_8"], M=M).make("float32", jax.random.key(0))
        with device.assume(device.H100):
            assert explain(flat_gemm, **arguments)[0].implementation == "xla"
            out = flat_gemm(**arguments, implementation="mosaic_gpu")
            assert type(kernels.pop()[1]) is kind
            other = MatrixConfig(256) if kind is VectorConfig else VectorConfig(16)
            flat_gemm(**arguments, implementation="mosaic_gpu", config=other)
            assert kernels.pop()[1] == other
        np.testing.assert_array_equal(out, flat_gemm(**arguments, implementation="xla"))


def test_the_timer_runs_each_route_with_its_own_configuration(cache, kernels):
    with device.assume(device.H100):
        timer = dataflow.time_routes(Shape(1, 2048, 2048), "float32", method="wall", budget=0)
        assert timer("B", 64) == math.inf
        for route, kind in (("A", VectorConfig), ("B", MatrixConfig)):
            assert 0 < timer(route, 4) < math.inf
            assert {(M, type(config)) for M, config in kernels} == {(4, kind)}
            kernels.clear()
        assert 0 < timer("C", 64) < math.inf
        assert kernels == []


def test_the_program_profiles_prints_and_stores(cache, capsys, monkeypatch):
    """With this device's own timer: there are no kernels for a CPU, so that C wins everywhere."""
    monkeypatch.setattr(dataflow, "ROWS", (1, 2, 256))
    file = cache / "out.json"
    argv = ["--weights=4096x1024", "--orientation=KN", "--dtype=float32", "--budget=0", f"--device-table={file}"]
    assert dataflow.main(argv) == 0
    out = capsys.readouterr().out
    assert "4096x1024 [N=4096, K=1024]  M1 = > 256  M2 = 1  (alone they would lose 0.0%)" in out
    stored = json.loads(file.read_text())["float32,KN"]
    assert set(stored) == {"4096,1024"}
    assert set(stored["4096,1024"]["us"]["C"]) == {str(M) for M in dataflow.ROWS}
    assert stored["4096,1024"]["us"]["A"] == {}
    assert list(cache.glob("*.tmp")) == []


def test_the_program_measures_the_weights_of_a_model(cache, capsys):
    def timers(shape, dtype, method, budget):
        return lambda route, M: {"A": M, "B": 3.5, "C": shape.N / M}[route] / 1e6

    assert dataflow.main(["--model=llama2_7b", "--dtype=bfloat16"], timers) == 0
    table = routes.table(device.current())["bfloat16,NK"]
    assert set(table) == set(MODELS["llama2_7b"].values())
    assert all(found == Crossings(4, NEVER) for found in table.values())
    entry = json.loads((cache / "user" / routes.table_name(device.current())).read_text())["bfloat16,NK"]["4096,4096"]
    assert entry["us"]["A"]["3"] == 3
    assert dataflow.crossings(dataflow.curves_of(entry)) == Crossings(4, NEVER)


def test_a_wrong_kernel_is_not_measured():
    arguments = SHAPES["plain_8"].make("float32", jax.random.key(0))
    x, w, right = arguments["x"], arguments["w"], flat_gemm(**arguments)
    dataflow._check(right, x, w, True, "right")
    with pytest.raises(AssertionError, match="route B, M=8"):
        dataflow._check(right * 1.01, x, w, True, "route B, M=8")


def test_weights_that_make_no_sense(capsys):
    with pytest.raises(SystemExit):
        dataflow.main(["--weights=4096"])
    assert "a weight is NxK, as 4096x11008, not 4096" in capsys.readouterr().err


SHIPPED = sorted(tuning._SHIPPED.glob("*/flat_gemm.dataflow.json"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.parent.name)
def test_shipped_tables_hold_what_their_curves_say(file):
    for part, weights in json.loads(file.read_text()).items():
        assert part in {routes.key(dtype, t) for dtype in ("bfloat16", "float16", "float32") for t in (True, False)}
        for weight, stored in weights.items():
            found = dataflow.crossings(dataflow.curves_of(stored))
            assert (stored["M1"], stored["M2"]) == (found.M1, found.M2), f"{part} {weight}"
