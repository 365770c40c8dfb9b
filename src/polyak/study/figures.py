"""Figures of a comparison: one function per panel, each drawing on given axes.

A panel returns False where the results hold nothing to draw yet. `all_figures` makes the page's
SVGs, `picture` the README's PNG.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from polyak.study.dunnett import Array
from polyak.study.svg import LIGHT, PALETTE, Style, color, house_style, styles, to_svg

SIZE = (5.0, 3.6)  # inches of 72 units: 360 wide, so that a phone shows text at its true size
START = 0.35  # of training is left out of the loss axes: it would flatten all that matters
GREEK = {
    "alpha",
    "beta",
    "gamma",
    "delta",
    "eta",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "rho",
    "sigma",
    "tau",
}


# ---------------------------------------------------------------------------------------------
# Curves


def curve(run: Mapping[str, Any], axis: str) -> tuple[Array, Array]:
    """x and loss of one run without points that are missing or not finite."""
    points = run.get("curve") or {}
    pairs = [
        (x, y)
        for x, y in zip(points.get(axis) or [], points.get("loss") or [], strict=False)
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


def _faint(entries: int) -> float:
    """Opacity of single seeds: many entries would bury the means."""
    return 0.55 if entries <= 4 else 0.28


UNITS = {"tokens": "training tokens", "flops": "training FLOPs", "seconds": "training time"}


def _scale(axis: str, largest: float) -> tuple[float, str]:
    """What to divide an axis by, and its label."""
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


def loss_curves(axes: Axes, results: Mapping[str, Any], axis: str) -> bool:
    """Validation loss against tokens, flops or seconds; False if there is nothing to draw."""
    chosen = styles(results)
    drawn: dict[str, list[tuple[str, Array, Array]]] = {}
    for run in results["runs"]:
        x, y = curve(run, axis)
        if len(x):
            drawn.setdefault(run["entry"], []).append((run["status"], x, y))
    if not drawn:
        return False
    shortest, longest = _extent(drawn)
    scale, label = _scale(axis, longest)
    for name in chosen:
        if name in drawn:
            _draw(axes, chosen[name], drawn[name], scale, _faint(len(drawn)))
    values = _after(drawn, START * shortest)
    margin = 0.04 * (values.max() - values.min() or 1)
    axes.set_ylim(values.min() - margin, values.max() + margin)
    axes.set_xlim(0.85 * START * shortest / scale, 1.02 * longest / scale)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.set_xlabel(label)
    axes.set_ylabel("validation loss (nats/token)")
    return True


def difference_curves(axes: Axes, results: Mapping[str, Any]) -> bool:
    """Paired difference from the baseline against tokens, with the zero line."""
    chosen, baseline = styles(results), results["baseline"]
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
    shortest, longest = _extent(drawn)
    scale, label = _scale("tokens", longest)
    axes.axhline(0, color=color("ink"), linewidth=1.2)
    for name in chosen:
        if name in drawn:
            _draw(axes, chosen[name], drawn[name], scale, _faint(len(drawn)))
    late = _after(drawn, 0.2 * shortest)
    low, high = min(late.min(), 0.0), max(late.max(), 0.0)
    # both sides of zero stay in view: starting behind and crossing later is half the story
    low, high = min(low, -0.3 * high), max(high, -0.3 * low)
    margin = 0.05 * (high - low or 1)
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0, longest / scale * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.set_xlabel(label)
    axes.set_ylabel("difference (nats/token)")
    return True


# ---------------------------------------------------------------------------------------------
# Intervals, scalars, sweeps


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
        axes.annotate(
            entry["name"],
            (0, row - 0.28),
            xycoords=("axes fraction", "data"),
            va="bottom",
            fontsize=0.92 * float(mpl.rcParams["font.size"]),
            color=color("ink"),
            bbox={"facecolor": color("surface"), "edgecolor": "none", "pad": 1.5},
        )
    axes.set_ylim(len(rows) - 0.5, -0.95)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel("difference from baseline (nats/token); left is better")
    return True


def scalar_names(results: Mapping[str, Any]) -> list[str]:
    """The learned scalars that any entry has, in order of appearance."""
    names: dict[str, None] = {}
    for entry in results["entries"]:
        names.update(dict.fromkeys(entry.get("scalars") or {}))
    return list(names)


def scalar_depth(axes: Axes, results: Mapping[str, Any], name: str) -> bool:
    """One learned scalar along depth; filled marks at attention, open marks at the MLP."""
    chosen, layers = styles(results), 0
    for entry in results["entries"]:
        substeps = (entry.get("scalars") or {}).get(name)
        if not substeps:
            continue
        style = chosen[entry["name"]]
        points = []
        for position, values in enumerate(substeps.values()):
            flat = np.asarray(values, dtype=np.float64).reshape(len(values), -1).mean(-1)
            offset = position / len(substeps)
            points += [(layer + 1 + offset, y, position) for layer, y in enumerate(flat)]
            layers = max(layers, len(flat))
        points.sort()
        x, y, position_of = (np.asarray(column) for column in zip(*points, strict=True))
        axes.plot(x, y, color=style.color, linestyle=style.line, linewidth=1.2)
        for position, face in ((0, style.color), (1, color("surface"))):
            at = position_of == position
            axes.plot(
                x[at],
                y[at],
                linestyle="none",
                marker=style.marker,
                color=style.color,
                markerfacecolor=face,
                markersize=5,
            )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(layers, 8) or 1))
    axes.set_xlabel("layer")
    axes.set_title(symbol(name), loc="left", fontsize="large")
    return layers > 0


def symbol(name: str) -> str:
    """`beta1` and `betaR` with their letter and index; other names as they are."""
    parts = re.fullmatch(r"([a-z]+?)_?(\d+|[A-Z])?_?", name)
    if parts is None or parts[1] not in GREEK:
        return name
    index = f"_{{{parts[2]}}}" if parts[2] else ""
    return f"$\\{parts[1]}{index}$"


def sweep(axes: Axes, results: Mapping[str, Any]) -> bool:
    """Loss against the swept value for each entry; a ring marks the value chosen."""
    chosen, fields, seen = styles(results), set(), []
    for entry in results["entries"]:
        found = entry.get("sweep")
        if not found:
            continue
        style = chosen[entry["name"]]
        points = [
            (float(x), float(y))
            for x, y in sorted(zip(found["values"], found["losses"], strict=True))
            if y is not None
        ]
        if not points:
            continue
        x, y = (np.asarray(column) for column in zip(*points, strict=True))
        axes.plot(x, y, color=style.color, linestyle=style.line, marker=style.marker, markersize=4)
        at = x == float(found["chosen"])
        axes.plot(x[at], y[at], "o", color=style.color, markerfacecolor="none", markersize=11)
        fields.add(found["field"])
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


# ---------------------------------------------------------------------------------------------
# All of them


def single(
    name: str, title: str, draw: Callable[[Axes], bool], size: tuple[float, float] = SIZE
) -> str | None:
    """One panel as SVG; None if `draw` found nothing to draw."""
    with house_style(11):
        figure = Figure(figsize=size, layout="constrained")
        if not draw(figure.subplots()):
            return None
        return to_svg(figure, name, title)


def all_figures(results: Mapping[str, Any]) -> dict[str, str]:
    """Every figure of the page that has something to show, by name."""
    made = {
        f"loss-{axis}": single(
            f"loss-{axis}",
            f"Validation loss against {UNITS[axis]}",
            lambda axes, axis=axis: loss_curves(axes, results, axis),  # type: ignore[misc]
        )
        for axis in UNITS
    }
    rows = sum(bool(entry.get("difference")) for entry in results["entries"])
    made["forest"] = single(
        "forest",
        "Differences from the baseline with 95% intervals",
        lambda axes: forest(axes, results),
        (SIZE[0], max(1.6, 0.75 + 0.5 * rows)),
    )
    made["differences"] = single(
        "differences",
        "Difference from the baseline against training tokens",
        lambda axes: difference_curves(axes, results),
    )
    for index, name in enumerate(scalar_names(results)):
        made[f"scalar-{name}"] = single(
            f"scalar-{index}",
            f"Learned scalar {name} by layer",
            lambda axes, name=name: scalar_depth(axes, results, name),  # type: ignore[misc]
            (SIZE[0], 2.6),
        )
    made["sweep"] = single(
        "sweep", "Validation loss against the swept value", lambda axes: sweep(axes, results)
    )
    return {name: svg for name, svg in made.items() if svg}


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
