from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from polyak.compare.table import print_table, table_text
from polyak.statistics.verdict import complete
from polyak.words import compact, folded, memory
from tests.made_up_results import FAMILY, fail, grid, made_up

LONG = [
    "gradient_descent",
    "experiments/a_rather_deep_folder/my_rule.py:MyVeryOwnUpdateRule[state_norm=none,gamma=0.25]",
]


@pytest.mark.parametrize("names", [list(FAMILY), LONG, ["gradient_descent", "adam"]])
def test_every_line_fits_80_columns_and_nothing_is_cut(names: list[str]) -> None:
    results = complete(made_up(names, sd=0.02))
    # the widest numbers that a real study may have
    results["entries"][1]["parameters"] = 163_812_192
    results["entries"][1]["tokens_per_second"]["median"] = 1_234_567.0
    results["entries"][1]["peak_memory_bytes"] = 71_234_567_890
    text = table_text(results)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    together = re.sub(r"[\s]", "", text)
    for entry in results["entries"]:
        gap = entry["difference"]
        if gap:
            assert f"{abs(gap['high']):.3f}" in text
        assert f"{entry['loss']['mean']:.4f} ± {entry['loss']['sd']:.4f}" in text or (
            f"{entry['loss']['mean']:.3f} ± {entry['loss']['sd']:.3f}" in text
        )
    assert "163.8M" in together or "164M" in together


@pytest.mark.parametrize("name", [*FAMILY, LONG[1]])
def test_folding_keeps_every_character_of_a_name(name: str) -> None:
    lines = folded(name, 22).split("\n")
    assert "".join(lines) == name
    assert max(map(len, lines)) <= 22


def test_one_seed_and_no_runs_print_dashes_instead_of_intervals() -> None:
    one = table_text(complete(made_up(["gradient_descent", "adam"], 1)))
    assert "±" not in "".join(one.split("mean ± s.d.")[1:])
    assert "One seed cannot tell" in one
    results = made_up(["gradient_descent", "adam"], status="partial")
    for run in results["runs"]:
        run["status"], run["curve"] = "pending", {"step": [], "tokens": [], "loss": []}
    assert "Nothing can be compared yet" in table_text(complete(results))


def test_failures_are_printed() -> None:
    text = table_text(complete(fail(made_up(["gradient_descent", "adam"]), "adam", 2)))
    assert "loss became NaN at step 160" in text


@pytest.mark.parametrize("width", [80, 120])
def test_printing_never_uses_more_than_80_columns(width: int) -> None:
    stream = io.StringIO()
    print_table(complete(made_up()), Console(file=stream, width=width, color_system=None))
    assert max(len(line.rstrip()) for line in stream.getvalue().splitlines()) <= 80


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (999, "999"),
        (856_960, "857k"),
        (999_950, "1.00M"),
        (5_308_416, "5.31M"),
    ],
)
def test_quantities_have_three_digits(value: Any, text: str) -> None:
    assert compact(value) == text


def test_memory_is_in_binary_units() -> None:
    assert memory(412 * 2**20) == "412 MiB"
    assert memory(3 * 2**30 / 2) == "1.50 GiB"


@pytest.mark.parametrize("names", [list(FAMILY), LONG])
@pytest.mark.parametrize("width", [40, 60])
def test_no_number_is_cut_where_the_terminal_is_narrow(names: list[str], width: int) -> None:
    results = complete(made_up(names, sd=0.02))
    wide, narrow = table_text(results, 300), table_text(results, width)
    assert max(map(len, narrow.splitlines())) <= width
    assert "…" not in narrow
    numbers = re.findall(r"[−\d][\d.,]*[kMGT%]?", wide.split(" at equal tokens")[0])
    assert len(numbers) > 10
    missing = [number for number in numbers if number not in narrow.split()]
    assert [m for m in missing if m not in re.sub(r"[^−\d.,kMGT%]", " ", narrow).split()] == []


def test_a_sweep_shows_what_was_tried_and_chosen_and_the_edge_of_the_grid() -> None:
    results = complete(made_up(["gradient_descent", "adam"], sd=0.02))
    for entry, chosen in zip(results["entries"], (0.03, None), strict=True):
        entry["sweep"] = {
            "field": "training.adam_lr",
            "values": [1e-06, 0.01, 0.03],
            "losses": [5.1, 4.25, None] if chosen is None else [5.1, 4.25, 4.125],
            "chosen": chosen,
            "seeds": [1000, 1001],
            "at_edge": chosen is not None,
        }
    lines = table_text(results).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("training.adam_lr: "))
    assert "2 seeds of their own" in lines[start]
    rows = [line.split() for line in lines[start : start + 8]]
    assert ["1e-06", "0.01", "0.03", "chosen"] in rows
    edge = ["at", "the", "edge", "of", "the", "grid"]
    assert ["gradient_descent", "5.1000", "4.2500", "4.1250", "0.03", *edge] in rows
    assert ["adam", "5.1000", "4.2500", "–", "none", "works"] in rows


def test_a_grid_shows_each_point() -> None:
    text = table_text(grid(complete(made_up(sweep=True))), 300)
    assert "training.muon_lr, training.adam_lr: last validation loss" in text
    assert "0.02 × 0.001" in text
    row = next(line for line in text.splitlines() if "at the edge of the grid" in line)
    assert "0.01 × 0.003" in row
