"""metrics.jsonl: whole after a kill, complete after a resume, and JSON whatever the numbers."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import environment

from polyak.errors import RunError
from polyak.training.runs.metrics import MetricsLog, finite, keep_until, logged_until


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, *steps: int) -> None:
    with MetricsLog(path) as log:
        for step in steps:
            log.write("train", step=step, loss=1 / step)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_rows_are_in_the_file_as_soon_as_they_are_written(path: Path) -> None:
    with MetricsLog(path) as log:
        for step in (1, 2, 3):
            log.write("train", step=step, loss=0.5)
            assert rows(path)[-1] == {"kind": "train", "step": step, "loss": 0.5}


def test_numbers_that_are_not_json_are_null_and_named(path: Path) -> None:
    nan, inf = math.nan, math.inf
    with MetricsLog(path) as log:
        log.write(
            "train", step=1, loss=nan, rates={"muon": inf}, scalars={"mu": {"mlp": [1, -inf]}}
        )
        log.write("train", step=2, loss=1.0)
    first, second = rows(path)
    assert first == {
        "kind": "train",
        "step": 1,
        "loss": None,
        "rates": {"muon": None},
        "scalars": {"mu": {"mlp": [1, None]}},
        "nonfinite": {"loss": "nan", "rates.muon": "inf", "scalars.mu.mlp.1": "-inf"},
    }
    assert "nonfinite" not in second


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(min_size=1, max_size=3), values, max_size=4))
def test_any_row_is_json_and_finite_ones_are_unchanged(row: dict[str, Any]) -> None:
    clean = finite(row)
    back = json.loads(json.dumps(clean, allow_nan=False))
    if "nonfinite" not in clean:
        assert back == row


def test_part_of_a_last_line_is_taken_off_before_the_next_row(path: Path) -> None:
    write(path, 10, 20)
    whole = path.read_bytes()
    for part in (b'{"kind": "tr', b"x" * 200_000):
        path.write_bytes(whole + part)
        write(path, 30)
        assert [row["step"] for row in rows(path)] == [10, 20, 30]
    path.write_bytes(b'{"kind"')
    write(path, 30)
    assert [row["step"] for row in rows(path)] == [30]


def test_rows_after_the_step_are_cut_and_those_before_keep_their_bytes(path: Path) -> None:
    write(path, 10, 20, 20, 30, 40)
    lines = path.read_bytes().splitlines(keepends=True)
    keep_until(path, 20)
    kept = path.read_bytes().splitlines(keepends=True)
    assert kept[:3] == lines[:3]
    assert [json.loads(line) for line in kept[3:]] == [{"kind": "cut", "step": 20, "until": 40}]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_nothing_to_cut_leaves_the_file_as_it_is(path: Path) -> None:
    keep_until(path, 5)
    assert not path.exists()
    write(path, 10, 20)
    before = (path.read_bytes(), path.stat().st_ino)
    keep_until(path, 20)
    assert (path.read_bytes(), path.stat().st_ino) == before


def test_a_log_knows_how_far_it_ever_got_however_often_it_was_cut(path: Path) -> None:
    assert logged_until(path) == (0, 0)
    write(path, 10, 20, 30, 40)
    keep_until(path, 30)
    assert logged_until(path) == (30, 40)
    keep_until(path, 10)  # an older checkpoint: the cut at 30 goes, what it said stays
    assert logged_until(path) == (10, 40)
    write(path, 20)
    assert logged_until(path) == (20, 40)
    write(path, 30, 40, 50)
    assert logged_until(path) == (50, 50)


@pytest.mark.parametrize("line", ["nonsense", "3", "{}", '{"kind": "train", "step": "two"}', ""])
def test_a_line_that_is_no_row_is_named_and_the_file_left_alone(line: str, path: Path) -> None:
    write(path, 10)
    path.write_text(path.read_text() + line + "\n")
    before = path.read_bytes()
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2: not a row"):
        keep_until(path, 5)
    assert path.read_bytes() == before


def test_a_full_disk_and_a_folder_without_the_file_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot write"):
        MetricsLog(tmp_path / "missing" / "metrics.jsonl")
    if Path("/dev/full").exists():
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        log = MetricsLog(tmp_path / "metrics.jsonl")
        with pytest.raises(RunError, match="No space left on device"):
            log.write("train", step=1)
        log.__exit__(None, None, None)


PROGRAM = """
import sys
from pathlib import Path
from polyak.training.runs.metrics import MetricsLog, keep_until
path = Path(sys.argv[1])
print("ready", flush=True)
while True:
    keep_until(path, 1000)
    with MetricsLog(path) as log:
        for step in range(1001, 1200):
            log.write("train", step=step, loss=1 / step)
"""


def test_a_kill_at_any_moment_loses_no_row_before_the_step(path: Path, tmp_path: Path) -> None:
    write(path, *range(1, 1001))
    before = path.read_bytes()
    draw = random.Random(0)
    for _ in range(12):
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(path)],
            stdout=subprocess.PIPE,
            env=environment(tmp_path),
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(draw.uniform(0, 0.05))
            os.kill(process.pid, signal.SIGKILL)
        assert path.read_bytes()[: len(before)] == before
    keep_until(path, 1000)
    found = rows(path)
    assert [row["step"] for row in found if row["kind"] == "train"] == list(range(1, 1001))
    assert {row["kind"] for row in found[1000:]} <= {"cut"}
