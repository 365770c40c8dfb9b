"""`polyak train` that is killed, told to stop, or runs out of disk, in processes of its own."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mounts import mounted
from tiny_runs import SETTINGS, TWIN, answer, command, environment, heeding, polyak, write_corpus

from polyak.training.processes.distributed import World
from polyak.training.runs.checkpoints import Checkpoints
from polyak.training.runs.folder import RunFolder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="uses POSIX signals")

STOPPED = 75
NEVER = "training.checkpoint_every=1000"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a corpus and a file of rules, to work in."""
    folder = tmp_path / "place"
    folder.mkdir()
    write_corpus(folder)
    (folder / "twin.py").write_text(TWIN)
    return folder


def words(*more: object, steps: int = 60) -> list[object]:
    """The command line of a tiny run that saves after every step."""
    return [
        *("train", "--corpus", "corpus.txt", "--steps", steps, "--device", "cpu"),
        *SETTINGS,
        *("--set", "training.checkpoint_every=1", "--set", "threads=1"),
        *more,
    ]


def start(place: Path, *given: object, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*given),
        cwd=place,
        env=environment(place / "cache", **variables),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeding,
    )


def newest(run: Path) -> int:
    """The step of the newest whole checkpoint; 0 when there is none."""
    identity = RunFolder(run).identity()
    found = Checkpoints(run / "checkpoints", world=World(), run=identity).newest()
    return 0 if found is None else found.step


def log(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def wait_for(process: subprocess.Popen[str], path: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def losses(run: Path) -> list[tuple[str, int, float]]:
    return [
        (row["kind"], row["step"], row["loss"])
        for row in log(run)
        if row["kind"] in ("train", "validation")
    ]


# Killed


def kill_often(place: Path, kills: int, seed: int) -> None:
    """SIGKILL one run at random moments, some of them while it saves, until it is done."""
    draw = random.Random(seed)
    steps = 10 * kills + 20
    assert (
        polyak(*words("--out", "calm", steps=steps), cwd=place, cache=place / "cache").returncode
        == 0
    )
    run, checkpoints, saving, reached, killed = place / "run", place / "run/checkpoints", 0, 0, 0
    more = ("--out", "run", "--rule", "twin.py:Twin")
    while killed < kills:
        resume = ("--resume",) if (run / "run.json").exists() else ()
        given = ("train", *more[:2], *resume) if resume else words(*more, steps=steps)
        process = start(place, *given, TWIN_SECONDS="0.004")
        wait_for(process, checkpoints / f"step-{reached + draw.randrange(1, 7):06d}")
        moment = time.monotonic() + draw.uniform(0, 0.08)
        while time.monotonic() < moment:
            pass
        if draw.random() < 0.5:  # in the middle of saving
            for _ in range(20_000):
                if any(checkpoints.glob(".writing-*")) or process.poll() is not None:
                    break
        process.kill()
        assert process.communicate()[1] == ""
        killed += 1
        saving += any(checkpoints.glob(".writing-*"))
        before, reached = reached, newest(run)  # warnings are errors: every checkpoint is whole
        assert reached > before
        logged = [row["step"] for row in log_of_killed(run)]
        assert max(logged, default=0) <= reached + 1  # nothing but the step under way is lost
    assert saving >= kills // 6
    done = polyak("train", "--out", "run", "--resume", cwd=place, cache=place / "cache")
    assert (done.returncode, done.stderr) == (0, "")
    for file in ("model.safetensors", "tokenizer.json"):
        assert (run / "model" / file).read_bytes() == (place / "calm/model" / file).read_bytes()
    assert losses(run) == losses(place / "calm")
    assert sum(row["kind"] == "resume" for row in log(run)) == kills
    left = [path.name for path in run.rglob(".*") if path.name != ".lock"]
    assert left == []


def log_of_killed(run: Path) -> list[dict[str, Any]]:
    *lines, _ = (run / "metrics.jsonl").read_bytes().split(b"\n")  # the last may be cut short
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(place: Path) -> None:
    kill_often(place, 3, seed=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_thirty_kills_lose_nothing_but_the_step_under_way(place: Path) -> None:
    kill_often(place, 32, seed=2)


# Told to stop


@pytest.mark.parametrize(
    "which",
    [
        signal.SIGTERM,
        *(
            pytest.param(which, marks=pytest.mark.slow)
            for which in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
        ),
    ],
    ids=lambda which: which.name,
)
def test_a_signal_saves_and_exits_with_a_code_of_its_own(
    place: Path, which: signal.Signals
) -> None:
    given = words("--out", "run", "--rule", "twin.py:Twin", "--set", "training.checkpoint_every=50")
    process = start(
        place, *given[:-2], *("--set", "training.checkpoint_minutes=50"), TWIN_SECONDS="0.01"
    )
    wait_for(process, place / "run" / "metrics.jsonl")
    time.sleep(0.3)
    process.send_signal(which)
    if which in (signal.SIGHUP, signal.SIGUSR1):  # the shell and the kernel may both send it
        process.send_signal(which)
    _, error = process.communicate(timeout=60)
    assert process.returncode == STOPPED
    step = newest(place / "run")
    assert step > 0
    assert f"polyak train: stopped by {which.name} after step {step} of 60" in error
    assert f"--resume from run/checkpoints/step-{step:06d}" in error
    assert error.count("\n") == 1
    done = answer("train", "--out", "run", "--resume", cwd=place, cache=place / "cache")
    assert done.returncode == 0, done.stderr
    assert log(place / "run")[-1]["step"] == 60


@pytest.mark.slow
def test_a_run_goes_on_from_another_working_folder(place: Path, tmp_path: Path) -> None:
    (place / "texts").mkdir()
    (place / "corpus.txt").rename(place / "texts" / "corpus.txt")
    given = ["texts" if word == "corpus.txt" else word for word in words("--out", "run", steps=4)]
    done = answer(*given, cwd=place, cache=place / "cache")
    assert done.returncode == 0, done.stderr
    more = ("train", "--resume", "--steps", 6, "--out")
    done = answer(*more, place / "run", cwd=tmp_path, cache=place / "cache")
    assert done.returncode == 0, done.stderr
    (place / "texts").rename(place / "moved")
    done = answer(*more[:2], "--out", place / "run", cwd=tmp_path, cache=place / "cache")
    assert done.returncode == 1
    assert f"the corpus of the run, {place / 'texts'}, is no longer there" in done.stderr


def test_a_second_run_in_the_same_folder_is_refused(place: Path) -> None:
    process = start(place, *words("--out", "run", "--rule", "twin.py:Twin"), TWIN_SECONDS="0.1")
    try:
        wait_for(process, place / "run" / "checkpoints")
        second = answer("train", "--out", "run", "--resume", cwd=place, cache=place / "cache")
        assert second.returncode == 1
        assert "in use by another polyak run" in second.stderr
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


# No room, no permission


def test_a_full_disk_ends_in_one_line_that_names_the_last_good_checkpoint(
    place: Path, tmp_path: Path
) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:
        given = words("--out", disk / "run")
        done = answer(*given[:4], 4, *given[5:], cwd=place, cache=place / "cache")
        assert done.returncode == 0, done.stderr
        filler = disk / "filler"
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(bytes(2 << 20))
        reached = newest(disk / "run")
        filler.write_bytes(bytes(filler.stat().st_size - (16 << 10)))  # the log fits, no checkpoint
        more = ("train", "--out", disk / "run", "--resume", "--steps", 9)
        done = answer(*more, cwd=place, cache=place / "cache")
        assert done.returncode == 1
        assert "No space left on device" in done.stderr
        assert f"last good checkpoint: {disk}/run/checkpoints/step-{reached:06d}" in done.stderr
        assert done.stderr.count("\n") == 1
        filler.unlink()
        assert newest(disk / "run") == reached
        done = answer(*more, cwd=place, cache=place / "cache")
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_read_only_folder_ends_in_one_line(place: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=8m") as disk:
        done = answer(*words("--out", disk / "run", steps=2), cwd=place, cache=place / "cache")
        assert done.returncode == 0, done.stderr
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        again = ["train", "--resume", "--steps", 9, "--out", disk / "run"]
        for given in (again, words("--out", disk / "new")):
            done = answer(*given, cwd=place, cache=place / "cache")
            assert done.returncode == 1
            assert "Read-only file system" in done.stderr
            assert done.stderr.count("\n") == 1
            named = f"last good checkpoint: {disk}/run/checkpoints/step-000002" in done.stderr
            assert named == (given is again)


# Divergence


def test_divergence_names_the_step_the_parameter_and_the_last_good_checkpoint(place: Path) -> None:
    given = words("--out", "run", "--rule", "twin.py:Late")
    done = answer(*given, cwd=place, cache=place / "cache")
    assert done.returncode == 1
    assert "diverged: the loss is not finite at step 4" in done.stderr
    assert "first the gradient of embedding.tokens.weight" in done.stderr
    assert "last good checkpoint: run/checkpoints/step-000003" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_steps_that_are_not_finite_can_be_skipped_and_are_counted(place: Path) -> None:
    given = words("--out", "run", "--rule", "twin.py:Now", "--set", "training.skip_nonfinite=2")
    (place / "twin.py").write_text(
        TWIN
        + """
class Now(UpdateRule):
    "Gradients are NaN while there is a file."
    def step(self, x, state, oracle):
        if x.requires_grad:
            x.register_hook(lambda g: g * float("nan") if os.path.exists("bad") else g)
        return x + oracle(x), state
"""
    )
    (place / "bad").touch()
    done = answer(*given, cwd=place, cache=place / "cache")
    assert done.returncode == 1
    assert "at step 3" in done.stderr
    assert "2 steps were skipped before" in done.stderr
    skipped = [row for row in log(place / "run") if row["kind"] == "skipped"]
    assert [(row["step"], row["skipped"], row["allowed"]) for row in skipped] == [
        (1, 1, 2),
        (2, 2, 2),
    ]
    (place / "bad").unlink()
    done = answer(
        "train", "--out", "run", "--resume", "--steps", 12, cwd=place, cache=place / "cache"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((place / "run" / "result.json").read_text())
    assert result["skipped"] == 2
