"""Figures of a landscape study: properties against each other, and persistence by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from polyak.report.figures import SIZE, Panel, drawn
from polyak.report.svg import color, styles
from polyak.study.runs import figures as run_figures


def scatter(axes: Axes, results: Mapping[str, Any], x: str, y: str) -> bool:
    """One property of every run against another; the larger mark is an entry's mean."""
    labels = {wanted["key"]: wanted["label"] for wanted in results["properties"]}
    if x not in labels or y not in labels:
        return False
    drawn, values = 0, []
    for name, style in styles(results).items():
        own = [run["values"] for run in results["runs"] if run["entry"] == name]
        found = [(run[x], run[y]) for run in own if run[x] is not None and run[y] is not None]
        if not found:
            continue
        points = np.asarray(found, dtype=np.float64)
        values.append(points)
        drawn += len(points)
        axes.plot(*points.T, style.marker, color=style.color, markersize=4, alpha=0.45)
        axes.plot(*points.mean(0), style.marker, color=style.color, markersize=8)
    if drawn < 2:
        return False
    every = np.concatenate(values)
    for side, column in (("x", every[:, 0]), ("y", every[:, 1])):
        if column.min() > 0 and column.max() > 10 * column.min():
            getattr(axes, f"set_{side}scale")("log")
        else:
            getattr(axes, f"{side}axis").set_major_locator(MaxNLocator(nbins=4))
    axes.set_xlabel(labels[x])
    axes.set_ylabel(labels[y])
    axes.margins(0.08)
    return True


def by_layer(axes: Axes, results: Mapping[str, Any], series: Sequence[Sequence[Any]]) -> bool:
    """A number per layer of every run that has it; gaps where a layer has a bound only."""
    chosen, layers = styles(results), 0
    for run, values in zip(results["runs"], series, strict=True):
        if not values or all(value is None for value in values):
            continue
        style = chosen[run["entry"]]
        heights = [np.nan if value is None else value for value in values]
        places = np.arange(1, len(heights) + 1)
        axes.plot(
            places,
            heights,
            color=style.color,
            linestyle=style.line,
            marker=style.marker,
            markersize=4.5,
            linewidth=1.3,
        )
        layers = max(layers, len(heights))
    if not layers:
        return False
    axes.axhline(0, color=color("muted"), linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(layers, 8)))
    axes.set_xlabel("layer")
    axes.set_ylabel("log of the smallest singular value")
    return True


def all_figures(
    results: Mapping[str, Any],
    pairs: Sequence[tuple[str, str]],
    layers: Mapping[str, Sequence[Sequence[Any]]],
) -> dict[str, Markup]:
    """Every figure of the page that has something to show.

    Args:
        results: of the study, completed.
        pairs: properties to draw against each other, as (horizontal, vertical).
        layers: name → for each run, a number per layer.
    """
    title = "Validation loss against training tokens"
    panels = [Panel("curve-tokens", title, run_figures.loss, ("curve", "tokens"))]
    for x, y in pairs:
        svg = f"scatter-{x}-{y}".replace("_", "-")
        panels.append(Panel(f"{x}-{y}", f"{y} against {x}", scatter, (x, y), svg=svg))
    for name, series in layers.items():
        title = f"Minimum gain by layer, {name}"
        panels.append(Panel(f"layers-{name}", title, by_layer, (series,), (SIZE[0], 3.2)))
    return drawn(results, panels)
