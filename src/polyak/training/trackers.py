"""Trackers: metrics also go to TensorBoard, Weights & Biases or trackio while a run goes on.

`metrics.jsonl` is the truth and is written first; a tracker gets the numbers of its `train`,
`validation`, `spike` and `skipped` rows under names such as `train/loss`, `train/rates/muon`,
`scalars/mu/attention/3` and `validation/loss`. No account is needed for any of them:

tensorboard  event files in the run's folder `tensorboard/`
wandb        the run's folder `wandb/`; where nobody is logged in, offline (`wandb sync` sends it
             later); WANDB_MODE and WANDB_PROJECT count as always
trackio      its local database; TRACKIO_DIR and TRACKIO_SPACE_ID count as always

A run that goes on from a checkpoint repeats the steps after it. TensorBoard is told to forget
what it had of them and gets them anew. The others cannot forget: they keep what they had, under
the same run, and get rows from where the log had got before; the repeated ones are left out. A
killed process may leave a tracker without the last rows it was sent.

A tracker that fails while a run goes on is left out from there on, with one line on standard
error. One that fails at the start of a new run stops it, as a wrong name does; at the start of a
resumed run it is left out like in the middle.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import logging
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from polyak.errors import MissingExtraError, RunError, unknown
from polyak.files import read_json, write_json
from polyak.training.metrics import logged_until

PROJECT = "polyak"
_logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """What takes the rows of a run as they are logged."""

    def start(self, settings: Mapping[str, Any]) -> None:
        """The run begins or goes on; `settings` is all that defines it, as plain values."""

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl."""

    def finish(self, ok: bool) -> None:
        """The process ends its part of the run; `ok` is False when an error ends it."""


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
        """Send a row's numbers, unless their step was sent before."""
        if row["step"] > self.run.sent and (values := numbers(row)):
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


KNOWN: dict[str, Callable[[Run], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    """Keep what a library prints about itself out of the training's output."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


class Trackers:
    """Several trackers as one, none of which can stop a run by failing."""

    def __init__(self, parts: Mapping[str, Tracker], *, resumed: bool = False) -> None:
        self._parts = dict(parts)
        self._resumed = resumed

    def start(self, settings: Mapping[str, Any]) -> None:
        """Start all of them.

        Raises:
            RunError: one fails, and the run is new.
        """
        for name, part in list(self._parts.items()):
            try:
                part.start(settings)
            except Exception as error:
                if not self._resumed:
                    self.finish(False)
                    raise RunError(
                        f"tracker {name} does not start: {_said(error)}; "
                        "mend it, or leave the tracker out"
                    ) from error
                self._leave_out(name, "at the start", error)

    def log(self, row: Mapping[str, Any]) -> None:
        """Pass a row on; one that fails gets no more of them."""
        for name, part in list(self._parts.items()):
            try:
                part.log(row)
            except Exception as error:
                self._leave_out(name, f"at step {row.get('step')}", error)

    def finish(self, ok: bool) -> None:
        """Finish all of them; those that fail say so and hold up none of the others."""
        for name, part in list(self._parts.items()):
            try:
                part.finish(ok)
            except Exception as error:
                self._leave_out(name, "at the end", error)
        self._parts.clear()

    def _leave_out(self, name: str, when: str, error: Exception) -> None:
        del self._parts[name]
        _logger.warning(
            "tracker %s failed %s (%s) and is left out; metrics.jsonl goes on",
            name,
            when,
            _said(error),
        )


def _said(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def check_trackers(names: Sequence[str]) -> None:
    """See that trackers can be opened, before anything else is begun. Imports none of them.

    Raises:
        UnknownNameError: a name is not a tracker's; the nearest is offered.
        MissingExtraError: its package is not installed.
    """
    for name in names:
        if name not in KNOWN:
            raise unknown("tracker", name, KNOWN)
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(
                f"tracker {name!r} needs the package {name}: pip install 'polyak[tracking]'"
            )


def open_trackers(
    names: Sequence[str], folder: Path, run_name: str, settings: Mapping[str, Any]
) -> Tracker:
    """Start trackers for a run, or go on with them.

    Where the run stands is read from `metrics.jsonl` in its folder, after `keep_until`; the id
    under which trackers know the run is kept in `trackers.json` beside it.

    Args:
        names: of `KNOWN`; none gives a tracker that does nothing.
        folder: the run's, which exists.
        run_name: shown by the trackers.
        settings: all that defines the run, as plain values.

    Returns:
        One tracker for all, already started.

    Raises:
        UnknownNameError: a name is not a tracker's; the nearest is offered.
        MissingExtraError: its package is not installed.
        RunError: a tracker fails to start a new run, or the folder cannot be written.
    """
    check_trackers(names)
    opened = Trackers({})
    if names:
        last, sent = logged_until(folder / "metrics.jsonl")
        run = Run(folder, run_name, _id(folder, new=not sent), last, sent)
        opened = Trackers({name: KNOWN[name](run) for name in names}, resumed=sent > 0)
    opened.start(settings)
    return opened


def _id(folder: Path, *, new: bool) -> str:
    """The run's id: read where the run goes on, else drawn and written."""
    path = folder / "trackers.json"
    if path.exists() and not new:
        found = read_json(path)
        if isinstance(found, dict) and isinstance(found.get("id"), str):
            return str(found["id"])
        raise RunError(f"{path} holds no id; remove it, and trackers begin a new run")
    identity = secrets.token_hex(4)
    write_json(path, {"id": identity})
    return identity


SENT = ("train", "validation", "spike", "skipped")


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
