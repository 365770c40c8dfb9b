"""The tables, figures and page of `polyak spectrum`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from polyak.data.left_out import lines
from polyak.report.pages import draw
from polyak.report.tables import house_table
from polyak.study.sharpness.page import number
from polyak.study.spectrum.figures import TITLES, all_figures, residual, spectra_of
from polyak.words import NONE, folded, plural

NAME = 18
SIGNS = {"lower bound": "≥ ", "upper bound": "≤ "}


def estimate(value: Mapping[str, Any] | None) -> str:
    """A value; `≤` or `≥` in front of a bound."""
    if not value or value["value"] is None:
        return NONE
    return SIGNS.get(value["kind"], "") + number(value["value"])


def published(found: Mapping[str, Any]) -> float | None:
    """The mean of the published statistic's draws."""
    draws = found["published"]
    return sum(draws) / len(draws) if draws else None


def tables(results: Mapping[str, Any]) -> RenderableType:
    """What the terminal shows, 80 columns wide: the first sequence, and Σ log σ_min of all."""
    shown: list[RenderableType] = []
    for part, title in TITLES.items():
        table = house_table(
            f"{title}; ≤ and ≥ are bounds",
            *("", "block", "σ max", "σ min", "κ", "stable", "zeros", "11th/74"),
        )
        for run in results["runs"]:
            for sequence, block, own, found in spectra_of(run):
                if sequence == "0" and own == part:
                    table.add_row(
                        Text(folded(run["name"], NAME)),
                        "all" if block == "product" else block,
                        estimate(found["sigma_max"]),
                        estimate(found["sigma_min"]),
                        estimate(found["kappa"]),
                        estimate(found["stable_rank"]),
                        zeros(found),
                        number(published(found)),
                    )
        if table.row_count:
            shown.append(table)
    table = house_table("Minimum-gain persistence Σ log σ_min", "", "sequence", "(a)", "(b)")
    for run in results["runs"]:
        kept = run.get("persistence") or {}
        for sequence in sorted({s for by in kept.values() for s in by}, key=int):
            totals = [kept.get(part, {}).get(sequence, {}).get("total") for part in "ab"]
            table.add_row(Text(folded(run["name"], NAME)), sequence, *map(estimate, totals))
    if table.row_count:
        shown.append(table)
    return Group(*shown, *(Text(line) for line in warnings(results)))


def zeros(found: Mapping[str, Any]) -> str:
    """`128 + 128`: exact zeros, and those of the size of eps over the variance."""
    exact, near = found["exact_zeros"], found["near_zeros"]
    return NONE if not exact else f"{exact}+{near}" if near else str(exact)


def warnings(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before comparing."""
    said = lines([run["tokens"] for run in results["runs"]])
    tokens = {run["tokens"]["fingerprint"] for run in results["runs"]}
    if len(tokens) > 1:
        said.append("The runs are measured on different tokens.")
    bounds = sum(
        found["sigma_min"]["kind"] != "value"
        for run in results["runs"]
        for *_, found in spectra_of(run)
    )
    if bounds:
        said.append(
            f"{plural(bounds, 'smallest singular value')} given as a bound: too small for the "
            "arithmetic, or not converged."
        )
    return said


def sentence(results: Mapping[str, Any]) -> str:
    """What the page says first."""
    count = sum(1 for run in results["runs"] for _ in spectra_of(run))
    what = "1 spectrum" if count == 1 else f"{count} spectra"
    return f"{plural(len(results['runs']), 'run')}, {what}."


def render(results: Mapping[str, Any]) -> str:
    """The page for `results`, the content of results.json."""
    return draw(
        "spectrum.html",
        results,
        figures=all_figures(results),
        sentence=sentence(results),
        warnings=warnings(results),
        titles=TITLES,
        rows=[(run["name"], *one) for run in results["runs"] for one in spectra_of(run)],
        number=number,
        estimate=estimate,
        residual=residual,
        zeros=zeros,
        published=published,
        settings=list(results["settings"].items()),
    )
