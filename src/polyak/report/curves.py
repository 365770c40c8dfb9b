"""Loss curves of runs, and their differences from a baseline's, drawn on given axes.

Both functions return False where the results hold nothing to draw yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from polyak.report.svg import Style, color, styles
from polyak.statistics.dunnett import Array

START = 0.35  # of training is left out of the loss axes: it would flatten all that matters


def curve(run: Mapping[str, Any], axis: str) -> tuple[Array, Array]:
    """x and loss of one run without points that are missing or not finite."""
    columns = run.get("curve") or {}
    return points(columns.get(axis), columns.get("loss"))


def points(
    xs: Sequence[float | None] | None, ys: Sequence[float | None] | None
) -> tuple[Array, Array]:
    """Two columns as arrays, without the places where a value is missing or not finite."""
    pairs = [
        (x, y)
        for x, y in zip(xs or [], ys or [], strict=False)
        if x is not None and y is not None and math.isfinite(y)
    ]
    data = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    return data[:, 0], data[:, 1]


def _mean(curves: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Pointwise mean over the points that all curves have."""
    shortest = min((len(x) for x, _ in curves), default=0)
    if not shortest:
        return np.empty(0), np.empty(0)
    return (
        np.mean([x[:shortest] for x, _ in curves], axis=0),
        np.mean([y[:shortest] for _, y in curves], axis=0),
    )


def _draw(
    axes: Axes, style: Style, runs: Sequence[tuple[str, Array, Array]], scale: float, faint: float
) -> None:
    """Every run thin; the mean of the finished ones bold."""
    finished = [(x, y) for status, x, y in runs if status == "finished"]
    for _, x, y in runs:
        if len(runs) > 1 or not finished:
            axes.plot(x / scale, y, color=style.color, linewidth=0.6, alpha=faint)
    x, y = _mean(finished)
    axes.plot(
        x / scale,
        y,
        color=style.color,
        linestyle=style.line,
        linewidth=1.7,
        marker=style.marker,
        markersize=4,
        markevery=max(1, len(x) // 6),
    )


def _extent(drawn: Mapping[str, Sequence[tuple[str, Array, Array]]]) -> tuple[float, float]:
    """Where the shortest finished run ends, and the longest run of all."""
    ends = [(status, float(x[-1])) for runs in drawn.values() for status, x, _ in runs]
    longest = max(end for _, end in ends)
    return min((end for status, end in ends if status == "finished"), default=longest), longest


def _after(drawn: Mapping[str, Sequence[tuple[str, Array, Array]]], start: float) -> Array:
    """All values drawn from `start` on; every value if none is that far."""
    values = [(x, y) for runs in drawn.values() for _, x, y in runs]
    late = np.concatenate([y[x >= start] for x, y in values])
    return late if len(late) else np.concatenate([y for _, y in values])


UNITS = {
    "step": "optimizer steps",
    "tokens": "training tokens",
    "flops": "training FLOPs",
    "seconds": "training time",
}


def scale_of(axis: str, largest: float) -> tuple[float, str]:
    """What to divide an axis by, and its label."""
    if axis == "step":
        return 1.0, UNITS[axis]
    if axis == "seconds":
        for size, unit in ((3600.0, "hours"), (60.0, "minutes")):
            if largest >= 2 * size:
                return size, f"{UNITS[axis]} ({unit})"
        return 1.0, f"{UNITS[axis]} (seconds)"
    power = 3 * int(math.log10(max(largest, 1)) // 3)
    words = {0: "", 3: " (thousands)", 6: " (millions)", 9: " (billions)"}
    if axis == "tokens" and power in words:
        return 10.0**power, UNITS[axis] + words[power]
    return 10.0**power, f"{UNITS[axis]} ($\\times 10^{{{power}}}$)"


def _draw_all(
    axes: Axes,
    results: Mapping[str, Any],
    drawn: Mapping[str, Sequence[tuple[str, Array, Array]]],
    axis: str,
) -> tuple[float, float, float]:
    """Every entry's runs; what the axis is divided by, its shortest and its longest run."""
    shortest, longest = _extent(drawn)
    scale, label = scale_of(axis, longest)
    faint = 0.55 if len(drawn) <= 4 else 0.28  # single seeds of many would bury the means
    for name, style in styles(results).items():
        if name in drawn:
            _draw(axes, style, drawn[name], scale, faint)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.set_xlabel(label, parse_math=True)
    return scale, shortest, longest


def loss_curves(axes: Axes, results: Mapping[str, Any], axis: str) -> bool:
    """Validation loss against tokens, flops or seconds; False if there is nothing to draw."""
    drawn: dict[str, list[tuple[str, Array, Array]]] = {}
    for run in results["runs"]:
        x, y = curve(run, axis)
        if len(x):
            drawn.setdefault(run["entry"], []).append((run["status"], x, y))
    if not drawn:
        return False
    scale, shortest, longest = _draw_all(axes, results, drawn, axis)
    values = _after(drawn, START * shortest)
    margin = 0.04 * (values.max() - values.min() or 1)
    axes.set_ylim(values.min() - margin, values.max() + margin)
    axes.set_xlim(0.85 * START * shortest / scale, 1.02 * longest / scale)
    axes.set_ylabel("validation loss (nats/token)")
    return True


def difference_curves(axes: Axes, results: Mapping[str, Any]) -> bool:
    """Paired difference from the baseline against tokens, with the zero line."""
    baseline = results["baseline"]
    base = {run["seed"]: run for run in results["runs"] if run["entry"] == baseline}
    drawn: dict[str, list[tuple[str, Array, Array]]] = {}
    for run in results["runs"]:
        other = base.get(run["seed"])
        if run["entry"] == baseline or other is None:
            continue
        (x, y), (base_x, base_y) = curve(run, "tokens"), curve(other, "tokens")
        common, own, theirs = np.intersect1d(x, base_x, return_indices=True)
        if len(common) > 1:
            both = {run["status"], other["status"]} == {"finished"}
            status = "finished" if both else "unfinished"
            drawn.setdefault(run["entry"], []).append((status, common, y[own] - base_y[theirs]))
    if not drawn:
        return False
    axes.axhline(0, color=color("ink"), linewidth=1.2)
    scale, shortest, longest = _draw_all(axes, results, drawn, "tokens")
    late = _after(drawn, 0.2 * shortest)
    low, high = min(late.min(), 0.0), max(late.max(), 0.0)
    # both sides of zero stay in view: starting behind and crossing later is half the story
    low, high = min(low, -0.3 * high), max(high, -0.3 * low)
    margin = 0.05 * (high - low or 1)
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0, longest / scale * 1.02)
    axes.set_ylabel("difference (nats/token)")
    return True
