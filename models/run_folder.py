# SPDX-License-Identifier: Apache-2.0
"""The output folder of a training run: what is in it, and how a run continues from it.

    config.json       the settings that determine the result; a run with others may not write here
    checkpoints/12/   training state and data position after step 12 (Orbax)
    export/           the final model as a Hugging Face folder (models.checkpoint.save_checkpoint)
    loss.csv          one line a step, and one an evaluation
    loss_curve.png    drawn from loss.csv
    events.out...     TensorBoard

A checkpoint is written beside its final place and renamed when whole, so a process that dies while saving leaves the
one before. The other files replace their predecessors in the same way.
"""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter

from models.training import TrainState

COLUMNS = ("step", "loss", "gradient_norm", "learning_rate", "tokens_per_second", "eval_loss")


class RunFolderError(ValueError):
    """The folder cannot be used for this run; the message names the reason and the fix."""


class SaveError(RuntimeError):
    """A checkpoint could not be written; the message names the checkpoint that remains."""


class RunFolder:
    """An output folder, opened for one run.

    Opening it creates it, or checks that it holds the same run and removes what an interrupted save left behind.

    Attributes:
      path: the folder.
      latest_step: step of the newest whole checkpoint, or None.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], *, keep: int = 3, overwrite: bool = False):
        """Opens the folder.

        Args:
          path: created if missing.
          settings: JSON values that determine the run's result.
          keep: how many of the newest checkpoints stay.
          overwrite: remove another run's files first.

        Raises:
          RunFolderError: the folder holds another run, something that is not a run, or cannot be written.
        """
        if keep < 1:
            raise RunFolderError(f"keep must be at least 1, got {keep}")
        self.path = Path(path).absolute()
        self._claim(json.loads(json.dumps(settings)), overwrite)
        self._manager = ocp.CheckpointManager(
            self.path / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
        )
        self._rows: list[dict[str, float]] = []
        self._writer: SummaryWriter | None = None

    def _claim(self, settings: dict[str, Any], overwrite: bool) -> None:
        config = self.path / "config.json"
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{self.path} is a file; choose a new folder")
        if self.path.is_dir() and any(self.path.iterdir()) and not config.is_file():
            raise RunFolderError(f"{self.path} holds something that is not a training run; choose a new folder")
        if config.is_file():
            found = _read_config(config)
            differing = [name for name in (found | settings) if found.get(name) != settings.get(name)]
            if differing and not overwrite:
                name = differing[0]
                raise RunFolderError(
                    f"{self.path} holds another run: its {name} is {found.get(name)!r}, this one's is "
                    f"{settings.get(name)!r}; choose a new folder or pass --overwrite"
                )
            if overwrite:
                self._remove_run()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _replace_file(config, json.dumps(settings, indent=2) + "\n")
        except OSError as error:
            raise RunFolderError(f"{self.path} cannot be written: {error.strerror}") from error

    def _remove_run(self) -> None:
        """Removes what this class writes, and nothing else; config.json last, so that a rest is still a run."""
        for folder in ("checkpoints", "export"):
            shutil.rmtree(self.path / folder, ignore_errors=True)
        for file in (*self.path.glob("events.out.*"), *(self.path / name for name in ("loss.csv", "loss_curve.png"))):
            file.unlink(missing_ok=True)
        (self.path / "config.json").unlink()

    # --- Checkpoints -----------------------------------------------------------------------------------------

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def describe_latest(self) -> str:
        """For messages: where the newest whole checkpoint is."""
        if self.latest_step is None:
            return "no checkpoint had been saved"
        return f"the last good checkpoint is step {self.latest_step} in {self.path / 'checkpoints'}"

    def save(self, state: TrainState, data_position: dict[str, Any]) -> None:
        """Starts saving the state and the data iterator's position; returns as soon as the state has been copied.

        Raises:
          SaveError: this or the previous save failed; the checkpoint before is whole.
        """
        step = int(state.step)
        if step == self.latest_step:
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(_as_dict(state)), data=ocp.args.JsonSave(data_position))
        self._guard(lambda: self._manager.save(step, args=items))

    def wait(self) -> None:
        """Returns when the save in progress, if any, is whole on disk; SaveError if it failed."""
        self._guard(self._manager.wait_until_finished)

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # whatever the writer, its threads and the file system raise
            # Read again from the disk: the manager counts a save that it only started.
            self._manager.reload()
            text = " ".join(str(error).split())
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text or "ENOSPC" in text
            reason = "the disk is full" if full else f"{type(error).__name__}: {text[:300]}"
            raise SaveError(f"saving to {self.path} failed: {reason}; {self.describe_latest()}") from error

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Loads the newest checkpoint.

        Args:
          like: a state of the same structure, whose shapes, dtypes and shardings the result takes.

        Returns:
          (state, data position as passed to `save`).
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_dict(like))
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        restored = self._manager.restore(self.latest_step, args=items)
        return TrainState(**restored["state"]), restored["data"]

    # --- Records ---------------------------------------------------------------------------------------------

    def start_records(self, step: int) -> None:
        """Keeps the records up to `step` and continues after them."""
        file = self.path / "loss.csv"
        lines = file.read_text().splitlines() if file.is_file() else []
        # A process that was killed may have left half a line.
        rows = [row for row in csv.DictReader(lines) if None not in row and None not in row.values()]
        self._rows = [{name: float(v) for name, v in row.items() if v} for row in rows if int(row["step"]) <= step]
        _replace_file(file, "".join([",".join(COLUMNS) + "\n", *map(_csv_line, self._rows)]))
        # TensorBoard hides what an interrupted run logged beyond the point where this one continues.
        self._writer = SummaryWriter(str(self.path), purge_step=step + 1 if step else None)

    def record(self, **values: float) -> None:
        """Appends one line to loss.csv and to TensorBoard; names as in COLUMNS, `step` among them."""
        assert self._writer is not None, "start_records comes first"
        self._rows.append(values)
        with (self.path / "loss.csv").open("a") as file:
            file.write(_csv_line(values))
        for name, value in values.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(values["step"]))

    def draw(self, title: str = "") -> None:
        """Draws loss_curve.png from the records."""
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for name, style in (("loss", "-"), ("eval_loss", "o-")):
            points = [(row["step"], row[name]) for row in self._rows if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=name.replace("eval_loss", "evaluation"))
        axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", title=title)
        axes.grid(alpha=0.3)
        if self._rows:
            axes.legend()
        new = self.path / "loss_curve.new.png"
        figure.savefig(new, dpi=120)
        os.replace(new, self.path / "loss_curve.png")

    def close(self) -> None:
        """Finishes saves and records."""
        if self._writer is not None:
            self._writer.close()
        self._manager.close()


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "opt_state": state.opt_state, "step": state.step}


def _read_config(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{file} is not valid JSON: {error}; choose a new folder") from error


def _replace_file(file: Path, text: str) -> None:
    new = file.with_name(file.name + ".new")
    new.write_text(text)
    os.replace(new, file)


def _csv_line(row: dict[str, float]) -> str:
    # repr of a float reads back to the same bits.
    cells = (repr(int(row[c]) if c == "step" else float(row[c])) if c in row else "" for c in COLUMNS)
    return ",".join(cells) + "\n"
