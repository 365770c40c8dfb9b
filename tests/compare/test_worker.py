"""One run's process: it stops at its parent's word, and leaves signals to the group to that."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import environment, run_config, write_corpus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="uses POSIX signals"),
]


@contextmanager
def worker(folder: Path, steps: int) -> Iterator[subprocess.Popen[str]]:
    config = run_config(write_corpus(folder), steps=steps)
    spec = folder / "spec.json"
    spec.write_text(json.dumps({"config": config.to_dict(), "folder": str(folder / "run")}))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "polyak.compare.worker", str(spec)],
        env=environment(folder / "cache"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()


def message(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    return json.loads(line) if line else {}


def test_a_line_on_standard_input_saves_a_checkpoint_and_stops(tmp_path: Path) -> None:
    with worker(tmp_path, 100_000) as process:
        assert message(process)["step"] == 1
        assert process.stdin is not None
        process.stdin.write("stop\n")
        process.stdin.flush()
        assert process.wait(300) == 75
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    assert not (tmp_path / "run" / "result.json").exists()


def test_signals_to_the_group_end_nothing_not_even_between_the_last_step_and_the_result(
    tmp_path: Path,
) -> None:
    with worker(tmp_path, 40) as process:
        last: dict[str, Any] = {}
        while found := message(process):
            last = found
            for which in (signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
                process.send_signal(which)
        assert process.wait(300) == 0
    assert last["result"]["steps"] == 40
