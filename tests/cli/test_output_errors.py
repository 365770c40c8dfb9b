"""Work goes on to its end when nobody reads what it prints; commands that only print end."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import SETTINGS, command, environment, polyak, words, write_corpus

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="uses POSIX pipes and terminals")

TRAIN = [
    *("train", "--corpus", "corpus.txt", "--steps", "6", "--device", "cpu", "--out", "run"),
    *SETTINGS,
    *("--set", "threads=1"),
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_corpus(tmp_path)
    return tmp_path


@contextlib.contextmanager
def outputs(kind: str) -> Iterator[dict[str, Any]]:
    """Arguments of Popen with which nothing that is printed arrives."""
    if kind == "a closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
        yield {"stdout": writer, "stderr": writer}
        os.close(writer)
    elif kind == "a pipe that is full and does not wait":
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        yield {"stdout": writer, "stderr": writer}
        os.close(reader)
        os.close(writer)
    elif kind == "a full disk":
        with Path("/dev/full").open("w") as full:
            yield {"stdout": full, "stderr": full}
    elif kind == "closed descriptors":

        def close() -> None:
            os.closerange(0, 3)

        yield {"preexec_fn": close}
    else:  # a terminal that was closed; under nohup, which ignores its SIGHUP
        ours, theirs = pty.openpty()
        os.close(ours)
        yield {"stdout": theirs, "stderr": theirs, "stdin": theirs}
        os.close(theirs)


KINDS = (
    "a closed pipe",
    "a pipe that is full and does not wait",
    "a full disk",
    "closed descriptors",
    "a closed terminal",
)


def code_of(place: Path, given: list[str], kind: str) -> int:
    with outputs(kind) as arguments:
        process = subprocess.Popen(
            command(*given), cwd=place, env=environment(place / "cache"), **arguments
        )
        return process.wait(timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_to_its_end(place: Path, kind: str) -> None:
    assert code_of(place, TRAIN, kind) == 0
    assert json.loads((place / "run/result.json").read_text())["steps"] == 6
    for file in (place / "run").rglob("*.json"):  # nothing was printed into a file
        json.loads(file.read_text())
    for line in (place / "run/metrics.jsonl").read_text().splitlines():
        json.loads(line)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a closed pipe", "closed descriptors"])
def test_comparing_and_preparing_go_on_to_their_end(place: Path, kind: str) -> None:
    given = words("gradient_descent", place / "out", "--jobs", 1, seeds=1, steps=2)
    assert code_of(place, given, kind) == 0
    assert json.loads((place / "out/results.json").read_text())["status"] == "complete"
    assert code_of(place, ["prepare", "corpus.txt", "--tokenizer", "bpe-280"], kind) == 0
    assert any((place / "cache").rglob("corpus.txt-bpe-280-*/manifest.json"))


def test_a_reader_that_has_seen_enough_costs_no_step(place: Path) -> None:
    process = subprocess.Popen(
        command(*TRAIN),
        cwd=place,
        env=environment(place / "cache"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith("gradient_descent on corpus.txt")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
    assert (place / "run/result.json").exists()


def test_an_error_keeps_its_exit_code_where_nobody_reads_it(place: Path) -> None:
    assert code_of(place, ["train", "--corpus", "nowhere"], "a closed pipe") == 1
    assert code_of(place, ["train", "--steps", "many"], "a closed pipe") == 2


def test_commands_that_only_print_end_with_their_reader(place: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    for given in (["rules", "--format", "json"], ["--help"], ["train", "--help"]):
        done = subprocess.run(
            command(*given),
            env=environment(place / "cache"),
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b"")
    os.close(writer)


def test_a_command_that_only_prints_says_where_that_fails(place: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command("rules", "--rules", "gradient_descent"),
            env=environment(place / "cache"),
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    line = b"polyak rules: cannot print: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, line)


@pytest.mark.slow
def test_signals_that_were_ignored_at_the_start_stay_ignored(place: Path) -> None:
    def ignore() -> None:
        for which in (signal.SIGINT, signal.SIGHUP):
            signal.signal(which, signal.SIG_IGN)

    given = words("gradient_descent", place / "out", "--jobs", 1, seeds=1, steps=30)
    for one in (TRAIN, given):
        process = subprocess.Popen(
            command(*one),
            cwd=place,
            env=environment(place / "cache"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=ignore,
            start_new_session=True,
        )
        assert process.stdout is not None
        process.stdout.readline()
        for which in (signal.SIGINT, signal.SIGHUP):
            os.killpg(process.pid, which)
        assert process.communicate(timeout=120)[1] == ""
        assert process.returncode == 0


def test_polyak_runs_as_a_module_too(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "polyak", "--version"],
        env=environment(place / "cache"),
        capture_output=True,
        text=True,
        check=True,
    )
    version = polyak("--version", cwd=place, cache=place / "cache").stdout
    assert (done.stdout, done.stderr) == (version, "")
