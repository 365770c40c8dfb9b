"""`polyak report`: real runs into one page, and one line for what is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import answer, run_config

from polyak.cli.main import main
from polyak.training.loop import train

Streams = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Two runs of 30 steps, by the training loop itself."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYAK_CACHE", str(folder / "cache"))
        for rule in ("gradient_descent", "triple_momentum"):
            train(run_config(corpus, rule, steps=30, eval_every=10), folder / rule)
    return folder


def test_real_runs_become_a_page_with_every_curve(
    runs: Path, tmp_path: Path, capsys: Streams
) -> None:
    out = tmp_path / "out"
    assert main(["report", str(runs / "gradient_descent"), str(runs), "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("2 runs, 2 finished; last validation losses from ")
    assert said[-1] == f"Report: {out / 'report.html'}"
    page = (out / "report.html").read_text(encoding="utf-8")
    for figure in (
        *("train-step", "train-tokens", "train-seconds", "curve-step", "gradient-norm"),
        *("rate-0", "tokens-per-second", "flops-per-second", "peak-fraction", "memory"),
        *("scalar-0", "scalar-time-0"),
    ):
        assert f'id="{figure}-title"' in page, figure
    results = json.loads((out / "results.json").read_text())
    assert results["kind"] == "runs"
    assert results["command"].startswith("polyak report ")
    assert [entry["name"] for entry in results["entries"]] == [
        "gradient_descent",
        "triple_momentum",
    ]
    for run in results["runs"]:
        end = json.loads((runs / run["name"] / "result.json").read_text())
        assert run["loss"] == end["loss"]
        assert run["step"] == 30


def test_what_cannot_be_reported_is_one_line(runs: Path, tmp_path: Path, capsys: Streams) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "run.json").write_bytes((runs / "gradient_descent" / "run.json").read_bytes())
    (tmp_path / "nothing").mkdir()
    wrong = begun.with_name("wrong")
    wrong.mkdir()
    (wrong / "run.json").write_bytes((begun / "run.json").read_bytes())
    (wrong / "metrics.jsonl").write_text("nonsense\n")
    for path, says in (
        (tmp_path / "missing", "does not exist"),
        (tmp_path / "nothing", "is not a run and holds none: run.json is missing"),
        (begun, "no metrics yet: begun logged no training step"),
        (wrong, "metrics.jsonl, line 1: not a row of metrics"),
    ):
        assert main(["report", str(path), "--out", str(tmp_path / "out")]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("polyak report: ")
        assert says in said.err
        assert said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_run_and_a_folder_that_cannot_be_made_are_one_line(runs: Path, tmp_path: Path) -> None:
    nothing = answer("report", cwd=tmp_path, cache=tmp_path)
    assert nothing.returncode != 0
    assert nothing.stderr == (
        "polyak report: no run is named; write polyak report RUN, a run's folder\n"
    )
    (tmp_path / "file").write_text("")
    stuck = answer("report", runs, "--out", tmp_path / "file" / "out", cwd=tmp_path, cache=tmp_path)
    assert stuck.returncode == 1
    assert stuck.stderr.startswith("polyak report: cannot create folder")
    assert stuck.stderr.count("\n") == 1
