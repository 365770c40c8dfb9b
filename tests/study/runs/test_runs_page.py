"""The report of any runs: what it reads, what it says, and how a browser shows it."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from polyak.errors import RunError
from polyak.files import write_json
from polyak.study.runs import figures as run_figures
from polyak.study.runs.figures import smooth
from polyak.study.runs.measure import KIND, POINTS, gather, read_run, series
from polyak.study.runs.page import render, report, sentence
from polyak.training.runs.finding import find_runs, short_names
from polyak.training.runs.metrics import MetricsLog
from tests.pages import Page, check_figures_in_browser, check_in_browser, check_text
from tests.study.runs.run_logs import TOKENS, write_run

RESUMED = (
    ("cut", {"step": 80, "until": 120}),
    (
        "resume",
        {"step": 80, "checkpoint": "step-000080", "changes": {"training.steps": [100, 200]}},
    ),
    ("spike", {"step": 133, "loss": 6.5, "usual": 2.1}),
    ("skipped", {"step": 155, "why": "loss is nan", "skipped": 1, "allowed": 2}),
)


def family(folder: Path) -> list[Path]:
    """Two rules, two seeds each; one resumed, one under way, one on another validation set."""
    return [
        write_run(folder / "gd-seed0", events=RESUMED),
        write_run(folder / "gd-seed1", seed=1),
        write_run(folder / "hb-seed0", "heavy_ball", level=1.9),
        write_run(folder / "hb-seed1", "heavy_ball", seed=1, level=1.9, until=110),
        write_run(folder / "other", "heavy_ball", validation="b" * 64, steps=50, level=1.8),
    ]


def one(folder: Path) -> list[Path]:
    """A single run that has logged two rows and no validation."""
    return [write_run(folder / "mine", "triple_momentum", until=20)]


def old(folder: Path) -> list[Path]:
    """A run of an early version beside a new one, with names that are long."""
    name = "a_rather_long_name_of_a_run_that_somebody_gave_it_on_a_friday_afternoon"
    return [write_run(folder / name, old=True), write_run(folder / f"{name}-2", "nesterov")]


CASES = {"family": family, "one": one, "old": old}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`rendered(case)`: the results and the folder of their page, made once."""

    @cache
    def make(case: str) -> tuple[dict[str, Any], Path]:
        folder = tmp_path_factory.mktemp(case)
        runs = CASES[case](folder / "runs")
        return report(runs, folder / "out", command="polyak report runs"), folder / "out"

    return make


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_run_gives_one_well_formed_page(rendered: Any, case: str) -> None:
    results, out = rendered(case)
    text = (out / "report.html").read_text(encoding="utf-8")
    check_text(text)
    assert sentence(results) in Page(text).text
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "results.json"]


def test_the_page_is_made_of_results_json_alone(rendered: Any) -> None:
    _, out = rendered("one")
    text = (out / "report.html").read_text(encoding="utf-8")
    assert render(json.loads((out / "results.json").read_text())) == text


def test_the_page_says_what_a_reader_must_know(rendered: Any) -> None:
    _, out = rendered("family")
    text = Page((out / "report.html").read_text(encoding="utf-8")).text
    for needed in (
        "5 runs, 4 finished",
        "validated on 2 different sets, so their validation losses cannot be compared",
        "Same set: gd-seed0, gd-seed1, hb-seed0 and hb-seed1; other.",
        "resumed at step 80",
        "done again: steps 81 to 120",
        "1 spike at step 133",
        "step skipped at step 155",
        "training.steps changed: 100 to 200",
        "110 of 200",
        "training.steps",
    ):
        assert needed in text, needed
    assert "different machines" not in text


def test_the_numbers_of_the_table_are_the_logs(rendered: Any) -> None:
    results, _ = rendered("family")
    run = next(run for run in results["runs"] if run["name"] == "hb-seed1")
    rows = [json.loads(x) for x in (Path(run["folder"]) / "metrics.jsonl").read_text().splitlines()]
    checks = [row for row in rows if row["kind"] == "validation"]
    assert run["status"] == "unfinished"
    assert (run["step"], run["steps"], run["tokens"]) == (110, 200, 110 * TOKENS)
    assert run["loss"] == checks[-1]["loss"]
    best = min(checks, key=lambda row: row["loss"])
    assert (run["best_loss"], run["best_step"]) == (best["loss"], best["step"])
    # 1024 tokens are 2048 bytes
    assert run["bits_per_byte"] == pytest.approx(run["loss"] / math.log(2) / 2)
    assert run["curve"]["step"] == [row["step"] for row in checks]
    assert run["train"]["loss"] == [row["loss"] for row in rows if row["kind"] == "train"]
    assert run["train"]["rates"]["norms"] == [0.003] * 11
    assert run["peak_memory_bytes"] == 500 * 2**20


def test_runs_that_differ_in_their_seed_only_are_one_entry(rendered: Any) -> None:
    results, _ = rendered("family")
    entries = {entry["name"]: entry["seeds"] for entry in results["entries"]}
    assert list(entries.values()) == [[0, 1], [0, 1], [0]]
    assert results["differences"] == ["model.rule", "training.steps", "validation.fingerprint"]
    assert next(iter(entries)) == "gradient_descent[training.steps=200]"


def test_entries_get_short_names_where_settings_do_not_tell(tmp_path: Path) -> None:
    for name, level in (("a-seed0", "1" * 64), ("b-seed0", "2" * 64)):
        write_run(tmp_path / name, validation=level)
    read = [read_run(tmp_path / name, name) for name in ("a-seed0", "b-seed0")]
    results = gather(read, command="")
    assert [entry["name"] for entry in results["entries"]] == ["a", "b"]


def test_other_hardware_is_said(tmp_path: Path) -> None:
    read = [
        read_run(write_run(tmp_path / name, machine=name), name)
        for name in ("slow CPU", "fast CPU")
    ]
    assert "different machines" in gather(read, command="")["warnings"][0]


def test_only_figures_with_something_to_show_are_drawn(rendered: Any) -> None:
    family, one, old = (
        set(re.findall(r'id="([\w-]+)-title"', (rendered(case)[1] / "report.html").read_text()))
        for case in CASES
    )
    losses = {f"{kind}-{axis}" for kind in ("train", "curve") for axis in run_figures.AXES}
    logged = {"gradient-norm", "tokens-per-second", "rate-0", "rate-1"}
    new = {"flops-per-second", "peak-fraction", "memory"}
    scalars = {"scalar-0", "scalar-time-0"}
    assert family == losses | logged | new | scalars
    assert one == {name for name in family if not name.startswith("curve")}
    assert old == family  # the new run beside the old one has it all


def test_runs_of_early_versions_show_what_they_have(tmp_path: Path) -> None:
    read = read_run(write_run(tmp_path / "run", old=True), "run")
    figures = run_figures.all_figures(gather([read], command=""))
    assert not {"peak_fraction", "memory_bytes", "flops_per_second"} & set(figures)
    assert {"tokens_per_second", "gradient_norm", "train-step"} <= set(figures)


def test_figures_mark_resumes_and_spikes(tmp_path: Path) -> None:
    plain = read_run(write_run(tmp_path / "a"), "a")
    marked = read_run(write_run(tmp_path / "b", events=RESUMED), "b")
    figures = []
    for run in (plain, marked):
        axes = Figure().subplots()
        results = gather([run], command="")
        assert run_figures.loss(axes, results, "train", "step")
        figures.append(axes.lines)
    before, after = ([line.get_marker() for line in lines] for lines in figures)
    assert after.count("x") == before.count("x") + 2
    (resume,) = [line for line in figures[1] if line.get_linestyle() == ":"]
    assert list(resume.get_xdata()) == [80, 80]


def test_long_logs_are_averaged_and_keep_their_mean(tmp_path: Path) -> None:
    rows = [
        {"kind": "train", "step": step, "tokens": step, "seconds": step / 2, "loss": float(step)}
        for step in range(1, 3 * POINTS + 2)
    ]
    found = series(rows)
    assert len(found["step"]) <= POINTS
    assert found["step"][-1] == rows[-1]["step"]
    size = found["rows_per_point"]
    assert size == 4
    assert found["loss"][0] == np.mean([row["loss"] for row in rows[:size]])
    assert found["gradient_norm"] == [None] * len(found["step"])
    assert series([])["step"] == []


def test_the_moving_average_follows_constants_and_damps_noise() -> None:
    assert smooth(np.full(50, 3.0)) == pytest.approx(np.full(50, 3.0))
    noise = np.random.default_rng(0).normal(size=400)
    assert smooth(noise)[100:].std() < 0.4 * noise.std()
    assert smooth(np.array([2.0]))[0] == 2.0


def test_runs_are_found_in_comparisons_and_folders_and_counted_once(tmp_path: Path) -> None:
    first = write_run(tmp_path / "study" / "runs" / "one", until=10)
    second = write_run(tmp_path / "study" / "runs" / "two", until=10)
    swept = write_run(tmp_path / "study" / "sweep" / "three", until=10)
    assert find_runs([tmp_path / "study"]) == [first, second]
    assert find_runs([first, tmp_path / "study", first]) == [first, second]
    assert find_runs([tmp_path / "study" / "sweep", first]) == [swept, first]


def test_names_take_as_many_folders_as_tell_runs_apart() -> None:
    assert short_names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert short_names([Path("/a/x/run"), Path("/b/x/run")]) == ["a/x/run", "b/x/run"]


def test_bits_per_byte_come_from_the_comparison_around_a_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "study" / "runs" / "one")
    recorded = json.loads((folder / "run.json").read_text())
    del recorded["settings"]["validation"]["bytes"]
    write_json(folder / "run.json", recorded)
    assert read_run(folder, "one")["bits_per_byte"] is None
    corpus = {"validation_tokens": 1024, "validation_bytes": 1024}
    around = {"format": 1, "kind": "comparison", "corpus": corpus}
    write_json(tmp_path / "study" / "results.json", around)
    run = read_run(folder, "one")
    assert run["bits_per_byte"] == pytest.approx(run["loss"] / math.log(2))


def test_what_is_no_run_or_has_nothing_to_show_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, says in ((tmp_path / "none", "does not exist"), (tmp_path / "empty", "is not a run")):
        with pytest.raises(RunError, match=says):
            find_runs([path])
    silent = write_run(tmp_path / "silent", until=0)
    with pytest.raises(RunError, match="no metrics yet: silent logged no training step"):
        report([silent], tmp_path / "out", command="")
    assert not (tmp_path / "out").exists()
    results = report(
        [silent, write_run(tmp_path / "going", until=10)], tmp_path / "out", command=""
    )
    assert results["warnings"] == ["Left out, because nothing is logged yet: silent."]
    write_json(silent / "run.json", {"settings": 3})
    with pytest.raises(RunError, match=r"run\.json is not a run's"):
        read_run(silent, "silent")


def test_results_of_another_command_are_not_written_over(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", until=20)
    out = tmp_path / "out"
    report([run], out, command="")
    assert json.loads((out / "results.json").read_text())["kind"] == KIND
    write_json(out / "results.json", {"kind": "comparison"})
    with pytest.raises(RunError, match=r"holds the results of another command \(comparison\)"):
        report([run], out, command="")


def test_numbers_that_were_not_finite_leave_gaps(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "heavy_ball", until=20)
    with MetricsLog(folder / "metrics.jsonl") as log:
        log.write(
            "train", step=30, tokens=30, seconds=1.0, loss=math.nan, gradient_norm=math.inf,
            scalars={"beta": {"attention": [math.nan] * 3, "mlp": [math.nan] * 3}},
        )  # fmt: skip
    read = read_run(folder, "run")
    assert read["train"]["loss"][-1] is None
    assert read["train"]["scalars"]["beta"]["mean"][-1] is None
    check_text(render(gather([read], command="")))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("width", "theme"), [(390, "light"), (390, "dark"), (1280, "dark")])
def test_a_browser_shows_the_page(
    browser: Any, rendered: Any, case: str, width: int, theme: str
) -> None:
    check_in_browser(browser, rendered(case)[1] / "report.html", width, theme)


@pytest.mark.parametrize("case", CASES)
def test_no_text_of_a_figure_is_cut(browser: Any, rendered: Any, case: str) -> None:
    check_figures_in_browser(browser, rendered(case)[1] / "report.html")
