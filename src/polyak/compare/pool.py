"""Runs jobs side by side, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyak.errors import RunError
from polyak.files import make_folder, write_json
from polyak.training.config.run import RunConfig


@dataclass(frozen=True)
class Job:
    """One run to do.

    Attributes:
        entry: name of the compared entry.
        seed: its seed.
        config: everything that defines the run.
        folder: where it goes.
    """

    entry: str
    seed: int
    config: RunConfig
    folder: Path


Message = dict[str, Any]
"""{"step": …, "steps": …, "loss": …}, {"result": …} or {"error": …}."""

PATIENCE = 60.0
"""Seconds that runs have to save a checkpoint when they are stopped."""


def run_jobs(
    jobs: Sequence[Job], *, side_by_side: int, report: Callable[[Job, Message], None]
) -> None:
    """Run all jobs, at most `side_by_side` at once, reporting every message as it comes.

    A job that fails reports {"error": …} and the others go on. If the caller is interrupted, the
    runs under way save a checkpoint and stop; finished runs stay on disk.

    Args:
        jobs: in the order they are started.
        side_by_side: processes at once.
        report: called from this thread, with the job and its message.
    """
    messages: queue.Queue[tuple[Job, Message]] = queue.Queue()
    waiting, processes = list(jobs), dict[Path, subprocess.Popen[str]]()
    try:
        while waiting or processes:
            while waiting and len(processes) < side_by_side:
                job = waiting.pop(0)
                processes[job.folder] = _start(job, messages)
            job, message = messages.get()
            if "result" in message or "error" in message:
                processes.pop(job.folder).wait()
            report(job, message)
    finally:
        _stop(list(processes.values()))


def _stop(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Tell runs to save and stop, and wait for that as long as a large checkpoint may take."""
    for process in processes:
        # by its standard input: whoever stops us may have sent a signal to the whole group, and a
        # second one ends a run at once
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended
            process.stdin.write("stop\n")
            process.stdin.flush()
    end = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except BaseException as problem:
            process.kill()  # it does not answer, or the user does not want to wait
            process.wait()
            if not isinstance(problem, subprocess.TimeoutExpired):
                raise


def _start(job: Job, messages: queue.Queue[tuple[Job, Message]]) -> subprocess.Popen[str]:
    make_folder(job.folder)
    spec, log = job.folder / "spec.json", job.folder / "log.txt"
    write_json(spec, {"config": job.config.to_dict(), "folder": str(job.folder)})
    threads = {"OMP_NUM_THREADS": str(job.config.threads)} if job.config.threads else {}
    # the worker imports what this process imports, not a file of the working folder (-P)
    path = {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    try:
        with log.open("w", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "polyak.compare.worker", str(spec)],
                stdin=subprocess.PIPE,  # for the word to stop; it ends when this process does
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                env={**os.environ, **threads, **path},
            )
    except OSError as problem:
        raise RunError(f"cannot start a run in {job.folder}: {problem.strerror}") from problem
    threading.Thread(target=_listen, args=(job, process, messages), daemon=True).start()
    return process


def _listen(
    job: Job, process: subprocess.Popen[str], messages: queue.Queue[tuple[Job, Message]]
) -> None:
    ended = False
    assert process.stdout is not None
    for line in process.stdout:
        if not line.endswith("\n"):
            break  # killed in the middle of a line
        message = json.loads(line)
        ended = ended or "result" in message or "error" in message
        messages.put((job, message))
    if not ended:  # killed, or crashed without a word
        code = process.wait()
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        messages.put((job, {"error": f"the process ended early ({how}); see {job.folder}/log.txt"}))
