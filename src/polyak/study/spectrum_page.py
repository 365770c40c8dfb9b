"""The tables, figures and page of `polyak spectrum`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich.console import Group, RenderableType
from rich.text import Text

from polyak.study import svg
from polyak.study.figures import single
from polyak.study.pages import environment, machine_of
from polyak.study.sharpness_page import number
from polyak.study.svg import styles
from polyak.study.table import house_table
from polyak.study.words import NONE, folded, plural

NAME = 18
TITLES = {
    "a": "(a) x to x, streams frozen",
    "b": "(b) x and all streams",
    "c": "(c) residual oracle",
}
SIGNS = {"lower bound": "≥ ", "upper bound": "≤ "}


def estimate(value: Mapping[str, Any] | None) -> str:
    """A value; `≤` or `≥` in front of a bound."""
    if not value or value["value"] is None:
        return NONE
    return SIGNS.get(value["kind"], "") + number(value["value"])


def residual(value: Mapping[str, Any]) -> str:
    """` (3e-12)`, the relative residual of a singular value; nothing where there is none."""
    return "" if value["residual"] is None else f" ({value['residual']:.0e})"


def spectra_of(run: Mapping[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(sequence, block, part, spectrum) of everything found of a run."""
    for key, found in (run.get("found") or {}).items():
        sequence, block, part = key.split("/")
        yield sequence, block, part, found


def median(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantile nearest to one half."""
    quantiles: list[dict[str, Any]] = found["quantiles"]
    return min(quantiles, key=lambda one: abs(one["q"] - 0.5)) if quantiles else None


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
    said = []
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


def _layers(run: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    return [
        found
        for sequence, block, own, found in spectra_of(run)
        if sequence == "0" and own == part and block != "product"
    ]


def gains(axes: Axes, results: Mapping[str, Any], part: str) -> bool:
    """Log σ_min by layer; a bound is an arrow downwards."""
    chosen, any_ = styles(results), False
    for run in results["runs"]:
        layers = _layers(run, part)
        logs = [one["log_sigma_min"] for one in layers]
        points = [(i, log) for i, log in enumerate(logs) if log["value"] is not None]
        if not points:
            continue
        any_, style = True, chosen[run["name"]]
        xs, ys = [i for i, _ in points], [log["value"] for _, log in points]
        axes.plot(xs, ys, color=style.color, linestyle=style.line, linewidth=1.4)
        for kind, marker in (("value", style.marker), ("upper bound", "v")):
            at = [(i, log["value"]) for i, log in points if log["kind"] == kind]
            if at:
                axes.plot(*zip(*at, strict=True), marker, color=style.color, markersize=5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("block")
    axes.set_ylabel("log σ_min")
    return any_


def spectrum_curves(axes: Axes, results: Mapping[str, Any], part: str) -> bool:
    """σ_max, median and σ_min by layer, on a logarithmic axis."""
    chosen, any_ = styles(results), False
    for run in results["runs"]:
        layers, style = _layers(run, part), chosen[run["name"]]
        for pick, width in (("sigma_max", 1.0), ("median", 1.8), ("sigma_min", 1.0)):
            ys = [
                (median(one) or {}).get("value") if pick == "median" else one[pick]["value"]
                for one in layers
            ]
            points = [(i, y) for i, y in enumerate(ys) if y]
            if points:
                any_ = True
                axes.plot(
                    *zip(*points, strict=True),
                    color=style.color,
                    linestyle=style.line,
                    linewidth=width,
                )
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("block")
    axes.set_ylabel("singular value")
    return any_


def all_figures(results: Mapping[str, Any]) -> dict[str, Markup]:
    """Every figure of the page that has something to show, by name."""
    made = {}
    for part in TITLES:
        for name, title, draw in (
            ("gains", "Log of the smallest singular value by block", gains),
            ("spectra", "Singular values by block", spectrum_curves),
        ):
            made[f"{name}-{part}"] = single(
                f"{name}-{part}",
                f"{title}, {TITLES[part]}",
                lambda axes, draw=draw, part=part: draw(axes, results, part),  # type: ignore[misc]
            )
    return {name: Markup(figure) for name, figure in made.items() if figure}


def render(results: Mapping[str, Any]) -> str:
    """The page for `results`, the content of results.json."""
    rows = [(run["name"], *one) for run in results["runs"] for one in spectra_of(run)]
    return (
        environment()
        .get_template("spectrum.html")
        .render(
            r=results,
            keys={name: Markup(svg.key(style)) for name, style in svg.styles(results).items()},
            figures=all_figures(results),
            sentence=sentence(results),
            warnings=warnings(results),
            titles=TITLES,
            rows=rows,
            number=number,
            estimate=estimate,
            residual=residual,
            zeros=zeros,
            published=published,
            settings=list(results["settings"].items()),
            machine=machine_of(results),
        )
    )
