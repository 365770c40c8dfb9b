"""The page: what it says, that it is one file, and how a browser shows it."""

from __future__ import annotations

import copy
import re
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from polyak.compare.page import render, write_picture, write_report
from polyak.errors import PolyakError
from polyak.report.svg import PALETTE
from polyak.statistics.verdict import complete
from tests.made_up_results import fail, grid, made_up
from tests.pages import Page, check_figures_in_browser, check_in_browser, check_text

PAIR = ["gradient_descent", "triple_momentum"]


def partial() -> dict[str, Any]:
    """A study under way: a failure, runs waiting, one half done, costs not measured yet."""
    results = fail(made_up(status="partial"), "adam", 1)
    for run in results["runs"]:
        if run["seed"] == 2 or run["entry"] == "nesterov":
            run.update(status="pending", seconds=None, curve={k: [] for k in run["curve"]})
    running = next(r for r in results["runs"] if r["entry"] == "heavy_ball" and r["seed"] == 1)
    running["status"] = "running"
    running["curve"] = {key: values[:9] for key, values in running["curve"].items()}
    for entry in results["entries"]:
        entry.update(tokens_per_second=None, peak_memory_bytes=None, scalars=None, equation=None)
    return complete(results)


def nothing_yet() -> dict[str, Any]:
    """A study that has just begun."""
    results = copy.deepcopy(partial())
    for run in results["runs"]:
        run.update(status="pending", error=None, curve={})
    return complete(results)


def only_failures() -> dict[str, Any]:
    """Every run failed, before its first validation."""
    results = made_up(PAIR)
    for run in results["runs"]:
        fail(results, run["entry"], run["seed"], at=0)
    return complete(results)


CASES = {
    "family": lambda: complete(made_up(sweep=True)),
    "grid": lambda: complete(grid(made_up(sweep=True))),
    "quick": lambda: complete(made_up(PAIR)),
    "one seed": lambda: complete(made_up(PAIR, 1)),
    "partial": partial,
    "nothing yet": nothing_yet,
    "only failures": only_failures,
}


@lru_cache
def rendered(case: str) -> str:
    """The page of a case, made once."""
    return render(CASES[case]())


@pytest.mark.parametrize("case", CASES)
def test_every_stage_of_a_study_gives_one_well_formed_page(case: str) -> None:
    results = CASES[case]()
    text = rendered(case)
    assert results["verdict"]["sentence"] in Page(text).text
    check_text(text)


def test_the_page_has_all_that_a_rerun_needs_and_what_failed() -> None:
    results = complete(fail(made_up(sweep=True), "adam", 1))
    text = Page(render(results)).text
    for needed in (
        results["command"],
        results["corpus"]["fingerprint"],
        results["versions"]["torch"],
        results["machine"]["cpu"],
        results["commit"],
        "8 GiB",
        "loss became NaN at step 160",
        "What this cannot show",
        results["limits"][0],
        "training.muon_lr",
    ):
        assert needed in text, needed


def test_a_grid_shows_every_point_and_the_one_chosen() -> None:
    text = rendered("grid")
    for shown in ("training.muon_lr, training.adam_lr", "0.01, 0.003", "0.02, 0.001", "failed"):
        assert shown in Page(text).text, shown
    assert "training.muon_lr, at the best training.adam_lr" in text
    assert text.count("<td><strong>") == len(CASES["grid"]()["entries"])


def test_many_entries_with_long_names_fit_and_the_sentence_stays_short() -> None:
    rules = ["adaptive_residual_momentum", *(f"residual_momentum[mu=0.{n}25]" for n in range(4))]
    kinds = ("linear", "momentum", "adaptive_momentum", "softmax")
    names = [f"{r}@attention+gradient_descent[attention={k}]@mlp" for r in rules for k in kinds]
    results = complete(made_up(["gradient_descent", *names]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of figures whose axes have no room left
        render(results)
    sentence = results["verdict"]["sentence"]
    assert sentence.count("@mlp") <= 14
    assert " others " in sentence


def test_names_and_messages_are_escaped() -> None:
    name = "<script>alert(1)</script>&[x=1]"
    results = made_up(["gradient_descent", name])
    fail(results, name, 0)
    results["runs"][-3]["error"] = "<b>bold</b>"
    text = render(complete(results))
    assert "<script>alert" not in text
    assert "<b>bold" not in text
    assert name in Page(text).text


def test_the_same_results_give_the_same_page() -> None:
    assert render(CASES["quick"]()) == rendered("quick")


def test_figures_use_only_the_palette() -> None:
    text = rendered("family")
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", svgs)
    assert set(re.findall(r"var\(--([\w-]+)\)", svgs)) <= set(PALETTE)


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize("role", [role for role in PALETTE if role not in ("grid", "surface")])
def test_colours_contrast_with_the_surface(theme: int, role: str) -> None:
    one, two = sorted(luminance(PALETTE[name][theme]) for name in (role, "surface"))
    needed = 3.0 if role.startswith("series") else 4.5
    assert (two + 0.05) / (one + 0.05) >= needed


def test_the_report_replaces_the_one_before_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = write_report(CASES["nothing yet"](), tmp_path)
    before = path.read_text(encoding="utf-8")
    write_report(CASES["quick"](), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8") != before


def test_a_report_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(PolyakError, match=r"report\.html"):
        write_report(CASES["quick"](), tmp_path / "missing")


@pytest.mark.parametrize("case", ["family", "partial", "nothing yet"])
def test_the_picture_is_a_png(case: str, tmp_path: Path) -> None:
    path = write_picture(CASES[case](), tmp_path / "picture.png")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20], "big") >= 1600


# ---------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for case in CASES:
        (folder / f"{case}.html").write_text(rendered(case), encoding="utf-8")
    return {case: folder / f"{case}.html" for case in CASES}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("width", "theme"),
    [
        *((390, "light"), (1280, "dark")),
        *(
            pytest.param(*other, marks=pytest.mark.slow)
            for other in ((390, "dark"), (800, "light"))
        ),
    ],
)
def test_a_browser_shows_the_page(
    browser: Any, pages: dict[str, Path], case: str, width: int, theme: str
) -> None:
    check_in_browser(browser, pages[case], width, theme)


def test_no_text_of_a_figure_is_cut_or_overlaps_the_ticks(
    browser: Any, pages: dict[str, Path]
) -> None:
    for path in pages.values():
        check_figures_in_browser(browser, path)
