"""Figures of any runs: one line per run, in the style of its entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from polyak.report.curves import UNITS, points, scale_of
from polyak.report.figures import LOW, SIZE, Panel, drawn, scalar_names, scalar_panels, symbol
from polyak.report.svg import Style, styles
from polyak.statistics.dunnett import Array
from polyak.words import compact

AXES = ("step", "tokens", "seconds")
LATE = 0.1  # the first tenth of training does not set the height of the loss axes
MEMORY = 0.05  # of the points: the smoothed curve's time constant
Run = Mapping[str, Any]
Pick = Callable[[Run], Any]
SMALL = (SIZE[0], 3.0)


def smooth(values: Array) -> Array:
    """Exponential moving average, without the bias of its start, over a twentieth of the points."""
    keep = 1 - 1 / max(1.0, MEMORY * len(values))
    out, total, weight = np.empty_like(values), 0.0, 0.0
    for place, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1
        out[place] = total / weight
    return out


def _each(results: Mapping[str, Any]) -> list[tuple[Style, Run]]:
    chosen = styles(results)
    return [(chosen[run["entry"]], run) for run in results["runs"]]


def _x_axis(axes: Axes, axis: str, longest: float) -> float:
    scale, label = scale_of(axis, longest)
    axes.set_xlim(-0.01 * longest / scale, 1.02 * longest / scale)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.set_xlabel(label, parse_math=True)
    return scale


def _longest(drawn: Sequence[tuple[Style, Run, Array, Array]]) -> float:
    return max(float(x[-1]) for _, _, x, _ in drawn) or 1.0


def loss(axes: Axes, results: Mapping[str, Any], source: str, axis: str) -> bool:
    """Loss of every run: `train` faint with its moving average, `curve` the validations.

    On training curves a dotted vertical is a resume and a cross a spike.
    """
    drawn = []
    for style, run in _each(results):
        x, y = points(run[source].get(axis), run[source].get("loss"))
        if len(x):
            drawn.append((style, run, x, y))
    if not drawn:
        return False
    longest = _longest(drawn)
    scale = _x_axis(axes, axis, longest)
    late = []
    for style, _, x, y in drawn:
        line = smooth(y) if source == "train" else y
        if source == "train":
            axes.plot(x / scale, y, color=style.color, linewidth=0.6, alpha=0.3)
        _line(axes, style, x / scale, line, len(drawn), marks=source == "curve")
        late.append(line[x >= LATE * x[-1]])
    values = np.concatenate(late)
    low, high = float(values.min()), float(values.max())
    margin = 0.06 * (high - low or 1)
    axes.set_ylim(low - margin, high + margin)
    if source == "train":
        for style, run, x, y in drawn:
            _events(axes, style, run, axis, scale, (x, y))
    axes.set_ylabel(f"{'training' if source == 'train' else 'validation'} loss (nats/token)")
    return True


def _line(axes: Axes, style: Style, x: Array, y: Array, lines: int, *, marks: bool) -> None:
    axes.plot(
        x,
        y,
        color=style.color,
        linestyle=style.line,
        linewidth=1.6 if lines <= 4 else 1.0,
        marker=style.marker if marks or len(x) == 1 else None,
        markersize=3.5,
        markevery=max(1, len(x) // 8),
    )


def _events(
    axes: Axes, style: Style, run: Run, axis: str, scale: float, curve: tuple[Array, Array]
) -> None:
    """Mark where a run was resumed and where its loss jumped."""
    steps, places = points(run["train"].get("step"), run["train"].get(axis))
    low, high = axes.get_ylim()
    for event in run["events"]:
        at = event.get(axis)
        if at is None:
            at = float(np.interp(event["step"], np.r_[0.0, steps], np.r_[0.0, places]))
        if event["kind"] == "resume":
            axes.axvline(at / scale, color=style.color, linewidth=1.0, linestyle=":", alpha=0.8)
        if event["kind"] in ("spike", "skipped"):
            value = event.get("loss")
            height = float(np.interp(at, *curve)) if value is None else value
            axes.plot(
                [at / scale],
                [min(max(height, low), high)],
                marker="x",
                color=style.color,
                markersize=6,
                markeredgewidth=1.5,
                clip_on=False,
            )


def plain(
    axes: Axes,
    results: Mapping[str, Any],
    pick: Pick,
    label: str,
    words: Callable[[float], str] | None = None,
    zero: bool = True,
    noisy: bool = False,
) -> bool:
    """A logged number of every run against steps.

    Args:
        axes: to draw on.
        results: of the report.
        pick: the column out of a run's training series.
        label: of the vertical axis.
        words: turns that axis's numbers into text.
        zero: the axis begins at 0; otherwise it is logarithmic where values tower over others.
        noisy: draw it faint, with its moving average.
    """
    drawn = []
    for style, run in _each(results):
        x, y = points(run["train"].get("step"), pick(run["train"]))
        if len(x):
            drawn.append((style, run, x, y))
    if not drawn:
        return False
    _x_axis(axes, "step", _longest(drawn))
    for style, _, x, y in drawn:
        if noisy:
            axes.plot(x, y, color=style.color, linewidth=0.6, alpha=0.3)
        _line(axes, style, x, smooth(y) if noisy else y, len(drawn), marks=False)
    values = np.concatenate([y for *_, y in drawn])
    if zero:
        axes.set_ylim(0, 1.08 * float(values.max()) or 1.0)
    elif values.min() > 0 and values.max() > 10 * np.median(values):
        axes.set_yscale("log")
    if words is not None:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))
    axes.set_ylabel(label)
    return True


def _memory(axes: Axes, results: Mapping[str, Any]) -> bool:
    """Memory in the unit that suits the largest."""
    held = [x for run in results["runs"] for x in run["train"]["memory_bytes"] if x is not None]
    size, unit = (2**30, "GiB") if max(held, default=0) >= 4 * 2**30 else (2**20, "MiB")

    def pick(train: Run) -> list[float | None]:
        return [None if x is None else x / size for x in train["memory_bytes"]]

    return plain(axes, results, pick, f"memory ({unit})")


def scalar_time(axes: Axes, results: Mapping[str, Any], name: str) -> bool:
    """A learned scalar of every run against steps: mean over depth, least to largest shaded."""
    drawn = []
    for style, run in _each(results):
        found = run["train"].get("scalars", {}).get(name)
        x, y = points(run["train"].get("step"), found and found["mean"])
        if found and len(x):
            drawn.append((style, run, x, y))
    if not drawn:
        return False
    _x_axis(axes, "step", _longest(drawn))
    for style, run, x, y in drawn:
        _line(axes, style, x, y, len(drawn), marks=False)
        found = run["train"]["scalars"][name]
        _, low = points(run["train"]["step"], found["low"])
        _, high = points(run["train"]["step"], found["high"])
        axes.fill_between(x, low, high, color=style.color, alpha=0.12, linewidth=0)
    axes.set_title(symbol(name), loc="left", fontsize="large", parse_math=symbol(name) != name)
    return True


def rate_names(results: Mapping[str, Any]) -> list[str]:
    """Parameter groups with a learning rate, in order of appearance."""
    return list(dict.fromkeys(name for run in results["runs"] for name in run["train"]["rates"]))


def all_figures(results: Mapping[str, Any]) -> dict[str, Markup]:
    """Every figure of the page that has something to show, by name."""
    panels = [
        Panel(f"{source}-{axis}", f"{word} loss against {UNITS[axis]}", loss, (source, axis))
        for source, word in (("train", "Training"), ("curve", "Validation"))
        for axis in AXES
    ]
    for index, name in enumerate(rate_names(results)):
        title = f"Learning rate of group {name} against optimizer steps"
        pick, label = partial(_rate, name=name), f"learning rate, {name}"
        panels.append(Panel(f"rate-{name}", title, plain, (pick, label), SMALL, f"rate-{index}"))
    for key, label, words in (
        ("gradient_norm", "gradient norm", None),
        ("tokens_per_second", "tokens/s", compact),
        ("flops_per_second", "FLOP/s", compact),
        ("peak_fraction", "% of the matmul peak", lambda value: f"{100 * value:.3g}"),
    ):
        title, draw = f"{label} against optimizer steps", partial(plain, noisy=True)
        given = (itemgetter(key), label, words, words is not None)
        panels.append(Panel(key, title, draw, given, SMALL, key.replace("_", "-")))
    title = "Memory against optimizer steps"
    panels += [Panel("memory_bytes", title, _memory, (), SMALL, "memory"), *scalar_panels(results)]
    for index, name in enumerate(scalar_names(results)):
        title, svg = f"Learned scalar {name} against optimizer steps", f"scalar-time-{index}"
        panels.append(Panel(f"scalar-time-{name}", title, scalar_time, (name,), LOW, svg))
    return drawn(results, panels)


def _rate(train: Run, name: str) -> Any:
    return train["rates"].get(name)
