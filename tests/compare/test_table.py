from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from polyak.compare.table import print_table, table_text
from polyak.statistics.verdict import complete
from polyak.words import compact, folded, memory
from tests.made_up_results import FAMILY, fail, made_up

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
