# SPDX-License-Identifier: Apache-2.0
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import explain, flash_attention, masks
from pallas_kernels.core import device, tolerance, tuning
from pallas_kernels.flash_attention import config as config_lib
from pallas_kernels.flash_attention.config import XlaConfig

X = jax.ShapeDtypeStruct((1, 100, 2, 16), jnp.float32)


@pytest.fixture
def choice(tmp_path, monkeypatch):
    """The xla choice of one call, with the user's cache in a folder of the test."""
    monkeypatch.setenv("PALLAS_KERNELS_CACHE", str(tmp_path))
    return explain(flash_attention, X, X, X, mask=masks.Causal())[0]


def entry(choice, config):
    name = tuning.table_name(choice.device.kind, "flash_attention", "xla")
    return tuning.TuningResult({name: {tuning.key(choice.call, "xla"): config}})


def resolve(choice, given=None):
    return tuning.resolve(choice, XlaConfig, config_lib.heuristic, given)


def test_the_first_place_that_has_one_wins(choice, tmp_path, monkeypatch):
    heuristic = config_lib.heuristic(choice.call, choice.device, "xla")
    assert resolve(choice) == heuristic
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(tuning, "_SHIPPED", shipped)
    entry(choice, {"block_q": 4, "block_k": 4}).save(shipped)
    assert resolve(choice) == XlaConfig(4, 4)
    entry(choice, {"block_q": 8, "block_k": 8}).save()
    assert resolve(choice) == XlaConfig(8, 8)
    with tuning.use(entry(choice, {"block_q": 16, "block_k": 16})):
        assert resolve(choice) == XlaConfig(16, 16)
        assert resolve(choice, XlaConfig(32, 32)) == XlaConfig(32, 32)


@pytest.mark.parametrize("stored", ['{"block_q": 8}', "[1, 2]", "not json", '{"block_q": -1, "block_k": 8}'])
def test_what_cannot_be_read_is_a_miss(choice, tmp_path, stored):
    name = tuning.table_name(choice.device.kind, "flash_attention", "xla")
    (tmp_path / name).parent.mkdir()
    text = stored if stored == "not json" else json.dumps({tuning.key(choice.call, "xla"): json.loads(stored)})
    (tmp_path / name).write_text(text)
    assert resolve(choice) == config_lib.heuristic(choice.call, choice.device, "xla")


def test_the_key_holds_everything_that_could_make_an_entry_wrong(choice):
    def key(*shape, dtype=jnp.float32, mask=None):
        x = jax.ShapeDtypeStruct(shape, dtype)
        return tuning.key(explain(flash_attention, x, x, x, mask=mask)[0].call, "xla")

    base = key(1, 100, 2, 16)
    assert base == key(1, 128, 2, 16)  # one bucket: the next power of two
    others = [
        key(1, 129, 2, 16),
        key(1, 100, 2, 16, dtype=jnp.bfloat16),
        key(1, 100, 2, 16, mask=masks.Causal()),
        tuning.key(choice.call.backward(), "xla"),
    ]
    assert len({base, *others}) == 5
    assert tuning.source_hash("flash_attention", "xla") in base


@pytest.mark.parametrize(
    ("op", "implementation", "some"),
    [
        ("quantized_matmul", "mosaic_gpu", {"mosaic_gpu", "sm90", "ring", "ptx", "lanes", "epilogue", "config", "mma"}),
        ("quantized_matmul", "mosaic_tpu", {"mosaic_tpu", "packing", "config", "tpu"}),
        ("flash_attention", "mosaic_gpu", {"sm90", "sm80", "tiles", "config", "mma"}),
        ("sparse_matmul", "mosaic_gpu", {"mosaic_gpu", "sm90", "ptx", "weights", "config", "inline"}),
    ],
)
def test_the_hash_is_of_all_that_makes_the_kernel(op, implementation, some):
    names = [file.stem for file in tuning.sources(op, implementation)]
    assert some <= set(names)
    assert "api" not in names


def test_results_merge_and_survive_a_round_trip(choice, tmp_path):
    a, b = entry(choice, {"block_q": 8, "block_k": 8}), entry(choice, {"block_q": 16, "block_k": 8})
    assert (a | b).tables == b.tables
    other = tuning.TuningResult({"tpu_v6e/flash_attention.xla.json": {"k": {"block_q": 1, "block_k": 1}}})
    (a | other).save()
    assert tuning.TuningResult.load().tables == (a | other).tables
    assert not list(tmp_path.rglob("*.tmp"))


def test_autotune_measures_checks_and_returns_one_entry(choice, monkeypatch):
    monkeypatch.setattr(config_lib, "search_space", lambda *_: [XlaConfig(50, 50), XlaConfig(100, 100)])
    x = jnp.ones(X.shape, X.dtype)
    result = tuning.autotune(flash_attention, x, x, x, mask=masks.Causal(), repeats=1)
    with tuning.use(result):
        assert resolve(choice) in (XlaConfig(50, 50), XlaConfig(100, 100))


def test_autotune_refuses_a_config_that_gives_wrong_numbers(choice, monkeypatch):
    monkeypatch.setattr(config_lib, "search_space", lambda *_: [XlaConfig(50, 50)])

    def always_wrong(actual, expected, naive, what):
        raise AssertionError(f"{what}: wrong")

    monkeypatch.setattr(tolerance, "assert_normal", always_wrong)
    x = jnp.ones(X.shape, X.dtype)
    with pytest.raises(AssertionError, match=r"flash_attention with XlaConfig\(block_q=50, block_k=50\): wrong"):
        tuning.autotune(flash_attention, x, x, x, repeats=1)


def test_tables_are_kept_by_device():
    assert tuning.table_name(device.H100.kind, "op", "xla") == "nvidia_h100_80gb_hbm3/op.xla.json"
