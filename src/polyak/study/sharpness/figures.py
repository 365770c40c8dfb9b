"""Figures of a sharpness measurement: spectral densities, and slices of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from polyak.report.figures import SIZE, Panel, drawn
from polyak.report.svg import color, styles

FLOOR = 1e-6
"""Densities below this share of the largest are not shown."""


def densities(axes: Axes, results: Mapping[str, Any], curve: str) -> bool:
    """Smoothed spectral densities of all runs on a logarithmic axis; `curve`: whole or middle."""
    chosen, peak = styles(results), 0.0
    for run in results["runs"]:
        found = (run.get("found") or {}).get("density") or {}
        drawn = found.get("curves", {}).get(curve)
        if not drawn or found.get("status") == "partial":
            continue
        style, y = chosen[run["name"]], np.array(drawn["density"])
        peak = max(peak, float(y.max()))
        shown = np.where(y > FLOOR * y.max(), y, np.nan)
        axes.plot(drawn["x"], shown, color=style.color, linestyle=style.line, linewidth=1.4)
    if not peak:
        return False
    axes.set_yscale("log")
    axes.set_ylim(FLOOR * peak, 3 * peak)
    axes.axvline(0, color=color("muted"), linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")
    return True


def lines(axes: Axes, results: Mapping[str, Any]) -> bool:
    """1-D slices of every run: mean over directions, shaded from the least to the largest."""
    chosen, any_ = styles(results), False
    for run in results["runs"]:
        found = (run.get("found") or {}).get("slices")
        if not found:
            continue
        any_, style = True, chosen[run["name"]]
        losses = np.array(found["line"]["losses"], dtype=np.float64)  # None becomes NaN
        a = found["line"]["a"]
        axes.plot(a, losses.mean(0), color=style.color, linestyle=style.line, linewidth=1.4)
        axes.fill_between(
            a, losses.min(0), losses.max(0), color=style.color, alpha=0.15, linewidth=0
        )
    axes.set_xlabel("distance along a direction (norms of the filters)")
    axes.set_ylabel("loss (nats/token)")
    return any_


def plane(axes: Axes, results: Mapping[str, Any], index: int) -> bool:
    """2-D slice of one run as contour lines of the rise of the loss."""
    run = results["runs"][index]
    found = (run.get("found") or {}).get("slices")
    if not found:
        return False
    at = found["plane"]["at"]
    losses = np.array(found["plane"]["losses"], dtype=np.float64)
    rise = losses - losses[len(at) // 2, len(at) // 2]
    top = float(np.nanmax(rise))
    if not np.isfinite(top) or top <= 0:
        return False
    levels = top * np.array([0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7])
    drawn = axes.contour(at, at, rise.T, levels=levels, colors=[color("series-1")], linewidths=1.0)
    axes.clabel(drawn, fmt="%.2g", fontsize="small", colors=[color("ink")])
    axes.plot([0], [0], marker="+", color=color("ink"), markersize=9)
    axes.set_aspect("equal")
    axes.set_xlabel("first direction")
    axes.set_ylabel("second direction")
    return True


def all_figures(results: Mapping[str, Any]) -> dict[str, Markup]:
    """Every figure of the page that has something to show, by name."""
    title = "Spectral density of the Hessian"
    panels = [Panel(f"density-{c}", title, densities, (c,)) for c in ("whole", "middle")]
    panels.append(Panel("lines", "Loss along random directions", lines))
    for index, run in enumerate(results["runs"]):
        title = f"Loss on a random plane: {run['name']}"
        panels.append(Panel(f"plane-{index}", title, plane, (index,), (SIZE[0], SIZE[0])))
    return drawn(results, panels)
