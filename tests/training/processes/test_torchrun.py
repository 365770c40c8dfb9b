"""`torchrun … -m polyak.cli.main train`: the whole program in several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import torchrun
from safetensors.torch import load_file
from tiny_runs import SETTINGS, TWIN, environment, polyak

pytestmark = pytest.mark.slow

Words = Callable[..., list[str]]


@pytest.fixture
def words(corpus: Path, tmp_path: Path) -> Words:
    """The command line of a tiny run into a folder."""

    def build(
        folder: str, *more: object, steps: int = 24, rule: str = "triple_momentum"
    ) -> list[str]:
        return [
            *("train", "--rule", rule, "--corpus", str(corpus), "--steps", str(steps)),
            *("--device", "cpu", "--out", str(tmp_path / folder), *SETTINGS),
            *("--set", "training.checkpoint_every=4", *map(str, more)),
        ]

    return build


def resumed(folder: Path, *more: object) -> list[str]:
    return ["train", "--resume", "--out", str(folder), *map(str, more)]


def several(count: int, *command: object, **options: object) -> subprocess.CompletedProcess[str]:
    cache = os.environ["POLYAK_CACHE"]
    return torchrun(count, "-m", "polyak.cli.main", *command, POLYAK_CACHE=cache, **options)  # type: ignore[arg-type]


def one(*command: object) -> None:
    cache = Path(os.environ["POLYAK_CACHE"])
    done = polyak(*command, cwd=cache.parent, cache=cache)
    assert done.returncode == 0, done.stderr


def check_equal(folder: Path, expected: Path) -> None:
    """Validation losses and the final weights of two runs."""
    found, wanted = (load_file(run / "model" / "model.safetensors") for run in (folder, expected))
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=name)
    losses = [
        {row["step"]: row["loss"] for row in rows(run) if row["kind"] == "validation"}
        for run in (folder, expected)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-5)
    assert len(losses[0]) > 3


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def children_of(process: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def wait_for(path: Path, running: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < until, f"no {path.name} after two minutes"
        time.sleep(0.05)


def started(count: int, *command: object, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(count), "-m", "polyak.cli.main", *map(str, command)),
        ],
        env=environment(Path(os.environ["POLYAK_CACHE"]), **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_of_two_processes_is_the_run_of_one(words: Words, tmp_path: Path) -> None:
    one(*words("one"))
    for strategy in ("ddp", "fsdp"):
        done = several(2, *words(strategy, "--parallel", strategy))
        assert done.stdout.count("Finished 24 steps") == 1
        assert "Warning" not in done.stderr
        check_equal(tmp_path / strategy, tmp_path / "one")
        steps = [row["step"] for row in rows(tmp_path / strategy) if row["kind"] == "validation"]
        assert steps == sorted(set(steps))  # one process writes


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_a_killed_run_goes_on_with_other_numbers_of_processes(words: Words, tmp_path: Path) -> None:
    # a rule that takes its time, so that there is time to kill
    (tmp_path / "rules.py").write_text(TWIN)
    command = {"steps": 40, "rule": f"{tmp_path / 'rules.py'}:Twin"}
    one(*words("one", **command))
    folder = tmp_path / "moving"
    running = started(2, *words("moving", "--parallel", "fsdp", **command), TWIN_SECONDS="0.04")
    wait_for(folder / "checkpoints" / "step-000008" / "manifest.json", running)
    began = time.monotonic()
    os.kill(children_of(running.pid)[1], signal.SIGKILL)
    _, errors = running.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert running.returncode != 0
    assert not (folder / "result.json").exists()

    running = started(2, *resumed(folder, "--parallel", "ddp"), TWIN_SECONDS="0.04")
    at = max(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))
    wait_for(folder / "checkpoints" / f"step-{at + 8:06d}", running)
    running.send_signal(signal.SIGTERM)  # torchrun passes it on; the run saves and stops
    _, errors = running.communicate(timeout=60)
    assert running.returncode != 0
    assert errors.count("polyak train: stopped by SIGTERM") == 1
    assert "go on with --resume" in errors

    one(*resumed(folder))
    assert [row["processes"] for row in rows(folder) if row["kind"] == "resume"] == [2, 1]
    check_equal(folder, tmp_path / "one")


def test_mistakes_that_depend_on_the_processes_are_one_line(words: Words, tmp_path: Path) -> None:
    for more, message in (
        (("--set", "training.batch_size=5"), "batch_size=5"),
        (("--parallel", "none"), "parallel"),
    ):
        command = words("bad", *more)
        if "training.batch_size=5" in command:
            place = command.index("training.batch_size=4")
            del command[place - 1 : place + 1]
        done = several(2, *command, check=False)
        assert done.returncode != 0
        told = [line for line in done.stderr.splitlines() if line.startswith("polyak train: ")]
        assert any(message in line for line in told), done.stderr
        # torchrun may end the others before they have got as far
        assert all(message in line or "SIGTERM" in line for line in told), done.stderr
        assert not (tmp_path / "bad" / "metrics.jsonl").exists()
