"""`polyak compare` from beginning to end: real processes, real files, tiny models."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import (
    SETTINGS,
    TWIN,
    files,
    polyak,
    results_of,
    words,
    write_corpus,
)

from polyak import load_run
from polyak.cli._options import parse
from polyak.cli.main import main
from polyak.compare import speed
from polyak.compare.config import CompareConfig
from polyak.compare.plan import Plan, make_plan
from polyak.compare.run import command_of, compare
from polyak.compare.sweep import parse_grid, parse_sweep
from polyak.data.batches import TrainBatches
from polyak.data.prepare import prepare
from polyak.errors import ConfigError, PolyakError
from polyak.nn.cost import cost
from polyak.training.config.run import RunConfig

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="uses POSIX signals and locks")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a corpus, a file of rules and a cache, and the environment set to it."""
    folder = tmp_path_factory.mktemp("place")
    write_corpus(folder)
    (folder / "twin.py").write_text(TWIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYAK_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        yield folder


PAIR = "gradient_descent,triple_momentum"


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """A finished comparison, made by the command line in a process of its own."""
    out = place / "finished"
    done = polyak(*words(PAIR, out), cwd=place, cache=place / "cache")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    tables = done.stdout[done.stdout.index("Last validation loss") :].replace(str(out), "out")
    assert max(map(len, tables.splitlines())) <= 80  # lines of text stay whole without a terminal
    (out / "stdout.txt").write_text(done.stdout)
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    return out


# What is there in the end


def test_results_agree_with_the_run_folders(finished: Path) -> None:
    results = results_of(finished)
    assert results["status"] == "complete"
    assert results["baseline"] == "gradient_descent"
    assert [entry["name"] for entry in results["entries"]] == PAIR.split(",")
    assert [(run["entry"], run["seed"]) for run in results["runs"]] == [
        (entry, seed) for seed in (0, 1) for entry in PAIR.split(",")
    ]
    ends: dict[str, list[float]] = {}
    for run in results["runs"]:
        folder = finished / run["folder"]
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        checks = [row for row in rows if row["kind"] == "validation"]
        assert run["status"] == "finished"
        assert run["error"] is None
        assert run["curve"]["step"] == [2, 4, 6, 8]
        for key, values in run["curve"].items():
            assert values == [row[key] for row in checks]
        recorded = json.loads((folder / "result.json").read_text())
        assert recorded["loss"] == checks[-1]["loss"]
        assert run["seconds"] == recorded["seconds"]
        ends.setdefault(run["entry"], []).append(checks[-1]["loss"])
    for entry in results["entries"]:
        losses = ends[entry["name"]]
        assert entry["loss"]["mean"] == pytest.approx(statistics.fmean(losses))
        assert entry["loss"]["sd"] == pytest.approx(statistics.stdev(losses))
        assert entry["steps"] == 8
        assert entry["tokens_per_second"]["low"] <= entry["tokens_per_second"]["median"]
        assert entry["peak_memory_bytes"] > 1e7
    gaps = [a - b for a, b in zip(ends["triple_momentum"], ends["gradient_descent"], strict=True)]
    found = results["entries"][1]["difference"]
    assert found["mean"] == pytest.approx(statistics.fmean(gaps))
    mean_scalars = results["entries"][1]["scalars"]
    last = [
        json.loads((finished / run["folder"] / "metrics.jsonl").read_text().splitlines()[-1])
        for run in results["runs"]
        if run["entry"] == "triple_momentum"
    ]
    assert mean_scalars["mu"]["mlp"] == pytest.approx(
        [statistics.fmean(row["scalars"]["mu"]["mlp"][0] for row in last)]
    )


def test_results_say_how_to_repeat_them(finished: Path, place: Path) -> None:
    results = results_of(finished)
    assert results["command"].startswith("polyak compare --rules gradient_descent,triple_momentum")
    assert "training.batch_size=4" in results["command"]
    assert results["versions"].keys() >= {"polyak", "python", "torch"}
    assert results["machine"]["cores"] >= 1
    assert results["corpus"]["name"] == "corpus.txt"
    assert results["corpus"]["fingerprint"] == prepare(str(place / "corpus.txt")).fingerprint
    assert results["settings"]["seeds"] == [0, 1]
    assert results["settings"]["training"]["batch_size"] == 4


def test_report_and_terminal_show_both_entries(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    shown = (finished / "stdout.txt").read_text()
    for text in (page.replace("<wbr>", ""), shown):
        assert "gradient_descent" in text
        assert "triple_momentum" in text
    assert "Report: " in shown
    assert re.search(r"at a time: about [\d.]+ (s|min)", shown)  # the estimate that comes first


def test_every_run_can_be_loaded(finished: Path) -> None:
    for folder in sorted((finished / "runs").iterdir()):
        model, tokenizer = load_run(folder)
        assert folder.name.startswith(model.config.rule)
        assert tokenizer.name == "bytes"


def test_every_entry_is_given_the_same_batches(finished: Path, place: Path) -> None:
    data = prepare(str(place / "corpus.txt"))
    specs = {
        f.name: json.loads((f / "spec.json").read_text()) for f in (finished / "runs").iterdir()
    }
    for seed in (0, 1):
        batches = []
        for rule in PAIR.split(","):
            config = specs[f"{rule}-seed{seed}"]["config"]
            assert config["training"]["seed"] == seed
            batches.append(
                TrainBatches(
                    data.train,
                    config["model"]["context_length"],
                    config["training"]["batch_size"],
                    config["training"]["seed"],
                )
            )
        assert all((batches[0].batch(s) == batches[1].batch(s)).all() for s in range(8))
    first, second = (
        {**specs[f"{rule}-seed1"]["config"], "model": None} for rule in PAIR.split(",")
    )
    assert first == second


# Started again


def test_a_second_start_runs_nothing_and_keeps_every_number(
    copied: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, old = files(copied), results_of(copied)
    assert main(words(PAIR, copied)) == 0
    assert files(copied) == before
    new = results_of(copied)
    changing = {"updated", "command"}
    assert {k: v for k, v in new.items() if k not in changing} == {
        k: v for k, v in old.items() if k not in changing
    }
    shown = capsys.readouterr().out
    assert "4 of them finished already" in " ".join(shown.split())
    assert "Measuring" not in shown


def test_new_entries_and_seeds_run_alone_and_a_twin_sees_the_same_batches(
    copied: Path, place: Path
) -> None:
    before = files(copied)
    assert main(words("gradient_descent,twin.py:Twin", copied)) == 0
    assert main(words("gradient_descent", copied, seeds=3)) == 0
    after = files(copied)
    assert {path: after[path] for path in before} == before
    new = {path.parent.name for path in after if path not in before and path.suffix == ".jsonl"}
    assert new == {"Twin-seed0", "Twin-seed1", "gradient_descent-seed2"}
    # the same function under another name, in another process: equal to the last bit, so every
    # batch of every step was the same, and so were the first weights
    for seed in (0, 1):
        curves = [
            [
                (row["kind"], row["step"], row["loss"])
                for row in map(
                    json.loads,
                    (copied / "runs" / f"{name}-seed{seed}" / "metrics.jsonl")
                    .read_text()
                    .splitlines(),
                )
            ]
            for name in ("gradient_descent", "Twin")
        ]
        assert curves[0] == curves[1]
    assert "may print" in (copied / "runs" / "Twin-seed0" / "log.txt").read_text()
    results = results_of(copied)
    assert results["settings"]["seeds"] == [0, 1, 2]
    assert [run["status"] for run in results["runs"]] == ["finished"] * 3


def test_other_settings_in_the_same_folder_are_refused_before_any_work(
    copied: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    for more, difference in (
        (["--set", "training.muon_lr=0.5"], "training.muon_lr: 0.02 there, 0.5 now"),
        (["--set", "model.num_layers=2"], "model.num_layers: 1 there, 2 now"),
        (["--tokenizer", "bpe-290"], "model.vocab_size: 256 there, 290 now"),
    ):
        assert main(words(PAIR, copied, *more)) == 1
        shown = capsys.readouterr()
        assert shown.err.startswith("polyak compare: ")
        assert shown.err.count("\n") == 1
        assert "holds a run with other settings" in shown.err
        assert difference in shown.err
        assert "Measuring" not in shown.out
    assert before == {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}


def test_two_at_once_in_one_folder_are_refused(
    copied: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    with (copied / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(words(PAIR, copied)) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"polyak compare: {copied} is in use by another polyak compare")
    assert error.count("\n") == 1


# Budgets


def test_a_sweep_is_sorted_and_checked() -> None:
    assert parse_sweep("training.muon_lr=0.02, 0.01,0.04") == (
        "training.muon_lr",
        (0.01, 0.02, 0.04),
    )


def test_two_sweeps_are_their_grid() -> None:
    grid = parse_grid(["training.muon_lr=0.02,0.01", "training.adam_lr=0.1,0.3,0.2"])
    assert grid.label == "training.muon_lr, training.adam_lr"
    assert grid.points == [
        *[(0.01, 0.1), (0.01, 0.2), (0.01, 0.3)],
        *[(0.02, 0.1), (0.02, 0.2), (0.02, 0.3)],
    ]
    assert grid.shown((0.01, 0.2)) == [0.01, 0.2]
    assert grid.at_edge((0.01, 0.2))  # the smallest of the first field
    wide = parse_grid(["training.muon_lr=1,2,3", "training.adam_lr=1,2,3"])
    assert [point for point in wide.points if not wide.at_edge(point)] == [(2.0, 2.0)]
    training = grid.at(RunConfig(), (0.02, 0.3)).training
    assert (training.muon_lr, training.adam_lr) == (0.02, 0.3)
    with pytest.raises(ConfigError, match="muon_lr is swept twice; give its values in one"):
        parse_grid(["training.muon_lr=1,2", "training.muon_lr=3,4"])


def test_a_grid_has_a_run_for_each_point_and_each_entry_gets_its_own(place: Path) -> None:
    sweep = ("training.muon_lr=0.1,0.2", "training.adam_lr=0.1,0.2")
    plan = plan_of(place, "gradient_descent,adam", sweep=sweep)
    steps = plan.steps({})
    jobs = plan.sweep_jobs(steps)
    tried = {(j.config.training.muon_lr, j.config.training.adam_lr) for _, j in jobs}
    assert len(jobs) == 8
    assert tried == {(0.1, 0.1), (0.1, 0.2), (0.2, 0.1), (0.2, 0.2)}
    assert len({job.folder for _, job in jobs}) == 8
    runs = plan.run_jobs(steps, {"gradient_descent": (0.1, 0.2), "adam": (0.2, 0.1)})
    rates = {(j.entry, j.config.training.muon_lr, j.config.training.adam_lr) for j in runs}
    assert rates == {("gradient_descent", 0.1, 0.2), ("adam", 0.2, 0.1)}
    assert shlex.split(command_of(plan.config)).count("--sweep") == 2


def plan_of(place: Path, rules: str, **fields: Any) -> Plan:
    settings = tuple(word for word in SETTINGS if word != "--set")
    config = CompareConfig(
        rules=rules, corpus=str(place / "corpus.txt"), steps=100, set=settings, **fields
    )
    return make_plan(config)


def test_equal_tokens_are_equal_steps(place: Path) -> None:
    plan = plan_of(place, "gradient_descent,shampoo,adam")
    assert plan.steps({}) == {"gradient_descent": 100, "shampoo": 100, "adam": 100}


def test_equal_flops_are_equal_flops(place: Path) -> None:
    rules = "gradient_descent,shampoo,triple_momentum,gradient_descent[num_layers=3]"
    plan = plan_of(place, rules, match="flops")
    steps = plan.steps({})
    assert steps["gradient_descent"] == 100
    budget = 100 * cost(plan.baseline.model).training_flops_per_token
    for entry in plan.entries:
        price = cost(entry.model).training_flops_per_token
        assert abs(steps[entry.name] * price - budget) <= price / 2
    assert steps["triple_momentum"] == 100
    assert steps["gradient_descent[num_layers=3]"] < 80


def test_equal_seconds_follow_the_measured_speeds(place: Path) -> None:
    plan = plan_of(place, "gradient_descent,muon,adam", match="seconds")
    speeds = {
        name: {"median": median, "low": 1.0, "high": 9e9}
        for name, median in (("gradient_descent", 1000.0), ("muon", 250.0), ("adam", 2.0))
    }
    assert plan.steps(speeds) == {"gradient_descent": 100, "muon": 25, "adam": 1}


def test_equal_parameters_widen_the_baseline(place: Path) -> None:
    plan = plan_of(place, "gradient_descent,triple_momentum,adam", match="params")
    wide, other, _ = (cost(entry.model).total_parameters for entry in plan.entries)
    assert plan.baseline.model.d_model > 16
    assert plan.baseline.name == f"gradient_descent[d_model={plan.baseline.model.d_model}]"
    assert wide == pytest.approx(other, rel=0.1)
    assert set(plan.steps({}).values()) == {100}
    assert f"{wide:,} against {other:,}" in plan.notes[0]


def test_speeds_that_were_measured_are_kept_when_entries_are_added(place: Path) -> None:
    plan = plan_of(place, "gradient_descent,nesterov[frozen=mu+beta]", out=place / "speeds")
    plan.config.out.mkdir()
    ticks: list[int] = []

    def measuring(total: int) -> Callable[[], None]:
        ticks.append(total)
        return lambda: None

    first = speed.speeds_of(plan, measuring)
    speed.keep_speeds(plan, first)
    assert speed.speeds_of(plan, measuring) == first
    more = plan_of(place, "gradient_descent,adam", out=place / "speeds")
    second = speed.speeds_of(more, measuring)
    speed.keep_speeds(more, second)
    assert second["gradient_descent"] == first["gradient_descent"]
    assert speed.speeds_of(plan, measuring) == first
    assert ticks == [2 * speed.ROUNDS, speed.ROUNDS]


# From Python


def test_the_command_line_of_a_configuration_gives_it_back() -> None:
    for config in (
        CompareConfig(),
        CompareConfig(
            rules="gradient_descent,triple_momentum[stream_start=zeros]",
            seeds=5,
            steps=7,
            match="flops",
            out=Path("a b/c"),
            sweep="training.muon_lr=0.1,0.2",
            jobs=3,
            set=("model.num_layers=2", "training.clip=0.5"),
        ),
        CompareConfig(quick=True, device="cpu"),
    ):
        typed = shlex.split(command_of(config))
        assert typed[:2] == ["polyak", "compare"]
        assert parse(CompareConfig, "compare", typed[2:], "") == config


def test_the_function_returns_what_it_writes(copied: Path, place: Path) -> None:
    settings = tuple(word for word in SETTINGS if word != "--set")
    config = CompareConfig(
        rules=PAIR, corpus="corpus.txt", seeds=2, steps=8, out=copied, set=settings, device="cpu"
    )
    results = compare(config)
    assert json.loads(json.dumps(results)) == results_of(copied)
    assert results["command"].startswith("polyak compare --rules")
    bad = dataclasses.replace(config, corpus="nowhere.txt")
    with pytest.raises(PolyakError, match="nowhere"):
        compare(bad)


@pytest.mark.slow
def test_a_rule_that_is_edited_or_deleted_meanwhile_is_the_copy_for_all_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    rule = tmp_path / "own.py"
    rule.write_text("from helper import SCALE\n" + TWIN.replace("oracle(x)", "SCALE * oracle(x)"))
    helper = tmp_path / "helper.py"
    helper.write_text("SCALE = 1.0\n")

    def run(seeds: int, said: str | None) -> dict[str, Any]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert main(words("own.py:Twin", tmp_path / "out", seeds=seeds, steps=2)) == 0
        assert capsys.readouterr().err == ""
        found = {str(w.message) for w in caught if w.category is UserWarning}
        assert len(found) == (said is not None)
        assert all(said is not None and said in message for message in found)
        return results_of(tmp_path / "out")

    (first,) = run(1, None)["entries"]
    helper.write_text("SCALE = 0.1\n")
    (second,) = run(2, "own.py has changed since it was copied into")["entries"]
    rule.unlink()
    third = run(3, None)
    assert first["rule_source"] == second["rule_source"] == third["entries"][0]["rule_source"]
    settings = [
        json.loads((tmp_path / "out" / "runs" / f"Twin-seed{n}" / "run.json").read_text())
        for n in range(3)
    ]
    assert {run["settings"]["rule_source"] for run in settings} == {first["rule_source"]}
    code = first["rule_source"][:12]
    for folder in (tmp_path / "out", *(tmp_path / "out" / "runs").iterdir()):
        assert (folder / "code" / code / "helper.py").read_text() == "SCALE = 1.0\n"
