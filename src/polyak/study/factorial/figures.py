"""Figures of a factorial study: effects with their intervals, and the cells' means."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from polyak.report.figures import Panel, drawn, row_name, rows_axes, rows_size
from polyak.report.svg import DASHES, MARKERS, SERIES, Style, color


def forest(axes: Axes, results: Mapping[str, Any], several: bool) -> bool:
    """Effects of single factors, or interactions of `several`, with simultaneous intervals."""
    rows = [row for row in results["effects"] if (len(row["factors"]) > 1) == several]
    if not rows:
        return False
    axes.axvline(0, color=color("ink"), linewidth=1.2, zorder=1)
    for place, row in enumerate(rows):
        shade = color("series-1" if not several else "series-4")
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [place, place], color=shade, linewidth=1.8)
        clear = row["verdict"] in ("lowers", "raises")
        face = shade if clear else color("surface")
        axes.plot([row["mean"]], [place], "o", color=shade, markersize=7, markerfacecolor=face)
        row_name(axes, row["name"], place, 0.85)
    rows_axes(axes, -0.95, len(rows) - 0.5, "effect on the loss (nats/token); left is better")
    return True


def means(axes: Axes, results: Mapping[str, Any], across: int, lines: int | None) -> bool:
    """Mean losses by one factor's level, a line for each level of another; over the others' cells.

    Parallel lines are what no interaction looks like.
    """
    factor = results["factors"][across]
    other = None if lines is None else results["factors"][lines]
    drew = False
    for place, level in enumerate([None] if other is None else other["levels"]):
        heights = []
        for at in factor["levels"]:
            cells = [
                cell["loss"]["mean"]
                for cell in results["entries"]
                if cell["loss"]
                and cell["levels"][across] == at
                and (lines is None or cell["levels"][lines] == level)
            ]
            heights.append(np.mean(cells) if cells else np.nan)
        style = Style(
            SERIES[place % len(SERIES)], DASHES[place % len(DASHES)], MARKERS[place % len(MARKERS)]
        )
        axes.plot(
            range(len(heights)),
            heights,
            color=style.color,
            linestyle=style.line,
            marker=style.marker,
            label=level,
        )
        drew = drew or bool(np.isfinite(heights).any())
    axes.set_xticks(range(len(factor["levels"])), _short(factor["levels"]))
    axes.margins(x=0.15)
    axes.set_xlabel(factor["name"])
    axes.set_ylabel("validation loss (nats/token)")
    if other is not None:
        axes.legend(title=other["name"], fontsize="small", title_fontsize="small", frameon=False)
    return drew


def _short(levels: list[str]) -> list[str]:
    """Levels as ticks: long ones broken where their brackets begin."""
    return [level.replace("[", "\n[") if len(level) > 12 else level for level in levels]


def all_figures(results: Mapping[str, Any]) -> dict[str, Markup]:
    """Every figure that has something to show, by name."""
    panels = []
    for name, several in (("effects", False), ("interactions", True)):
        effects = results["effects"]
        rows = [row["name"] for row in effects if (len(row["factors"]) > 1) == several]
        title = f"{name.capitalize()} with simultaneous 95% intervals"
        panels.append(Panel(name, title, forest, (several,), rows_size(rows)))
    count = len(results["factors"])
    pairs: list[tuple[int, int | None]] = [*combinations(range(count), 2)]
    for a, b in pairs or [(0, None)]:
        names = [results["factors"][place]["name"] for place in (a, b) if place is not None]
        title = f"Mean loss by {' and '.join(names)}"
        panels.append(Panel(f"means-{a}-{b}", title, means, (a, b)))
    return drawn(results, panels)
