"""`polyak study factorial`: grids read and refused, results taken apart, a real one trained."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_results import made_up
from tiny_runs import SETTINGS, write_corpus

from polyak import ModelConfig
from polyak.cli.main import main
from polyak.compare.config import CompareConfig
from polyak.errors import ConfigError
from polyak.report.tables import as_text
from polyak.statistics.verdict import complete
from polyak.study.factorial.grid import Factor, cells_of, parse_factors, with_options
from polyak.study.factorial.measure import factorial, gather
from polyak.study.factorial.page import render, tables, write_tables

GRID = "rule=gradient_descent[update_norm=layer],spherical,nesterov;embedding_norm=none,layer"


def found_in(
    effects: tuple[float, ...] = (0.0, -0.1, 0.0), norm: float = -0.05, **more: Any
) -> dict[str, Any]:
    """A study of made-up runs: what each rule and the norm add is known."""
    factors = parse_factors(GRID)
    cells = cells_of(factors, "", ModelConfig())
    names = [cell.entry.name for cell in cells]
    comparison = made_up(names, **{"seeds": 4, "sd": 0.004, **more})
    add = {cell.entry.name: effects[cell.levels[0]] + norm * cell.levels[1] for cell in cells}
    for run in comparison["runs"]:
        run["curve"]["loss"] = [x + add[run["entry"]] for x in run["curve"]["loss"]]
    comparison = complete({**comparison, "status": "complete"})
    return gather(comparison, factors, cells, order=2, command="polyak …", created="2026-01-01")


def test_factors_are_read_with_levels_in_brackets() -> None:
    assert parse_factors(GRID + ";") == (
        Factor("rule", ("gradient_descent[update_norm=layer]", "spherical", "nesterov")),
        Factor("embedding_norm", ("none", "layer")),
    )


def test_a_cell_is_an_entry_with_all_of_its_options() -> None:
    cells = cells_of(parse_factors(GRID), "", ModelConfig())
    assert [cell.levels for cell in cells] == [(r, n) for r in range(3) for n in range(2)]
    assert cells[1].text == "gradient_descent[update_norm=layer,embedding_norm=layer]"
    assert cells[1].entry.model.rule_options == {"update_norm": "layer"}
    assert cells[5].entry.model == ModelConfig(rule="nesterov", embedding_norm="layer")
    start = parse_factors("stream_start=zeros,x,none;mu=0.1,0.9")
    fixed = cells_of(start, "triple_momentum[nu=0.5]", ModelConfig(num_layers=2))
    assert fixed[3].entry.model == ModelConfig(
        rule="triple_momentum", num_layers=2, stream_start="x", rule_options={"nu": 0.5, "mu": 0.9}
    )
    assert with_options("adam@1+heavy_ball[beta=0.5]@mlp", "bias=true") == (
        "adam@1+heavy_ball[beta=0.5,bias=true]@mlp"
    )
    assert with_options("adam", "") == "adam"


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (" ; ", "nothing differs; name at least one factor"),
        ("rule", "cannot read 'rule'; write NAME=LEVEL,LEVEL"),
        ("bias=", "cannot read 'bias='; write NAME=LEVEL,LEVEL"),
        ("bias=true", "bias has one level, true; .* with --set model.bias=true"),
        ("rule=adam", "rule has one level, adam; .* with --rule adam"),
        ("bias=true,true", "bias has the level true twice"),
        ("bias=true,false;bias=true,false", "bias is named twice"),
        ("embeding_norm=none,layer", "unknown factor 'embeding_norm'; did you mean 'embedding_no"),
        ("rule=adam,adan", "unknown rule 'adan'; did you mean 'adam'"),
        ("rule=gradient_descent,adam;stream_start=zeros,x", "the cell gradient_descent.stream_st"),
        ("mu=0.5,1.5;rule=nesterov,triple_momentum", "the cell nesterov.mu=1.5. cannot be built:"),
        ("context_length=8,16", "the cell gradient_descent.context_length=8. cannot be built: "),
    ],
)
def test_grids_that_cannot_be_are_one_line(factors: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        factorial(CompareConfig(out=tmp_path / "out"), factors)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_matched_parameters_and_no_order_are_refused(tmp_path: Path) -> None:
    config = CompareConfig(out=tmp_path / "out", match="params")
    with pytest.raises(ConfigError, match="match='params' would change one cell of the grid"):
        factorial(config, GRID)
    with pytest.raises(ConfigError, match="order=0 must be a whole number of at least 1"):
        factorial(CompareConfig(out=tmp_path / "out"), GRID, order=0)


def test_made_up_effects_are_found_and_their_absence_is_said() -> None:
    found = found_in()
    effects = {row["name"]: row for row in found["effects"]}
    assert list(effects) == [
        *("rule=spherical", "rule=nesterov", "embedding_norm=layer"),
        "rule=spherical × embedding_norm=layer",
        "rule=nesterov × embedding_norm=layer",
    ]
    assert effects["rule=spherical"]["verdict"] == "lowers"
    assert effects["embedding_norm=layer"]["verdict"] == "lowers"
    assert effects["rule=spherical × embedding_norm=layer"]["verdict"] == "unclear"
    table = np.array([list(cell["loss"]["per_seed"].values()) for cell in found["entries"]]).mean(1)
    by_hand = table[[1, 3, 5]].mean() - table[[0, 2, 4]].mean()
    assert effects["embedding_norm=layer"]["mean"] == pytest.approx(by_hand)
    assert [term["name"] for term in found["terms"]][-1] == "rule × embedding_norm"
    assert sum(term["share"] for term in found["terms"]) == pytest.approx(1)
    assert "embedding_norm=layer lowers the loss by 0.0" in found["sentence"]
    nothing = found_in((0.0, 0.0, 0.0), 0.0, sd=0.05)
    assert "effects can be told apart from noise" in nothing["sentence"] or any(
        row["verdict"] != "unclear" for row in nothing["effects"]
    )


def test_a_seed_that_a_cell_is_missing_of_is_left_out_and_said() -> None:
    factors = parse_factors(GRID)
    cells = cells_of(factors, "", ModelConfig())
    comparison = made_up([cell.entry.name for cell in cells], seeds=3)
    last = comparison["runs"][-1]
    last.update(status="failed", error="the loss is not finite")
    comparison = complete({**comparison, "status": "complete"})
    found = gather(comparison, factors, cells, order=2, command="", created="2026-01-01")
    assert len(found["seeds"]) == 2
    (line,) = found["left_out"]
    assert "is left out: 1 of 6 cells have no last loss" in line
    assert "the loss is not finite" in line
    for run in comparison["runs"]:
        run["status"] = "pending"
    nothing = gather(complete(comparison), factors, cells, order=2, command="", created="2026")
    assert nothing["sentence"].startswith("Nothing can be said yet")
    assert "Nothing can be said yet" in render(nothing)
    assert as_text(tables(nothing))


def test_terminal_page_and_files_hold_the_same(tmp_path: Path) -> None:
    found = found_in(sweep=True)
    text = as_text(tables(found), 80)
    assert max(map(len, text.splitlines())) <= 80
    page = render(found)
    for row in found["effects"]:
        assert row["verdict"] in text
    for figure in ("effects", "interactions", "means-0-1"):
        assert f'id="{figure}-title"' in page
    assert "://" not in page.replace("http://www.w3.org", "")
    write_tables(tmp_path, found)
    with (tmp_path / "effects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["mean"]) for row in rows] == [row["mean"] for row in found["effects"]]
    with (tmp_path / "cells.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == 6 * 4
    assert cells[0]["rule"] == "gradient_descent[update_norm=layer]"
    assert len((tmp_path / "variance.csv").read_text().splitlines()) == 4
    json.dumps(found, allow_nan=False)


@pytest.mark.slow
def test_a_small_grid_is_trained_and_goes_on_with_more_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYAK_CACHE", str(tmp_path / "cache"))
    out, corpus = tmp_path / "out", write_corpus(tmp_path)
    line = ["study", "factorial", "--factors", "embedding_norm=none,layer;bias=false,true"]
    line += ["--corpus", str(corpus), "--steps", "4", "--out", str(out), "--jobs", "1"]
    line += ["--device", "cpu", *SETTINGS]
    assert main([*line, "--seeds", "1"]) == 0
    assert "One seed cannot tell an effect from noise" in capsys.readouterr().out
    before = (out / "comparison/runs").stat().st_mtime_ns
    assert main([*line, "--seeds", "2"]) == 0
    said = capsys.readouterr().out
    assert "4 of them finished already" in said
    assert (out / "comparison/runs").stat().st_mtime_ns != before
    found = json.loads((out / "results.json").read_text())
    assert (found["kind"], found["status"]) == ("factorial", "complete")
    assert found["seeds"] == [0, 1]
    assert all(row["low"] < row["mean"] < row["high"] for row in found["effects"])
    assert (out / "report.html").is_file()
    assert len((out / "cells.csv").read_text().splitlines()) == 1 + 8
