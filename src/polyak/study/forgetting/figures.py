"""Figures of forgetting: losses along the way, and what is lost against what is gained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from polyak.report.curves import points
from polyak.report.figures import Panel, drawn
from polyak.report.svg import styles


def along(axes: Axes, results: Mapping[str, Any], side: str) -> bool:
    """The loss on the source or the target against steps."""
    chosen, any_ = styles(results), False
    for run in results["runs"]:
        curve = run["curve"] or {}
        x, y = points(curve.get("step"), curve.get(side))
        if len(x):
            any_, style = True, chosen[run["name"]]
            axes.plot(
                x,
                y,
                color=style.color,
                linestyle=style.line,
                linewidth=1.4,
                marker=style.marker,
                markersize=3.5,
            )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=True))
    axes.set_xlabel("steps on the target")
    axes.set_ylabel(f"{side} loss (nats/token)")
    return any_


def trade(axes: Axes, results: Mapping[str, Any]) -> bool:
    """Forgetting against plasticity, with two standard errors to each side."""
    chosen, any_ = styles(results), False
    for run in results["runs"]:
        if run["status"] != "finished":
            continue
        any_, style = True, chosen[run["name"]]
        x, y = run["plasticity"], run["forgetting"]
        axes.errorbar(
            [x["value"]],
            [y["value"]],
            xerr=[2 * (x["se"] or 0.0)],
            yerr=[2 * (y["se"] or 0.0)],
            color=style.color,
            marker=style.marker,
            markersize=6,
            elinewidth=1.0,
        )
    axes.margins(0.12)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.set_xlabel("plasticity (nats/token); right is better")
    axes.set_ylabel("forgetting (nats/token)")
    return any_


def all_figures(results: Mapping[str, Any]) -> dict[str, Markup]:
    """Every figure of the page that has something to show, by name."""
    panels = [
        Panel(side, f"Loss on the {side} against steps on the target", along, (side,))
        for side in ("source", "target")
    ]
    panels.append(Panel("trade", "Forgetting against plasticity", trade))
    return drawn(results, panels)
