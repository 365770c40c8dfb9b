"""Figures of a comparison: one function per panel, each drawing on given axes.

A panel returns False where the results hold nothing to draw yet. `all_figures` makes the page's
SVGs, `picture` the README's PNG.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from polyak.report.curves import UNITS, difference_curves, loss_curves
from polyak.report.figures import Panel, drawn, row_name, rows_axes, rows_size, scalar_panels
from polyak.report.svg import LIGHT, PALETTE, color, house_style, styles


def forest(axes: Axes, results: Mapping[str, Any]) -> bool:
    """Differences from the baseline with their simultaneous intervals, one row per entry."""
    chosen = styles(results)
    rows = [entry for entry in results["entries"] if entry.get("difference")]
    if not rows:
        return False
    axes.axvline(0, color=color("ink"), linewidth=1.2, zorder=1)
    for row, entry in enumerate(rows):
        gap, style = entry["difference"], chosen[entry["name"]]
        resolved = gap["verdict"] in ("better", "worse")
        if gap["low"] is not None:
            axes.plot([gap["low"], gap["high"]], [row, row], color=style.color, linewidth=1.8)
        axes.plot(
            [gap["mean"]],
            [row],
            marker=style.marker,
            markersize=7,
            color=style.color,
            markerfacecolor=style.color if resolved else color("surface"),
            markeredgewidth=1.5,
        )
        row_name(axes, entry["name"], row)
    label = "difference from baseline (nats/token); left is better"
    rows_axes(axes, -0.95, len(rows) - 0.5, label)
    return True


def sweep(axes: Axes, results: Mapping[str, Any]) -> bool:
    """Loss against the swept value for each entry; a ring marks the value chosen.

    Of a grid: against the first field's value, at the best values of the others.
    """
    chosen, fields, seen = styles(results), set(), []
    for entry in results["entries"]:
        found = entry.get("sweep")
        if not found:
            continue
        style = chosen[entry["name"]]
        best: dict[float, float] = {}
        for point, loss in zip(found["values"], found["losses"], strict=True):
            if loss is not None:
                at = _first(point)
                best[at] = min(float(loss), best.get(at, math.inf))
        if not best:
            continue
        x, y = (np.asarray(column) for column in zip(*sorted(best.items()), strict=True))
        axes.plot(x, y, color=style.color, linestyle=style.line, marker=style.marker, markersize=4)
        ring = x == _first(found["chosen"])
        axes.plot(x[ring], y[ring], "o", color=style.color, markerfacecolor="none", markersize=11)
        first, *others = found["field"].split(", ")
        fields.add(f"{first}, at the best {' and '.join(others)}" if others else first)
        seen += list(x)
    if not seen:
        return False
    if min(seen) > 0 and max(seen) / min(seen) > 3:
        axes.set_xscale("log")
        ticks = sorted(set(seen))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    axes.set_xlabel(", ".join(sorted(fields)))
    axes.set_ylabel("validation loss (nats/token)")
    return True


def _first(point: Any) -> float:
    """A swept value, or of a grid's point the first field's."""
    return float(point[0] if isinstance(point, list) else point)


# ---------------------------------------------------------------------------------------------
# All of them


def all_figures(results: Mapping[str, Any]) -> dict[str, Markup]:
    """Every figure of the page that has something to show, by name."""
    panels = [
        Panel(f"loss-{axis}", f"Validation loss against {UNITS[axis]}", loss_curves, (axis,))
        for axis in ("tokens", "flops", "seconds")
    ]
    rows = [entry["name"] for entry in results["entries"] if entry.get("difference")]
    title = "Differences from the baseline with 95% intervals"
    panels.append(Panel("forest", title, forest, (), rows_size(rows)))
    title = "Difference from the baseline against training tokens"
    panels.append(Panel("differences", title, difference_curves))
    panels.append(Panel("sweep", "Validation loss against the swept value", sweep))
    return drawn(results, [*panels, *scalar_panels(results)])


def picture(results: Mapping[str, Any]) -> bytes:
    """Loss, difference and interval panels side by side as a PNG, in the light palette."""
    rows = sum(bool(entry.get("difference")) for entry in results["entries"])
    with house_style(9.5, LIGHT):
        figure = Figure(figsize=(12.5, max(3.4, 0.9 + 0.36 * rows)), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12)  # type: ignore[call-arg, union-attr]
        panels = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
        found = [
            loss_curves(panels[0], results, "tokens"),
            difference_curves(panels[1], results),
            forest(panels[2], results),
        ]
        for axes, any_ in zip(panels, found, strict=True):
            axes.set_visible(any_)
        stream = io.BytesIO()
        figure.savefig(
            stream,
            format="png",
            dpi=160,
            facecolor=PALETTE["surface"][0],
            metadata={"Software": None},
        )
    return stream.getvalue()
