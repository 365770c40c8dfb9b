"""`polyak dynamics`: real runs measured, stopped and gone on with; one line for bad input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import check_text
from tiny_runs import run_config

from polyak.cli.main import main
from polyak.evaluation.subjects import load_subject, token_set
from polyak.report.tables import as_text
from polyak.study.dynamics import measure
from polyak.study.dynamics.page import tables
from polyak.training.loop import train

Streams = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Path]:
    """Two runs of a few steps, by the training loop itself."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYAK_CACHE", str(folder / "cache"))
        for rule in ("gradient_descent", "triple_momentum"):
            train(run_config(corpus, rule, steps=4, d_model=8, num_layers=2), folder / rule)
        yield folder


def results_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())  # type: ignore[no-any-return]


def test_runs_are_measured_side_by_side(runs: Path, tmp_path: Path, capsys: Streams) -> None:
    out = tmp_path / "out"
    given = [str(runs / "gradient_descent"), str(runs / "triple_momentum")]
    more = ["--parts", "curve,path", "--tokens", "128", "--lens-tokens", "256"]
    words = ["dynamics", *given, *more, "--out", str(out)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.replace(str(out), "").splitlines())) <= 80
    for text in (
        "Loss through the final norm",
        "2 mlp",
        "retention",
        "detour",
    ):
        assert text in said, text
    results = results_of(out)
    assert (results["kind"], results["status"]) == ("dynamics", "complete")
    assert max(map(len, as_text(tables(results), 40).splitlines())) <= 40
    page = (out / "report.html").read_text(encoding="utf-8")
    check_text(page)
    for figure in ("loss", "lens", "update", "turn", "k0"):
        assert f'id="{figure}-title"' in page, figure
    plain, momentum = (run["found"] for run in results["runs"])
    assert set(plain) == set(momentum) == {"curve", "path"}
    assert not any("/v/" in name for name in plain["path"]["numbers"])
    assert momentum["path"]["numbers"]["4/v/retention"]["mean"]["samples"] == 8
    # and the curve ends at the loss of the trained model, on the stated tokens
    subject = load_subject(runs / "triple_momentum")
    tokens = token_set(subject, tokens=128)
    assert tokens.fingerprint == results["runs"][1]["tokens"]["fingerprint"]
    found = measure.loss_curve(measure.Watched(subject.model), tokens.ids)
    assert momentum["curve"]["loss"][-1]["value"] == pytest.approx(found.loss[-1].value)


@pytest.mark.slow
def test_the_parts_that_take_minutes_are_measured_step_by_step(
    runs: Path, tmp_path: Path, capsys: Streams
) -> None:
    more = [
        "--parts",
        "field,energy,stability,gauss_newton",
        "--tokens",
        "128",
        "--sequences",
        "2",
        "--probes",
        "2",
    ]
    out = tmp_path / "out"
    assert main(["dynamics", str(runs / "triple_momentum"), *more, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.replace(str(out), "").splitlines())) <= 80
    for text in (
        "(triangular)",
        "λ max",
        "κ metric",
        "Σ ln ρ(B)",
        "departure",
        "tr G/tr H",
        "share rising",
    ):
        assert text in said, text
    results = results_of(out)
    found = results["runs"][0]["found"]
    parts = ("energy", "stability")
    both = {f"{part}/{which}" for part in parts for which in ("trained", "untrained")}
    both.add("gauss_newton")
    assert set(found) == {f"field/{place}" for place in (1, 2, 3, 4, "nulls")} | both
    assert found["field/1"]["trained"] != found["field/1"]["untrained"]
    assert found["field/2"]["trained"]["oracle"]["own_share"]["value"] == 1  # an MLP's
    page = (out / "report.html").read_text(encoding="utf-8")
    check_text(page)
    for figure in ("kappa", "kappa-token", "log_product", "inside", "update-rise"):
        assert f'id="{figure}-title"' in page, figure
    assert max(map(len, as_text(tables(results), 40).splitlines())) <= 40


def test_a_part_that_does_not_apply_says_so(corpus: Path, tmp_path: Path, capsys: Streams) -> None:
    train(
        run_config(corpus, steps=1, d_model=8, num_layers=2, attention="linear"), tmp_path / "run"
    )
    words = ["dynamics", str(tmp_path / "run"), "--parts", "curve,energy", "--tokens", "128"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert "does not apply here (attention=linear)" in " ".join(capsys.readouterr().out.split())
    assert "does not apply here" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_stopped_command_goes_on_where_it_stopped(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    run = str(runs / "triple_momentum")
    words = ["dynamics", run, "--parts", "path,curve", "--tokens", "64", "--out", str(tmp_path)]

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measure, "motion", stop)
        assert main(words) == 130
    before = results_of(tmp_path)
    assert (before["status"], set(before["runs"][0]["found"])) == ("partial", {"curve"})
    with monkeypatch.context() as patch:  # what is there is not measured again
        patch.setattr(measure, "loss_curve", stop)
        assert main(words) == 0
    after = results_of(tmp_path)
    assert after["status"] == "complete"
    assert after["runs"][0]["found"]["curve"] == before["runs"][0]["found"]["curve"]
    capsys.readouterr()
    assert main([*words, "--seed", "1"]) == 1
    assert "seed: 0 there, 1 now" in capsys.readouterr().err


def test_bad_input_is_one_line(runs: Path, tmp_path: Path, capsys: Streams, corpus: Path) -> None:
    run, out = runs / "gradient_descent", tmp_path / "out"
    both, one = tmp_path / "both", tmp_path / "one"
    train(run_config(corpus, steps=1, d_model=8, num_layers=2, causal=False), both)
    train(run_config(corpus, steps=1, d_model=8, num_layers=1), one)
    for words, says in (
        ([], "no run is named"),
        ([tmp_path / "missing"], "does not exist"),
        ([both], "causal"),
        ([one], "the model has 1 layer"),
        ([run, "--parts", "curves"], "did you mean 'curve'?"),
        ([run, "--parts", "power"], "part 'power'"),
        ([run, "--parts", ","], "names none of"),
        ([run, "--parts", "path", "--lens-tokens", "64"], "is for the part curve"),
        ([run, "--lens-tokens", "16"], "give at least 18"),
        ([run, "--sequences", "9", "--tokens", "128"], "make 8 of 16 tokens"),
        ([run, "--sequences", "1"], "sequences=1 must be"),
        ([run, "--tokens", "16"], "errors are over sequences"),
        ([run, "--length", "999"], "length=999 must be from 1"),
        ([run, "--corpus", "stdlibb"], "did you mean 'stdlib'?"),
    ):
        given = ["dynamics", *map(str, words), "--out", str(out)]
        try:
            code = main(given)
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        assert code not in (0, 130)
        assert said.err.startswith("polyak dynamics: ")
        assert says in said.err, said.err
        assert said.err.count("\n") == 1, said.err
