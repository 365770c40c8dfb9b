"""Figures of `polyak spectrum`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from polyak.report.figures import Panel, drawn
from polyak.report.svg import styles

TITLES = {
    "a": "(a) x to x, streams frozen",
    "b": "(b) x and all streams",
    "c": "(c) residual oracle",
}


def median(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantile nearest to one half."""
    quantiles: list[dict[str, Any]] = found["quantiles"]
    return min(quantiles, key=lambda one: abs(one["q"] - 0.5)) if quantiles else None


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
    kinds = (
        ("gains", "Log of the smallest singular value by block", gains),
        ("spectra", "Singular values by block", spectrum_curves),
    )
    return drawn(
        results,
        (
            Panel(f"{name}-{part}", f"{title}, {TITLES[part]}", draw, (part,))
            for part in TITLES
            for name, title, draw in kinds
        ),
    )


def residual(value: Mapping[str, Any]) -> str:
    """` (3e-12)`, the relative residual of a singular value; nothing where there is none."""
    return "" if value["residual"] is None else f" ({value['residual']:.0e})"


def spectra_of(run: Mapping[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(sequence, block, part, spectrum) of everything found of a run."""
    for key, found in (run.get("found") or {}).items():
        sequence, block, part = key.split("/")
        yield sequence, block, part, found
