"""The pages and tables of `polyak evaluate` and `polyak forgetting`, on real tiny runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import run_config, write_corpus

from polyak.errors import ConfigError, RunError
from polyak.evaluation.config import EvaluateConfig, ForgettingConfig, corpora_of
from polyak.report.tables import as_text
from polyak.study.evaluation import measure as evaluation
from polyak.study.evaluation import page as evaluation_page
from polyak.study.forgetting import measure as forgetting
from polyak.study.forgetting import page as forgetting_page
from polyak.training.loop import train
from tests.pages import Page, check_figures_in_browser, check_in_browser, check_text


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two runs on one corpus, and another corpus of two documents."""
    folder = tmp_path_factory.mktemp("work")
    corpus = write_corpus(folder)
    other = folder / "other"
    other.mkdir()
    for number in range(40):
        (other / f"{number}.txt").write_text(f"{number} pears and {number + 1} figs; " * 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYAK_CACHE", str(folder / "cache"))
        for rule, fields in (
            ("gradient_descent", {}),
            ("triple_momentum", {"optimizer": "adamw"}),
        ):
            train(run_config(corpus, rule, steps=6, **fields), folder / "runs" / rule)
        yield folder


@pytest.fixture(scope="module")
def evaluated(work: Path) -> dict[str, Any]:
    config = EvaluateConfig(
        corpora=f"own,{work / 'other'}",
        tokens=512,
        per_position=True,
        attention_entropy=True,
        device="cpu",
        out=work / "evaluated",
    )
    return evaluation.evaluate([work / "runs"], config, command="polyak evaluate runs")


@pytest.fixture(scope="module")
def forgotten(work: Path) -> dict[str, Any]:
    return forgetting.forgetting(
        [work / "runs"], protocol(work), command="polyak forgetting runs --onto other"
    )


def test_a_heading_is_not_folded_to_the_width_of_a_narrow_table(work: Path) -> None:
    config = EvaluateConfig(tokens=512, device="cpu", out=work / "one")
    run = work / "runs" / "gradient_descent"
    results = evaluation.evaluate([run], config, command="polyak evaluate run")
    text = as_text(evaluation_page.tables(results))
    title = evaluation_page.title_of(results["runs"][0]["corpora"][0])
    assert len(title) <= 80
    assert title in text.splitlines()
    assert "difference" not in text  # there is nothing to differ from
    assert max(map(len, text.splitlines())) <= 80


def protocol(work: Path, **fields: Any) -> ForgettingConfig:
    small = {"steps": 6, "warmup": 2, "eval_tokens": 256, "out": work / "forgotten"}
    return ForgettingConfig(onto=str(work / "other"), device="cpu", **{**small, **fields})


def test_every_number_of_the_evaluation_is_on_the_page_and_in_80_columns(
    work: Path, evaluated: dict[str, Any]
) -> None:
    page = (work / "evaluated" / "report.html").read_text(encoding="utf-8")
    check_text(page)
    text = Page(page).text
    for run in evaluated["runs"]:
        assert [found["name"] for found in run["corpora"]] == ["corpus.txt", str(work / "other")]
        for found in run["corpora"]:
            assert f"{found['loss']['value']:.4f} ± {found['loss']['se']:.4f}" in text
            assert f"{found['perplexity']['value']:.3f}" in text
    for figure in ("corpora", "position-0", "position-1", "entropy-nats", "entropy-relative"):
        assert f'id="{figure}-title"' in page
    shown = as_text(evaluation_page.tables(evaluated))
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    first, second = evaluated["runs"]
    assert first["corpora"][0]["difference"] is None
    gap = second["corpora"][0]["loss"]["value"] - first["corpora"][0]["loss"]["value"]
    assert second["corpora"][0]["difference"]["value"] == pytest.approx(gap)
    assert evaluated["status"] == "complete"
    assert json.loads((work / "evaluated" / "results.json").read_text()) == evaluated


def test_what_was_measured_before_an_interruption_is_kept(work: Path, tmp_path: Path) -> None:
    def stop(share: float, what: str) -> None:
        if what.startswith("triple_momentum"):
            raise KeyboardInterrupt

    config = EvaluateConfig(tokens=64, device="cpu", out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate([work / "runs"], config, command="polyak evaluate", progress=stop)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["status"] == "partial"
    assert [len(run["corpora"]) for run in kept["runs"]] == [1, 0]


def test_runs_on_other_tokens_are_pointed_out(work: Path, tmp_path: Path) -> None:
    longer = tmp_path / "longer"
    train(run_config(work / "corpus.txt", steps=2, context_length=24), longer)
    config = EvaluateConfig(tokens=256, device="cpu", out=tmp_path / "out")
    found = evaluation.evaluate(
        [work / "runs" / "gradient_descent", longer], config, command="polyak evaluate"
    )
    assert found["runs"][1]["corpora"][0]["difference"] is None
    assert "longer is scored on other tokens than gradient_descent" in found["warnings"][0]
    check_text((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))


def test_forgetting_is_on_the_page_and_in_80_columns(work: Path, forgotten: dict[str, Any]) -> None:
    page = (work / "forgotten" / "report.html").read_text(encoding="utf-8")
    check_text(page)
    for run in forgotten["runs"]:
        value = run["forgetting"]
        shown = f"{value['value']:.4f} ± {value['se']:.4f}".replace("-", "−")
        assert shown in Page(page).text
    shown = as_text(forgetting_page.tables(forgotten))
    assert max(map(len, shown.splitlines())) <= 80
    # trained with Muon and with AdamW: not to be compared
    assert forgotten["warnings"][0].startswith("The runs were trained with different optimizers")


def test_finished_runs_are_not_measured_again_and_a_killed_one_is(
    work: Path, forgotten: dict[str, Any], tmp_path: Path
) -> None:
    told: list[str] = []

    def stop(share: float, what: str) -> None:
        told.append(what)
        if what == "triple_momentum, step 4":
            raise KeyboardInterrupt

    config = protocol(work, out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        forgetting.forgetting([work / "runs"], config, command="x", progress=stop)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert [run["status"] for run in kept["runs"]] == ["finished", "running"]
    check_text((tmp_path / "report.html").read_text(encoding="utf-8"))
    told.clear()
    again = forgetting.forgetting(
        [work / "runs"], config, command="x", progress=lambda share, what: told.append(what)
    )
    assert told == [f"triple_momentum, step {n}" for n in range(1, 7)]
    for one, other in zip(again["runs"], forgotten["runs"], strict=True):
        assert one["forgetting"] == other["forgetting"]
        assert one["curve"] == other["curve"]
    # another protocol is another measurement, beside the first
    longer = forgetting.forgetting(
        [work / "runs" / "gradient_descent"], protocol(work, out=tmp_path, steps=7), command="x"
    )
    assert longer["runs"][0]["curve"]["step"][-1] == 7
    assert len(list((tmp_path / "parts").iterdir())) == 3


def test_another_commands_results_are_not_written_over(
    work: Path, evaluated: dict[str, Any]
) -> None:
    with pytest.raises(RunError, match=r"holds the results of another command \(evaluation\)"):
        forgetting.forgetting([work / "runs"], protocol(work, out=work / "evaluated"), command="x")


def test_corpora_are_separated_by_commas_outside_brackets() -> None:
    assert corpora_of("own, c4[documents=5,revision=a],own,x") == (
        None,
        "c4[documents=5,revision=a]",
        "x",
    )
    for fields, says in (
        ({"corpora": " , "}, "nothing to evaluate on"),
        ({"tokens": 0}, "tokens=0 must be a whole number of at least 1"),
        ({"stride": 0}, "stride=0 must be a whole number of at least 1"),
        ({"stride": 8, "sliding_window": True}, "leave out one"),
        ({"stride": 8, "per_position": True}, "along plain blocks"),
        ({"split": "dev"}, "unknown split 'dev'"),
    ):
        with pytest.raises(ConfigError, match=says):
            EvaluateConfig(**fields)


@pytest.mark.parametrize(("width", "theme"), [(390, "dark"), (1200, "light")])
def test_the_pages_are_whole_in_a_browser(
    browser: Any,
    work: Path,
    evaluated: dict[str, Any],
    forgotten: dict[str, Any],
    width: int,
    theme: str,
) -> None:
    for name in ("evaluated", "forgotten"):
        check_in_browser(browser, work / name / "report.html", width, theme)


def test_figures_are_whole_on_a_phone(
    browser: Any, work: Path, evaluated: dict[str, Any], forgotten: dict[str, Any]
) -> None:
    for name in ("evaluated", "forgotten"):
        check_figures_in_browser(browser, work / name / "report.html")
