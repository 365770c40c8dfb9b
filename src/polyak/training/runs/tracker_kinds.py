"""TensorBoard, Weights & Biases and trackio, each as a `polyak.training.runs.trackers.Tracker`.

Their packages are imported when a tracker starts.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = "polyak"
SENT = ("train", "validation", "spike", "skipped")


@dataclass(frozen=True)
class Run:
    """Which run a tracker follows.

    Attributes:
        folder: the run's.
        name: shown by the tracker.
        id: the same each time the run goes on, another for a run that begins anew.
        last: last step in the log; further rows are of later steps.
        sent: last step the log ever held, before the run went back to a checkpoint.
    """

    folder: Path
    name: str
    id: str
    last: int
    sent: int


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row under the names trackers show; {} for other kinds of rows.

    Scalars are taken from `train` rows only, where they stand more often.
    """
    kind = row["kind"]
    if kind not in SENT:
        return {}
    found: dict[str, float] = {}
    for key, value in row.items():
        if key == "scalars":
            if kind == "train":
                _flatten(value, "scalars", found)
        elif key not in ("kind", "step", "nonfinite"):
            _flatten(value, f"{kind}/{key}", found)
    return found


def _flatten(value: Any, name: str, found: dict[str, float]) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _flatten(inner, f"{name}/{key}", found)
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            _flatten(inner, f"{name}/{place}", found)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        found[name] = value


class TensorBoard:
    """Event files in `tensorboard/`, written by `torch.utils.tensorboard`."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def start(self, settings: Mapping[str, Any]) -> None:
        """Open a new event file, which hides what older ones hold of later steps."""
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = self.run.folder / "tensorboard"
        again = folder.exists()
        self._writer = SummaryWriter(folder, purge_step=self.run.last + 1 if again else None)
        text = json.dumps(settings, indent=2, default=str)
        self._writer.add_text("settings", f"```json\n{text}\n```", self.run.last)

    def log(self, row: Mapping[str, Any]) -> None:
        """Add a row's numbers and flush them."""
        for name, value in numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def finish(self, ok: bool) -> None:
        """Close the event file."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; offline where nobody is logged in."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def start(self, settings: Mapping[str, Any]) -> None:
        """Begin the run, or go on with it under its id."""
        wandb: Any = importlib.import_module("wandb")
        mode = os.environ.get("WANDB_MODE")
        if mode is None:  # asks nobody and no server
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self.run.name,
            id=self.run.id,
            resume="allow",
            dir=str(self.run.folder),
            mode=mode,
            config=dict(settings),
            settings=wandb.Settings(
                console="off", silent=True, save_code=False, disable_git=True, disable_code=True
            ),
        )

    def log(self, row: Mapping[str, Any]) -> None:
        """Send a row's numbers."""
        if values := numbers(row):
            self._run.log(values, step=row["step"])

    def finish(self, ok: bool) -> None:
        """End the run; it shows as failed unless `ok`."""
        self._run.finish(exit_code=0 if ok else 1)


class Trackio:
    """A run of trackio, in its local database unless TRACKIO_SPACE_ID says otherwise."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def start(self, settings: Mapping[str, Any]) -> None:
        """Begin the run, or go on with it: runs of one name are one run to trackio."""
        self._trackio: Any = importlib.import_module("trackio")
        with _no_output():
            self._trackio.init(
                project=PROJECT,
                name=f"{self.run.name}-{self.run.id}",
                config=dict(settings),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, row: Mapping[str, Any]) -> None:
        """Send a row's numbers, unless their step was sent before."""
        if row["step"] > self.run.sent and (values := numbers(row)):
            self._trackio.log(values, step=row["step"])

    def finish(self, ok: bool) -> None:
        """Wait until everything is written."""
        with _no_output():
            self._trackio.finish()


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    """Keep what a library prints about itself out of the training's output."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
