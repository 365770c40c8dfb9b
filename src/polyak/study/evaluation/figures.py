"""Figures of an evaluation: losses by corpus and by position, entropy of attention by layer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from polyak.report.figures import SIZE, Panel, drawn, row_name, rows_axes
from polyak.report.svg import styles

POINTS = 32
"""Points of a curve over positions, evenly spaced in the logarithm."""


def by_corpus(axes: Axes, results: Mapping[str, Any]) -> bool:
    """Bits per byte of every run on every corpus, with two standard errors to each side."""
    chosen, runs = styles(results), results["runs"]
    corpora = runs[0]["corpora"]
    if any(found["bits_per_byte"]["value"] is None for run in runs for found in run["corpora"]):
        return False
    for number, run in enumerate(runs):
        style = chosen[run["name"]]
        for row, found in enumerate(run["corpora"]):
            at = row + 0.6 * ((number + 0.5) / len(runs) - 0.5)
            value, error = found["bits_per_byte"]["value"], found["bits_per_byte"]["se"] or 0.0
            axes.plot([value - 2 * error, value + 2 * error], [at, at], color=style.color)
            axes.plot([value], [at], marker=style.marker, color=style.color, markersize=5)
    for row, found in enumerate(corpora):
        row_name(axes, found["name"], row - 0.06, 1.0)
    rows_axes(axes, -0.75, len(corpora) - 0.5, "bits/byte; left is better")
    return True


def along_blocks(axes: Axes, results: Mapping[str, Any], place: int) -> bool:
    """Loss at each position of a block, shaded by two standard errors to each side."""
    chosen, any_ = styles(results), False
    for run in results["runs"]:
        found = run["corpora"][place].get("by_position")
        if not found:
            continue
        any_, style = True, chosen[run["name"]]
        length = len(found["position"])
        edges = np.unique(np.geomspace(1, length + 1, POINTS + 1).round().astype(int)) - 1
        loss = np.asarray(found["loss"], dtype=np.float64)
        error = np.asarray([value or 0.0 for value in found["se"]])
        spans = list(itertools.pairwise(edges))
        x = np.array([(a + b + 1) / 2 for a, b in spans])
        y = np.array([loss[a:b].mean() for a, b in spans])
        # of neighbouring positions the errors are as good as one: no division by their number
        spread = np.array([error[a:b].mean() for a, b in spans])
        axes.plot(x, y, color=style.color, linestyle=style.line, linewidth=1.4)
        axes.fill_between(
            x, y - 2 * spread, y + 2 * spread, color=style.color, alpha=0.12, linewidth=0
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("tokens that the model has seen")
    axes.set_ylabel("loss (nats/token)")
    return any_


def entropy(axes: Axes, results: Mapping[str, Any], name: str) -> bool:
    """Entropy of attention by layer: every head a mark, the line through the means."""
    chosen, runs, layers = styles(results), results["runs"], 0
    shown = [run for run in runs if run["attention"]]
    for number, run in enumerate(shown):
        style, rows = chosen[run["name"]], run["attention"]["layers"]
        calls = max(row["call"] for row in rows)
        shift = 0.36 * ((number + 0.5) / len(shown) - 0.5)
        x = [row["layer"] + (row["call"] - 1) / calls + shift for row in rows]
        means = [sum(row[name]) / len(row[name]) for row in rows]
        axes.plot(x, means, color=style.color, linestyle=style.line, linewidth=1.4)
        for at, row in zip(x, rows, strict=True):
            axes.plot(
                [at] * len(row[name]),
                row[name],
                linestyle="none",
                marker=style.marker,
                markersize=3.5,
                color=style.color,
                alpha=0.7,
            )
        layers = max(layers, *(row["layer"] for row in rows))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(layers, 8) or 1))
    axes.set_xlabel("layer")
    if name == "relative":
        axes.set_ylim(0, 1)
        axes.set_ylabel("entropy / ln(visible keys)")
    else:
        axes.set_ylim(bottom=0)
        axes.set_ylabel("entropy (nats)")
    return bool(shown)


def all_figures(results: Mapping[str, Any]) -> dict[str, Markup]:
    """Every figure of the page that has something to show, by name."""
    corpora = results["runs"][0]["corpora"]
    rows = len(corpora) * max(1.0, 0.22 * len(results["runs"]))
    size = (SIZE[0], 1.0 + 0.6 * rows)
    panels = [Panel("corpora", "Bits per byte by corpus", by_corpus, (), size)]
    for place, found in enumerate(corpora):
        title = f"Loss by position on {found['name']}"
        panels.append(Panel(f"position-{place}", title, along_blocks, (place,)))
    for name in ("nats", "relative"):
        title = f"Entropy of attention by layer and head, {name}"
        panels.append(Panel(f"entropy-{name}", title, entropy, (name,)))
    return drawn(results, panels)
