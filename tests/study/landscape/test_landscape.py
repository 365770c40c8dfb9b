"""`polyak study landscape` on real tiny runs: numbers, resuming, refusals, page and tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import run_config, write_corpus

from polyak.analysis.hessian import Surface
from polyak.cli.main import main
from polyak.errors import RunError
from polyak.evaluation.subjects import load_subject, token_set
from polyak.report.tables import as_text
from polyak.study.landscape.config import LandscapeConfig
from polyak.study.landscape.measure import landscape
from polyak.study.landscape.page import render, tables
from polyak.study.landscape.results import number, sentence, table_of
from polyak.study.landscape.work import FIXED
from polyak.training.loop import train
from tests.pages import Page, check_figures_in_browser, check_in_browser, check_text

RULES = ("adam", "gradient_descent", "triple_momentum")
SEEDS = (0, 1)
TINY = {
    "eval_tokens": 256,
    "sharpness_tokens": 64,
    "trace_precision": 0.5,
    "forgetting_steps": 4,
    "spectrum_length": 6,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Six runs, two of each of three rules, and another corpus."""
    folder = tmp_path_factory.mktemp("landscape")
    corpus = write_corpus(folder)
    (folder / "other.txt").write_text("".join(f"{n} pears, {n + 1} figs; " for n in range(900)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYAK_CACHE", str(folder / "cache"))
        for rule in RULES:
            for seed in SEEDS:
                config = run_config(
                    corpus, rule, steps=4, d_model=8, num_layers=2, adam_lr=0.02, seed=seed
                )
                train(config, folder / "runs" / f"{rule}-seed{seed}")
        yield folder


def config_of(work: Path, out: Path, **fields: Any) -> LandscapeConfig:
    other = str(work / "other.txt")
    return LandscapeConfig(**{**TINY, "corpora": other, "onto": other, "out": out, **fields})


@pytest.fixture(scope="module")
def measured(work: Path) -> dict[str, Any]:
    config = config_of(work, work / "out")
    return landscape([work / "runs"], config, command="polyak study landscape")


def test_every_property_of_every_run_is_there(work: Path, measured: dict[str, Any]) -> None:
    assert measured["status"] == "complete"
    assert measured["baseline"] == "gradient_descent"
    assert measured["entries"][0]["name"] == "gradient_descent"
    by_key = {wanted["key"] for wanted in measured["properties"]}
    for run in measured["runs"]:
        for key in by_key:
            known = run["values"][key] is not None
            spectral = key.startswith("persistence")
            if spectral:
                assert known <= (run["seed"] == 0)  # the first of a kind stands for it
            else:
                assert known, (run["name"], key)
    assert {"loss", "other_loss", "trace", "top", "scaled_trace", "rise", "forgetting"} <= by_key
    assert "persistence_full" in by_key


def test_numbers_are_those_of_the_model(work: Path, measured: dict[str, Any]) -> None:
    run = next(run for run in measured["runs"] if run["name"].endswith("triple_momentum-seed1"))
    result = json.loads((work / "runs/triple_momentum-seed1/result.json").read_text())
    assert run["values"]["loss"] == pytest.approx(result["loss"], rel=1e-5)
    subject = load_subject(run["folder"])
    surface = Surface(subject.model, token_set(subject, tokens=64).ids)
    vector = torch.ones(surface.size, dtype=torch.float64)
    for _ in range(200):  # power iteration; the shift makes the largest signed eigenvalue win
        image = surface.hessian(vector) + 50 * vector
        vector = image / image.norm()
    top = float(vector @ surface.hessian(vector))
    assert run["values"]["top"] == pytest.approx(top, rel=5e-3)
    trace = run["measured"]["sharpness"]["spectrum"]["trace"]["deflated_mean"]
    assert run["values"]["trace"] == trace["value"]
    lost = run["measured"]["forgetting"]
    before, after = (lost["source"][at]["loss"]["value"] for at in ("before", "after"))
    assert run["values"]["forgetting"] == pytest.approx(after - before, abs=1e-9)


def test_persistence_is_the_sum_of_the_layers(measured: dict[str, Any]) -> None:
    for run in measured["runs"]:
        found = run["measured"].get("spectrum")
        if found is None:
            continue
        logs = found["persistence"]["full"]["layers"]
        total = run["values"]["persistence_full"]
        if total is None:
            assert any(log["kind"] != "value" for log in logs)
        else:
            assert total == pytest.approx(math.fsum(log["value"] for log in logs))


def test_correlations_are_over_kinds_and_adjusted_together(measured: dict[str, Any]) -> None:
    rows = {(row["first"], row["second"]): row for row in measured["correlations"]}
    row = rows["loss", "trace"]
    assert (row["models"], row["runs"], row["exact"]) == (3, 6, True)
    means = [np.nanmean(table_of(measured, key)[0], axis=1) for key in ("loss", "trace")]
    ranks = [np.argsort(np.argsort(values)) for values in means]
    assert row["rho"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    tested = [row["p"] for row in rows.values() if row["p"] is not None]
    assert row["p_holm"] == 1.0
    assert min(tested) >= 2 / 6 - 1e-12


@pytest.mark.slow
def test_a_second_start_measures_nothing_again(
    work: Path, measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = []
    files = {p: p.stat().st_mtime_ns for p in (work / "out" / "parts").rglob("*.json")}
    again = landscape(
        [work / "runs"],
        config_of(work, work / "out"),
        command="polyak study landscape",
        planned=lambda *found: planned.append(found),
    )
    assert planned == [(21, 21, FIXED)]
    assert {p: p.stat().st_mtime_ns for p in files} == files
    assert [run["values"] for run in again["runs"]] == [run["values"] for run in measured["runs"]]


@pytest.mark.slow
def test_other_settings_in_the_same_folder_are_refused(
    work: Path, measured: dict[str, Any]
) -> None:
    with pytest.raises(RunError, match=r"forgetting.json was measured otherwise .*choose another"):
        landscape([work / "runs"], config_of(work, work / "out", forgetting_steps=5), command="x")


def test_mistakes_are_one_line(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, out = str(work / "runs"), str(work / "else")
    (work / "empty").mkdir(exist_ok=True)
    cases = [
        (["study", "landscap", runs], "unknown study 'landscap'; did you mean 'landscape'?"),
        (["study", "landscape"], "no run is named"),
        (["study", "landscape", str(work / "empty"), "--out", out], "empty"),
        (["study", "landscape", runs, "--parts", "sharp", "--out", out], "unknown part 'sharp'"),
        (
            ["study", "landscape", runs, "--baseline", "adm", "--out", out],
            "unknown baseline 'adm'; did you mean 'adam'?",
        ),
        (["study", "landscape", runs, "--rho", "0", "--out", out], "rho=0.0 must be"),
        (["study", "landscape", runs, "--eval-tokens", "0", "--out", out], "eval_tokens=0 must be"),
        (["study", "landscape", runs, "--onto", "nowhere", "--out", out], "'nowhere'"),
    ]
    for words, message in cases:
        try:
            code = main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr().err
        assert code in (1, 2), words
        assert message in said
        assert said.count("\n") == 1, said


def test_the_page_stands_alone_and_says_what_it_rests_on(measured: dict[str, Any]) -> None:
    text = render(measured)
    check_text(text)
    page = Page(text)
    assert "6 independently trained models: 3 kinds with 2 seeds each" in page.text
    assert sentence(measured).split(".")[0] in page.text
    for figure in ("curve-tokens", "scatter-trace-forgetting", "layers-full"):
        assert f'id="{figure}-title"' in text, figure


def test_tables_fit_eighty_columns(measured: dict[str, Any]) -> None:
    text = as_text(tables(measured))
    assert max(map(len, text.splitlines())) <= 80
    assert "largest Hessian eigenvalue" in text


def test_the_page_in_a_browser(measured: dict[str, Any], browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(measured), encoding="utf-8")
    for width, theme in ((1280, "light"), (390, "dark")):
        check_in_browser(browser, path, width, theme)
    check_figures_in_browser(browser, path)


def test_numbers_as_text() -> None:
    assert [number(x) for x in (None, 0, 12.345, -0.01234, 2.5e-5, 123456.0)] == [
        "–",
        "0",
        "12.3",
        "−0.0123",
        "2.50e−5",
        "1.23e5",
    ]
