"""Trackers: what they are sent, by their own readers; that none of them can stop a run."""

from __future__ import annotations

import json
import logging
import math
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import environment

from polyak.errors import MissingExtraError, RunError, UnknownNameError
from polyak.training.runs import trackers
from polyak.training.runs.journal import Journal
from polyak.training.runs.metrics import keep_until
from polyak.training.runs.tracker_kinds import numbers
from polyak.training.runs.trackers import Trackers, check_trackers, open_trackers

SETTINGS = {"model": {"rule": "nesterov"}, "training": {"steps": 60, "adam_betas": [0.9, 0.95]}}


def row(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": 10 * step,
        "loss": 1 / step,
        "rates": {"muon": 0.02},
        "scalars": {"mu": {"attention": [0.25, 0.5]}},
    }


def stretch(folder: Path, name: str, first: int, last: int) -> None:
    """One process's part of a run: rows every ten steps, and a validation at the last."""
    tracker = open_trackers([name], folder, "nesterov-seed0", SETTINGS)
    with Journal(folder / "metrics.jsonl", tracker) as log:
        for step in range(first, last + 1, 10):
            log.write("train", **row(step))
        log.write("validation", step=last, loss=2.5, scalars={"mu": {"attention": [9.0]}})
        log.write("checkpoint", step=last, took=0.1)


def resumed_run(folder: Path, name: str) -> None:
    """60 steps; the process of the first 40 ends after a checkpoint at 20, a second one at 30."""
    folder.mkdir(exist_ok=True)
    stretch(folder, name, 10, 40)
    keep_until(folder / "metrics.jsonl", 20)
    stretch(folder, name, 30, 30)
    keep_until(folder / "metrics.jsonl", 20)
    stretch(folder, name, 30, 60)


def tensorboard_values(folder: Path) -> dict[str, list[tuple[int, float]]]:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = module.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {
        name: [(event.step, event.value) for event in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }


def test_tensorboard_shows_each_step_once_though_the_run_was_resumed_twice(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    resumed_run(tmp_path, "tensorboard")
    found = tensorboard_values(tmp_path)
    steps = [10, 20, 30, 40, 50, 60]
    assert found["train/loss"] == [(step, pytest.approx(1 / step)) for step in steps]
    assert [step for step, _ in found["scalars/mu/attention/1"]] == steps
    assert found["scalars/mu/attention/1"][0][1] == 0.5
    assert found["train/rates/muon"][0] == (10, pytest.approx(0.02))
    assert found["validation/loss"] == [(60, 2.5)]


def test_a_run_begun_anew_in_a_folder_hides_the_old_one_from_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    stretch(tmp_path, "tensorboard", 10, 40)
    (tmp_path / "metrics.jsonl").unlink()
    stretch(tmp_path, "tensorboard", 10, 20)
    assert [step for step, _ in tensorboard_values(tmp_path)["train/loss"]] == [10, 20]


def run_apart(program: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, whose home is empty: trackers find no account."""
    return subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        env=environment(
            folder, HOME=str(folder), PYTHONPATH=str(Path(__file__).parent), **variables
        ),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


STRETCHES = """
import sys; sys.path.insert(0, {root!r}); sys.path.insert(0, {tests!r})
from pathlib import Path
from test_trackers import resumed_run
resumed_run(Path(sys.argv[1]) / "run", {name!r})
"""


def stretches(name: str) -> str:
    tests = Path(__file__).parents[2]
    return STRETCHES.format(root=str(tests.parent), tests=str(tests), name=name)


def wandb_rows(path: Path) -> list[dict[str, float]]:
    """History rows of an offline file: records in LevelDB's log format, after 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, whole, rows = path.read_bytes(), 7, b"", []
    while at < len(content):
        left = -at % 32_768
        if left < 7 and left:  # no record begins in the last bytes of a block
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
    return rows


def test_wandb_offline_gets_one_run_in_order_and_without_a_gap(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    said = run_apart(stretches("wandb"), tmp_path)
    assert said.stdout == ""
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 3  # one per process
    identity = json.loads((tmp_path / "run" / "trackers.json").read_text())["id"]
    assert {path.name for path in files} == {f"run-{identity}.wandb"}
    parts = [[row for row in wandb_rows(path) if "train/loss" in row] for path in files]
    # what a process sent before it was stopped, and what the next one sent after the checkpoint
    assert [[row["_step"] for row in part] for part in parts] == [
        [10, 20, 30, 40],
        [30],
        [30, 40, 50, 60],
    ]
    assert all(
        row["train/loss"] == pytest.approx(1 / row["_step"]) for part in parts for row in part
    )


def test_trackio_gets_one_run_with_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    said = run_apart(stretches("trackio"), tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    assert said.stdout == ""
    with sqlite3.connect(tmp_path / "trackio" / "polyak.db") as base:
        found = base.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert len({name for name, _, _ in found}) == 1
    steps = [step for _, step, text in found if "train/loss" in json.loads(text)]
    assert sorted(steps) == [10, 20, 30, 40, 50, 60]


class Failing:
    """A tracker that fails at what it is told to."""

    def __init__(self, at: str) -> None:
        self.at = at
        self.seen: list[str] = []

    def _do(self, what: str) -> None:
        self.seen.append(what)
        if what == self.at:
            raise ConnectionError("the network\nis gone")

    def start(self, settings: Mapping[str, Any]) -> None:
        self._do("start")

    def log(self, row: Mapping[str, Any]) -> None:
        self._do("log")

    def finish(self, ok: bool) -> None:
        self._do("finish")


@pytest.mark.parametrize(("at", "when"), [("log", "at step 3"), ("finish", "at the end")])
def test_a_failing_tracker_says_so_once_and_the_run_goes_on(
    at: str, when: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failing, healthy = Failing(at), Failing("never")
    both = Trackers({"first": failing, "second": healthy})
    both.start({})
    with caplog.at_level(logging.WARNING), Journal(tmp_path / "metrics.jsonl", both) as log:
        for step in (3, 4, 5):
            log.write("train", step=step, loss=1.0)
    assert healthy.seen == ["start", "log", "log", "log", "finish"]
    assert failing.seen.count(at) == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"tracker first failed {when} (ConnectionError: the network is gone) and is left out; "
        "metrics.jsonl goes on"
    ]


def test_the_warning_is_one_line_on_standard_error(tmp_path: Path) -> None:
    program = (
        "from polyak.training.runs.trackers import Trackers\n"
        "class Broken:\n"
        "    def start(self, settings): pass\n"
        "    def log(self, row): raise OSError('gone')\n"
        "    def finish(self, ok): pass\n"
        "all = Trackers({'mine': Broken()}); all.start({})\n"
        "all.log({'kind': 'train', 'step': 1}); all.log({'kind': 'train', 'step': 2})\n"
    )
    said = run_apart(program, tmp_path)
    assert said.stderr.count("\n") == 1
    assert said.stderr.startswith("tracker mine failed at step 1 (OSError: gone)")


def test_a_tracker_that_does_not_start_stops_a_new_run_and_no_resumed_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    healthy = Failing("never")
    with pytest.raises(RunError, match="tracker bad does not start: ConnectionError"):
        Trackers({"good": healthy, "bad": Failing("start")}).start({})
    assert healthy.seen == ["start", "finish"]
    going_on = Trackers(
        {"bad": Failing("start"), "good": (other := Failing("never"))}, resumed=True
    )
    with caplog.at_level(logging.WARNING):
        going_on.start({})
    going_on.log({"kind": "train", "step": 1})
    assert other.seen == ["start", "log"]
    assert len(caplog.records) == 1


def test_a_name_that_is_none_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown tracker 'tensorbord'.*'tensorboard'"):
        open_trackers(["tensorbord"], tmp_path, "x", {})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_one_line_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(trackers.KNOWN, "no_such_package", Failing)  # type: ignore[arg-type]
    with pytest.raises(MissingExtraError, match=r"pip install 'polyak\[tracking\]'") as caught:
        check_trackers(["no_such_package"])
    assert "\n" not in str(caught.value)


def test_no_trackers_leave_nothing_behind(tmp_path: Path) -> None:
    nothing = open_trackers([], tmp_path, "x", SETTINGS)
    nothing.log({"kind": "train", "step": 1})
    nothing.finish(True)
    assert list(tmp_path.iterdir()) == []


def test_the_id_stays_while_a_run_goes_on_and_changes_when_it_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids: list[str] = []

    def make(run: trackers.Run) -> Failing:
        ids.append(run.id)
        return Failing("never")

    monkeypatch.setitem(trackers.KNOWN, "json", make)
    stretch(tmp_path, "json", 10, 20)
    stretch(tmp_path, "json", 30, 40)
    (tmp_path / "metrics.jsonl").unlink()
    stretch(tmp_path, "json", 10, 20)
    assert ids[0] == ids[1] != ids[2]


def test_only_finite_numbers_of_the_rows_that_have_them_are_sent() -> None:
    sent = {"kind": "train", **row(4), "gradient_norm": math.inf, "took": None}
    assert numbers(sent) == {
        "train/tokens": 40,
        "train/loss": 0.25,
        "train/rates/muon": 0.02,
        "scalars/mu/attention/0": 0.25,
        "scalars/mu/attention/1": 0.5,
    }
    assert numbers({"kind": "resume", "step": 4, "processes": 2}) == {}
    assert numbers(
        {"kind": "validation", "step": 4, "loss": 2.0, "scalars": {"a": {"b": [1.0]}}}
    ) == {"validation/loss": 2.0}


def test_importing_the_module_imports_neither_torch_nor_a_tracker(tmp_path: Path) -> None:
    program = (
        "import sys, polyak.training.runs.trackers\n"
        "print([n for n in ('torch', 'wandb', 'trackio', 'tensorboard') if n in sys.modules])"
    )
    assert run_apart(program, tmp_path).stdout.strip() == "[]"
