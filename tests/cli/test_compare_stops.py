"""Comparisons that are stopped, killed, or hold runs that fail; and sweeps."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import TWIN, command, environment, files, heeding, results_of, words, write_corpus

from polyak import load_run
from polyak.cli.main import main
from polyak.errors import PolyakError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="uses POSIX signals and locks")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a corpus and a file of rules, to work in."""
    folder = tmp_path / "place"
    folder.mkdir()
    write_corpus(folder)
    (folder / "twin.py").write_text(TWIN)
    monkeypatch.setenv("POLYAK_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)
    return folder


# Interrupted and killed


def slow(out: Path) -> list[str]:
    """A comparison whose second run takes its time if the environment says so."""
    return words("gradient_descent,twin.py:Twin", out, "--jobs", 2, seeds=1, steps=60)


def start(place: Path, out: Path) -> subprocess.Popen[str]:
    """Start it as a terminal does; wait until its first run is done and its second under way."""
    process = subprocess.Popen(
        command(*slow(out)),
        cwd=place,
        env=environment(place / "cache", TWIN_SECONDS="0.1"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeding,
        start_new_session=True,
    )
    metrics = out / "runs" / "Twin-seed0" / "metrics.jsonl"
    first = out / "runs" / "gradient_descent-seed0" / "result.json"
    before = metrics.read_bytes() if metrics.exists() else b""
    try:
        wait(lambda: metrics.exists() and metrics.read_bytes() not in (b"", before), 400)
        wait(first.exists, 400)
        assert process.poll() is None
    except BaseException:
        process.kill()
        raise
    return process


def wait(until: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def workers(out: Path) -> list[int]:
    """Processes whose command line names a run of `out`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if os.fsencode(out / "runs") in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_killed_and_interrupted_comparisons_lose_nothing_finished(
    place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(place, out)
    try:
        done = {p: t for p, t in files(out).items() if p.parts[-2] == "gradient_descent-seed0"}
        assert (out / "runs" / "gradient_descent-seed0" / "result.json").exists()
        assert workers(out)
        process.kill()  # no chance to clean up
        process.wait()
        wait(lambda: not workers(out), 10)  # the orphan ends by itself
        written = files(out)
        time.sleep(0.3)
        assert files(out) == written
        assert not (out / "runs" / "Twin-seed0" / "result.json").exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    process = start(place, out)
    try:
        os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C in a terminal does
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130
        assert error.strip() == "polyak compare: interrupted"
        assert not workers(out)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    saved = list((out / "runs" / "Twin-seed0" / "checkpoints").iterdir())
    assert len(saved) == 1  # the run that was under way goes on from there
    partial = results_of(out)
    assert partial["status"] == "partial"
    assert [run["status"] for run in partial["runs"]] == ["finished", "pending"]
    page = " ".join((out / "report.html").read_text().split())
    assert "This comparison is not complete: 1 of 2 runs still to finish" in page

    assert main(slow(out)) == 0
    after = files(out)
    assert {path: after[path] for path in done} == done  # never run again
    whole = results_of(out)
    assert whole["status"] == "complete"
    assert whole["created"] == partial["created"]
    ends = [run["curve"]["loss"][-1] for run in whole["runs"]]
    assert ends[0] == ends[1]  # the twin went on and is equal to the last bit


@pytest.mark.slow
@pytest.mark.parametrize("which", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_comparison_that_is_told_to_stop_saves_what_is_under_way(
    place: Path, tmp_path: Path, which: str
) -> None:
    out = tmp_path / "out"
    process = start(place, out)
    try:
        os.killpg(process.pid, getattr(signal, which))
        _, error = process.communicate(timeout=150)  # runs may take a minute to save
        more = "; the same command goes on with what is done"
        assert error.strip() == f"polyak compare: stopped by {which}{more}"
        assert process.returncode == 75
        assert not workers(out)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert len(list((out / "runs" / "Twin-seed0" / "checkpoints").iterdir())) == 1
    assert [run["status"] for run in results_of(out)["runs"]] == ["finished", "pending"]
    assert main(slow(out)) == 0
    ends = [run["curve"]["loss"][-1] for run in results_of(out)["runs"]]
    assert ends[0] == ends[1]


# Failures


def test_a_failing_rule_leaves_the_others_alone(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code = main(words("gradient_descent,twin.py:Late", out, seeds=1))
    error = capsys.readouterr().err
    assert code == 1
    results = results_of(out)
    assert results["status"] == "complete"
    good, late = results["runs"]
    assert (good["status"], late["status"]) == ("finished", "failed")
    assert late["error"].startswith("rule Late diverged: the loss is not finite at step 4 (seed 0)")
    assert late["curve"]["step"] == [2]
    assert error.splitlines() == [f"polyak compare: Late seed 0: {late['error']}"]
    page = (out / "report.html").read_text().replace("<wbr>", "")
    assert "not finite at step 4" in page
    with pytest.raises(PolyakError, match="did not finish"):
        load_run(out / "runs" / "Late-seed0")


def test_a_rule_that_breaks_its_contract_is_refused_before_anything_is_trained(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(words("gradient_descent,twin.py:Alone", out, seeds=1)) == 1
    said = "polyak compare: rule Alone: step must return (x, state), but it returns a Tensor\n"
    assert capsys.readouterr().err == said
    assert not (out / "results.json").exists()


def test_a_worker_that_is_killed_is_one_failed_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dies.py").write_text(
        TWIN + "\nclass Dies(UpdateRule):\n"
        "    def step(self, x, state, oracle):\n"
        "        import os, sys\n"
        "        if 'polyak.compare.worker' in sys.modules or 'worker' in sys.argv[0]:\n"
        "            os.kill(os.getpid(), 9)\n"
        "        return x + oracle(x), state\n"
    )
    rule = f"{tmp_path}/dies.py:Dies"
    assert main(words(rule, tmp_path / "out", seeds=1)) == 1
    (run,) = results_of(tmp_path / "out")["runs"]
    assert run["status"] == "failed"
    assert "the process ended early (killed by signal 9); see " in run["error"]
    assert capsys.readouterr().err == f"polyak compare: Dies seed 0: {run['error']}\n"


# Sweeps


@pytest.mark.slow
def test_a_sweep_gives_each_entry_its_own_best_rate_on_other_seeds(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rates = tmp_path / "out", "training.adam_lr=0.03,1e-6"
    code = main(words("gradient_descent,twin.py:Late", out, "--sweep", rates, seeds=1))
    assert code == 1
    results = results_of(out)
    good, late = results["entries"]
    found = {}
    for folder in (out / "sweep").iterdir():
        config = json.loads((folder / "spec.json").read_text())["config"]
        assert config["training"]["seed"] == 1000
        if (folder / "result.json").exists():
            loss = json.loads((folder / "result.json").read_text())["loss"]
            found[config["training"]["adam_lr"]] = loss
    assert good["sweep"] == {
        "field": "training.adam_lr",
        "values": [1e-6, 0.03],
        "losses": [found[1e-6], found[0.03]],
        "chosen": min(found, key=lambda rate: found[rate]),
        "seeds": [1000],
        "at_edge": True,
    }
    ran = json.loads((out / results["runs"][0]["folder"] / "run.json").read_text())["settings"]
    assert ran["training"]["adam_lr"] == good["sweep"]["chosen"] == 0.03
    assert ran["training"]["seed"] == 0
    # the other entry fails at every rate: the comparison goes on without it, and says so
    assert late["sweep"]["losses"] == [None, None]
    assert late["sweep"]["chosen"] is None
    assert [run["status"] for run in results["runs"]] == ["finished", "failed"]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Late seed 0: no value of training.adam_lr works: rule Late diverged" in error
    assert "Each rule's own rate" in (out / "report.html").read_text()
