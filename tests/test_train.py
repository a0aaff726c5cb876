"""train.py end to end: a run that is killed and continued equals one that never stopped; bad input loses nothing."""

import contextlib
import csv
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import train
from models.checkpoint import load_model
from models.run_folder import RunFolder, RunFolderError, SaveError
from models.training import TrainState

ROOT = Path(__file__).parents[1]
GENESIS = str(ROOT / "data" / "genesis.txt")
STEPS = 24
FLAGS = (
    "--preset=tiny",
    f"--data={GENESIS}",
    "--batch_size=2",
    "--seq_len=32",
    f"--steps={STEPS}",
    "--eval_every=12",
    "--save_every=6",
    "--mesh=data:1",
)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory):
    """All runs here compile the same few programs: a cache on disk shares them, with the subprocesses too."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    compilation_cache.reset_cache()
    for name, value in settings.items():
        jax.config.update(name, value)
    yield {name.upper(): str(value) for name, value in settings.items()}
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def run(out: Path, *flags: str) -> int:
    return train.main(["train.py", *FLAGS, f"--out={out}", *flags])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert run(out) == 0
    return out


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "loss.csv").open() as file:
        return list(csv.DictReader(file))


def same_bits(out: Path, other: Path) -> bool:
    """Whether two runs ended with the same parameters and lost the same on the way."""
    timeless = [[{**row, "tokens_per_second": ""} for row in rows(path)] for path in (out, other)]
    exports = [(path / "export" / "model.safetensors").read_bytes() for path in (out, other)]
    return exports[0] == exports[1] and timeless[0] == timeless[1]


# --- A whole run ---------------------------------------------------------------------------------------------


def test_what_a_run_leaves_behind(uninterrupted, capsys):
    assert sorted(p.name for p in (uninterrupted / "checkpoints").iterdir()) == ["12", "18", "24"]  # --keep=3
    assert (uninterrupted / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list(uninterrupted.glob("events.out.tfevents.*"))
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config["model"]["d_model"] == 128
    assert config["data_fingerprint"]
    steps = [row for row in rows(uninterrupted) if row["loss"]]
    assert [int(row["step"]) for row in steps] == list(range(1, STEPS + 1))
    assert float(steps[-1]["loss"]) < float(steps[0]["loss"])
    assert [int(row["step"]) for row in rows(uninterrupted) if row["eval_loss"]] == [12, 24]
    model, tokenizer = load_model(uninterrupted / "export")
    logits = model(np.array([tokenizer.encode("In the beginning")]))
    assert np.isfinite(logits).all()


def test_a_finished_run_run_again_changes_nothing(uninterrupted, capsys):
    before = (uninterrupted / "loss.csv").read_bytes(), (uninterrupted / "export" / "model.safetensors").read_bytes()
    assert run(uninterrupted) == 0
    assert before == (
        (uninterrupted / "loss.csv").read_bytes(),
        (uninterrupted / "export" / "model.safetensors").read_bytes(),
    )
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["steps"] == STEPS
    assert summary["interrupted"] is False
    assert summary["mfu"] is None  # no peak is known for a CPU


# --- Interrupted and continued -------------------------------------------------------------------------------


def start(out: Path, environment: dict[str, str], program: str = "") -> subprocess.Popen:
    """Starts train.py in a process of its own, after the lines of `program`."""
    program = f"import sys, train\n{program}\nsys.exit(train.main(sys.argv))"
    return subprocess.Popen(
        [sys.executable, "-c", program, *FLAGS, f"--out={out}"],
        cwd=ROOT,
        env=os.environ | environment | {"JAX_NUM_CPU_DEVICES": str(jax.device_count()), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_kill_at_a_random_step_then_resume(uninterrupted, tmp_path, compiled_programs):
    step = random.SystemRandom().randint(1, STEPS - 2)
    # Steps take milliseconds: slowed down, so that the signal from outside arrives near the step meant.
    slow = "import time; add = train.Reporter.add\ntrain.Reporter.add = lambda *a: (time.sleep(0.1), add(*a))"
    process = start(tmp_path / "run", compiled_programs, slow)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if len(rows(tmp_path / "run")) >= step:
                break
        time.sleep(0.01)
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    assert not (tmp_path / "run" / "export").exists()
    assert run(tmp_path / "run") == 0
    assert same_bits(tmp_path / "run", uninterrupted), f"killed after step {step}"


def test_kill_in_the_middle_of_a_save_then_resume(uninterrupted, tmp_path, compiled_programs):
    # Dies when the arrays of the second checkpoint (step 12) are on disk but it is not yet committed.
    die = """
import os, signal
from orbax.checkpoint._src.path import atomicity
commit = atomicity.AtomicRenameTemporaryPath.finalize
async def finalize(self, *args, **kwargs):
    if self.get_final().name == "12":
        os.kill(os.getpid(), signal.SIGKILL)
    return await commit(self, *args, **kwargs)
atomicity.AtomicRenameTemporaryPath.finalize = finalize
"""
    process = start(tmp_path / "run", compiled_programs, die)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert "6" in left
    assert "12" not in left
    assert any(name.startswith("12.") for name in left), left  # the half-written one
    assert run(tmp_path / "run") == 0
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"12", "18", "24"}
    assert same_bits(tmp_path / "run", uninterrupted)


def test_sigterm_saves_and_exits_0(uninterrupted, tmp_path, monkeypatch, capsys):
    add = train.Reporter.add

    def add_and_signal(self, step, metrics):
        add(self, step, metrics)
        if step == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(train.Reporter, "add", add_and_signal)
        assert run(tmp_path / "run") == 0
    assert signal.getsignal(signal.SIGTERM) is before
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["interrupted"] is True
    assert summary["steps"] == 9
    assert (tmp_path / "run" / "checkpoints" / "9").is_dir()
    assert not (tmp_path / "run" / "export").exists()
    assert run(tmp_path / "run") == 0
    assert same_bits(tmp_path / "run", uninterrupted)


# --- Trouble on the way --------------------------------------------------------------------------------------


def test_loss_that_is_not_finite_stops(tmp_path, monkeypatch, capsys):
    next_batch = train.Run.next_batch

    def poisoned(self):
        batch = next_batch(self)
        if self.data.get_state()["next_index"] == 9:
            batch["weights"] = batch["weights"] * np.nan
        return batch

    monkeypatch.setattr(train.Run, "next_batch", poisoned)
    assert run(tmp_path / "run") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert error == (
        f"train.py: error: step 9: the loss is nan and the gradient norm nan; the last good checkpoint is step 6 in "
        f"{checkpoints}. Lower --learning_rate or look at the data."
    )
    assert [path.name for path in checkpoints.iterdir()] == ["6"]


def small_state(seed: int) -> TrainState:
    generator = np.random.default_rng(seed)
    params = {"x": jax.numpy.asarray(generator.normal(size=(256, 256)), jax.numpy.float32)}
    return TrainState(params, (), jax.numpy.int32(seed))


def save_and_wait(folder: RunFolder, step: int) -> None:
    folder.save(small_state(step), {"next_index": step})
    folder.wait()


# Orbax gives up at the first array that cannot be written; TensorStore then reports the others to nobody.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_full_disk_keeps_the_previous_checkpoint(tmp_path):
    folder = RunFolder(tmp_path / "run", {})
    save_and_wait(folder, 1)
    # The kernel refuses to let a file grow beyond this, as a full disk would, to Orbax's C++ threads as well.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(SaveError) as error:
            save_and_wait(folder, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"the last good checkpoint is step 1 in {tmp_path / 'run' / 'checkpoints'}" in str(error.value)
    with contextlib.suppress(SaveError):
        folder.close()

    folder = RunFolder(tmp_path / "run", {})
    assert folder.latest_step == 1
    restored, position = folder.restore(small_state(0))
    assert np.array_equal(restored.params["x"], small_state(1).params["x"])
    assert position == {"next_index": 1}
    save_and_wait(folder, 2)  # the disk has room again
    assert folder.latest_step == 2
    folder.close()


def test_no_space_left_is_said_plainly(tmp_path, monkeypatch, capsys):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
    assert run(tmp_path / "run") == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"train.py: error: saving to {tmp_path / 'run'} failed: the disk is full; no checkpoint had been saved"
    )


# --- The folder ----------------------------------------------------------------------------------------------


def test_another_runs_folder_is_refused(tmp_path):
    RunFolder(tmp_path / "run", {"a": 1, "b": [1, 2]}).close()
    RunFolder(tmp_path / "run", {"a": 1, "b": (1, 2)}).close()
    with pytest.raises(RunFolderError, match=r"its b is \[1, 2\], this one's is 4; choose a new folder or pass"):
        RunFolder(tmp_path / "run", {"a": 1, "b": 4})


def test_overwrite_removes_the_run_and_nothing_else(tmp_path):
    folder = RunFolder(tmp_path, {"a": 1})
    folder.start_records(0)
    folder.record(step=1, loss=2.0)
    folder.draw()
    folder.save(small_state(1), {})
    folder.close()
    (tmp_path / "notes.txt").write_text("mine")
    folder = RunFolder(tmp_path, {"a": 2}, overwrite=True)
    assert folder.latest_step is None
    folder.close()
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "checkpoints", "notes.txt"}


def test_half_a_line_of_records_is_dropped(tmp_path):
    folder = RunFolder(tmp_path, {})
    (tmp_path / "loss.csv").write_text(
        "step,loss,gradient_norm,learning_rate,tokens_per_second,eval_loss\n1,2.5,1.0,0.1,9.0,\n2,2."
    )
    folder.start_records(5)
    folder.record(step=6, loss=0.1)
    folder.close()
    assert [row["step"] for row in rows(tmp_path)] == ["1", "6"]


# --- Bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset=tinny"], "unknown preset 'tinny'; did you mean 'tiny'"),
        (["--preset=tiny", "--checkpoint=smollm2"], "pass one of them"),
        (["--checkpoint=/nowhere"], "/nowhere: no such folder"),
        (["--data=/nowhere.txt"], "/nowhere.txt: no such file or folder"),
        (["--mesh=data:3"], "mesh data:3 needs 3 devices, which does not divide the 8 present; nearest that do: 2"),
        (["--mesh=model:2"], "mesh axis 'model' is not used by train.py"),
        (["--mesh=data:8", "--batch_size=12"], "batch_size=12 must be a multiple of accumulate * data = 1 * 8 = 8"),
        (["--accumulate=3"], "batch_size=2 must be a multiple of accumulate * data = 3 * 1 = 3; nearest: 3"),
        (["--steps=0"], "steps must be at least 1, got 0"),
        (["--warmup=24"], "warmup must be at least 0 and below the 24 steps, got 24"),
        (["--learning_rate=nan"], "learning_rate must be at least 0 and finite, got nan"),
        (["--seq_len=4096"], "seq_len=4096 exceeds the model's 2048 positions"),
        (["--remat=everything"], "everything"),
        (["--optimizer=sgd"], "value should be one of <adamw|lamb>"),
        (["--eval_fraction=1.5"], "eval_fraction must be in [0, 1), got 1.5"),
        (["--learning_rat=1"], "Unknown command line flag 'learning_rat'. Did you mean: learning_rate"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)  # fmt: skip
def test_bad_input(tmp_path, capsys, flags, message):
    if flags[0].startswith("--checkpoint"):
        flags = ["--preset=", *flags]
    assert run(tmp_path / "run", *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: error: ")
    assert message in error
    assert not (tmp_path / "run" / "checkpoints" / "1").exists()


def test_missing_out(capsys):
    assert train.main(["train.py"]) == 2
    assert "--out" in capsys.readouterr().err


def test_a_folder_of_another_run_or_of_something_else(uninterrupted, tmp_path, capsys):
    assert run(uninterrupted, "--batch_size=4") == 2
    assert "holds another run: its batch_size is 2, this one's is 4; choose a new folder or pass --overwrite" in (
        capsys.readouterr().err
    )
    other = tmp_path / "genesis.txt"
    other.write_text("In the beginning\n" * 3000)
    assert run(uninterrupted, f"--data={other}") == 2
    assert "its data is " in capsys.readouterr().err
    assert run(tmp_path) == 2
    assert f"{tmp_path} holds something that is not a training run; choose a new folder" in capsys.readouterr().err
    assert run(other) == 2
    assert "is a file; choose a new folder" in capsys.readouterr().err


def test_help(capsys):
    assert train.main(["train.py", "--help"]) == 0
    assert "--batch_size" in capsys.readouterr().out


def test_a_vision_transformer_by_stages(tmp_path, capsys):
    """Each from the folder of the one before; the last writes integers."""

    def stage(name: str, *flags: str) -> int:
        return train.main(["train.py", "--task=vit", f"--stage={name}", f"--out={tmp_path / name}", *flags])

    assert stage("dense", "--steps=1", "--batch_size=4", "--test_per_class=10", "--labels_per_class=5") == 0
    assert stage("prune", f"--start={tmp_path / 'dense'}", "--steps=0", "--test_per_class=10") == 0
    assert stage("quantize", f"--start={tmp_path / 'prune'}", "--steps=0", "--test_per_class=10") == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    files = list((tmp_path / "quantize" / "export").iterdir())
    assert summary["bytes"] == sum(file.stat().st_size for file in files)
    assert summary["ratio"] > 5
    assert len(summary["accuracy"]) == 1
    # What is there stays there.
    assert stage("prune", f"--start={tmp_path / 'dense'}", "--steps=0") == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_task_in_two_words_trains_no_language_model(tmp_path, capsys):
    assert train.main(["train.py", "--task", "vit", f"--out={tmp_path / 'run'}"]) == 2
    assert "--task=vit is one word" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stage=prune"], "goes on from a run"),
        (["--stage=quantize", "--start=nowhere"], "nowhere: holds no run of train.py --task=vit"),
        (["--hard=-1"], "hard must not be negative, got -1.0"),
        (["--seeds=0"], "seeds must be at least 1, got 0"),
        (["--labels_per_class=1000"], "per_class must be from 1 to 399"),
    ],
)
def test_bad_flags_of_vision_transformers_are_named(flags, message, tmp_path, capsys):
    assert train.main(["train.py", "--task=vit", f"--out={tmp_path / 'run'}", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: ")
    assert message in error
    assert not (tmp_path / "run").exists()
