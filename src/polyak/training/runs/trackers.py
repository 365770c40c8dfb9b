"""Trackers: metrics also go to TensorBoard, Weights & Biases or trackio while a run goes on.

`metrics.jsonl` is the truth and is written first; a tracker gets the numbers of its `train`,
`validation`, `spike` and `skipped` rows under names such as `train/loss`, `train/rates/muon`,
`scalars/mu/attention/3` and `validation/loss`. No account is needed for any of them:

tensorboard  event files in the run's folder `tensorboard/`
wandb        the run's folder `wandb/`; where nobody is logged in, offline (`wandb sync` sends it
             later); WANDB_MODE and WANDB_PROJECT count as always
trackio      its local database; TRACKIO_DIR and TRACKIO_SPACE_ID count as always

A run that goes on from a checkpoint repeats the steps after it, and is the same run to each:

tensorboard  is told to forget what it had of them, and gets them anew
wandb        gets them anew; a server leaves out steps it has. Offline, each process leaves a
             folder of its own (`wandb sync` puts them together by the run's id), in which a
             repeated step stands again, with the same values on CPU. A killed process's folder
             may lack the last rows, which is why they are sent again
trackio      would show both, so it gets rows from where the log had got before; what a killed
             process logged in its last second may be missing there

A tracker that fails while a run goes on is left out from there on, with one line on standard
error. One that fails at the start of a new run stops it, as a wrong name does; at the start of a
resumed run it is left out like in the middle.
"""

from __future__ import annotations

import importlib.util
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from polyak.errors import MissingExtraError, RunError, unknown
from polyak.files import read_json, write_json
from polyak.training.runs.metrics import logged_until
from polyak.training.runs.tracker_kinds import Run, TensorBoard, Trackio, Wandb

_logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """What takes the rows of a run as they are logged."""

    def start(self, settings: Mapping[str, Any]) -> None:
        """The run begins or goes on; `settings` is all that defines it, as plain values."""

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl."""

    def finish(self, ok: bool) -> None:
        """The process ends its part of the run; `ok` is False when an error ends it."""


KNOWN: dict[str, Callable[[Run], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


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
