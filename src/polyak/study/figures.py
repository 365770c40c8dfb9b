"""Figures of a comparison: inline SVG that follows the page's colours, and one PNG.

Every figure is drawn once, in stand-in colours. For the page these become CSS variables, so one
SVG serves light and dark; for the PNG they are the light palette itself. Text stays text, in the
page's font. Rules differ by colour, dash and marker, so that no reading hangs on colour alone.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from polyak.study.statistics import Array

# role: (light, dark); contrast with the surface at least 3:1 for marks and 4.5:1 for text
PALETTE = {
    "ink": ("#1b1f24", "#e7e9ec"),
    "muted": ("#57606a", "#a3abb5"),
    "grid": ("#e3e6ea", "#30363d"),
    "surface": ("#ffffff", "#14171b"),
    "series-1": ("#0b62a4", "#6db3f2"),
    "series-2": ("#c1440e", "#ff8a5c"),
    "series-3": ("#1b7f5c", "#4fd0a0"),
    "series-4": ("#9a3d8f", "#e08ad6"),
    "series-5": ("#966200", "#e6b450"),
    "series-6": ("#2a86c0", "#9bd8ff"),
    "series-7": ("#7a1f3d", "#f08aa8"),
}
STAND_IN = {role: f"#0102{index:02x}" for index, role in enumerate(PALETTE)}
SERIES = [role for role in PALETTE if role.startswith("series")]
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
MARKERS = "sD^vPX*hp<>"
SIZE = (5.0, 3.6)  # inches of 72 units: 360 wide, so that a phone shows text at its true size
START = 0.1  # of training is left out of the loss axis: it would flatten all that matters


@dataclass(frozen=True, slots=True)
class Style:
    """How one entry is drawn everywhere: a palette role, a dash pattern and a marker."""

    role: str
    dash: tuple[float, ...]
    marker: str

    @property
    def color(self) -> str:
        """The stand-in colour to draw with."""
        return STAND_IN[self.role]

    @property
    def line(self) -> Any:
        """Matplotlib's linestyle."""
        return (0, self.dash) if self.dash else "solid"


def styles(results: Mapping[str, Any]) -> dict[str, Style]:
    """Styles by entry; the baseline is ink, solid, with a round marker."""
    chosen, others = {}, 0
    for entry in results["entries"]:
        if entry["name"] == results["baseline"]:
            chosen[entry["name"]] = Style("ink", (), "o")
            continue
        # seven colours and four dashes: 28 entries before a line repeats
        dash = DASHES[(others + others // len(SERIES)) % len(DASHES)]
        chosen[entry["name"]] = Style(
            SERIES[others % len(SERIES)], dash, MARKERS[others % len(MARKERS)]
        )
        others += 1
    return chosen


def css() -> dict[str, str]:
    """The palette as CSS declarations, `light` and `dark`."""
    return {
        name: " ".join(f"--{role}: {colors[i]};" for role, colors in PALETTE.items())
        for i, name in enumerate(("light", "dark"))
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


def _runs(results: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    return [run for run in results["runs"] if run["entry"] == name]


def _draw(axes: Axes, style: Style, curves: Sequence[tuple[Array, Array]], scale: float) -> None:
    if len(curves) > 1:
        for x, y in curves:
            axes.plot(x / scale, y, color=style.color, linewidth=0.6, alpha=0.45)
    x, y = _mean(curves)
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
    drawn = {n: [c for r in _runs(results, n) if len((c := curve(r, axis))[0])] for n in chosen}
    if not any(drawn.values()):
        return False
    largest = max(float(x[-1]) for curves in drawn.values() for x, _ in curves)
    scale, label = _scale(axis, largest)
    for name, style in chosen.items():
        if drawn[name]:
            _draw(axes, style, drawn[name], scale)
    late = [y[x >= START * x[-1]] for curves in drawn.values() for x, y in curves]
    values = np.concatenate([y for y in late if len(y)])
    margin = 0.04 * (values.max() - values.min() or 1)
    axes.set_ylim(values.min() - margin, values.max() + margin)
    axes.set_xlim(0, largest / scale * 1.02)
    axes.set_xlabel(label)
    axes.set_ylabel("validation loss (nats/token)")
    return True


def difference_curves(axes: Axes, results: Mapping[str, Any]) -> bool:
    """Paired difference from the baseline against tokens, with the zero line."""
    chosen, baseline = styles(results), results["baseline"]
    base = {run["seed"]: curve(run, "tokens") for run in _runs(results, baseline)}
    drawn: dict[str, list[tuple[Array, Array]]] = {}
    for name in chosen:
        if name == baseline:
            continue
        for run in _runs(results, name):
            x, y = curve(run, "tokens")
            base_x, base_y = base.get(run["seed"], (np.empty(0), np.empty(0)))
            common, own, other = np.intersect1d(x, base_x, return_indices=True)
            if len(common) > 1:
                drawn.setdefault(name, []).append((common, y[own] - base_y[other]))
    if not drawn:
        return False
    largest = max(float(x[-1]) for curves in drawn.values() for x, _ in curves)
    scale, label = _scale("tokens", largest)
    axes.axhline(0, color=STAND_IN["ink"], linewidth=1.2)
    for name, curves in drawn.items():
        _draw(axes, chosen[name], curves, scale)
    late = np.concatenate([y[x >= 2 * START * x[-1]] for c in drawn.values() for x, y in c])
    low, high = min(late.min(), 0.0), max(late.max(), 0.0)
    margin = 0.08 * (high - low or 1)
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0, largest / scale * 1.02)
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
    axes.axvline(0, color=STAND_IN["ink"], linewidth=1.2, zorder=1)
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
            markerfacecolor=style.color if resolved else STAND_IN["surface"],
            markeredgewidth=1.5,
        )
        axes.annotate(
            entry["name"],
            (0, row - 0.28),
            xycoords=("axes fraction", "data"),
            va="bottom",
            fontsize=10,
            color=STAND_IN["ink"],
        )
    axes.set_ylim(len(rows) - 0.5, -0.95)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
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
        for position, face in ((0, style.color), (1, STAND_IN["surface"])):
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
    axes.set_ylabel(name)
    return layers > 0


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
# To SVG and PNG


@contextmanager
def _house_style(size: float = 11.0) -> Iterator[None]:
    settings = {
        "font.family": "DejaVu Sans",  # comes with matplotlib, so layout is the same everywhere
        "font.size": size,
        "axes.labelsize": size,
        "axes.labelcolor": STAND_IN["muted"],
        "axes.edgecolor": STAND_IN["muted"],
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": STAND_IN["grid"],
        "grid.linewidth": 0.8,
        "xtick.color": STAND_IN["muted"],
        "ytick.color": STAND_IN["muted"],
        "text.color": STAND_IN["ink"],
        "axes.formatter.useoffset": False,
        "axes.unicode_minus": True,
        "svg.fonttype": "none",
        "svg.hashsalt": "polyak",
        "mathtext.default": "regular",
    }
    with mpl.rc_context(settings):
        yield


def to_svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an `<svg>` element for a page: titled, in CSS variables, ids made unique."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for role, color in STAND_IN.items():
        text = text.replace(color, f"var(--{role})")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", text)
    text = re.sub(r"font: ([\d.]+)px inherit", r"font-size: \1px", text)
    text = re.sub(r"\bid=\"", f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r"href=\"#", f'href="#{name}-', text)
    width, height = (72 * x for x in figure.get_size_inches())
    opening = (
        f'<svg class="figure" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'aria-labelledby="{name}-title"><title id="{name}-title">{escape(title)}</title>'
    )
    return opening + text[text.index(">") + 1 :]


def single(
    name: str, title: str, draw: Callable[[Axes], bool], size: tuple[float, float] = SIZE
) -> str | None:
    """One panel as SVG; None if `draw` found nothing to draw."""
    with _house_style():
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


def key(style: Style) -> str:
    """A short sample of an entry's line and marker, for legends and table rows."""
    with _house_style():
        figure = Figure(figsize=(0.42, 0.17))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.plot([0, 1], [0, 0], color=style.color, linestyle=style.line, linewidth=1.8)
        axes.plot([0.5], [0], color=style.color, marker=style.marker, markersize=6)
        axes.set_xlim(0, 1)
        text = to_svg(figure, f"key-{style.role}-{style.marker}", "")
    text = re.sub(r"<title.*?</title>", "", text)
    return re.sub(
        r'class="figure"(.*?) role="img"(.*?) aria-labelledby="[^"]*"',
        r'class="key"\1 aria-hidden="true"\2',
        text,
        flags=re.DOTALL,
    )


def _in_light(figure: Figure) -> None:
    """Replace stand-in colours by the light palette's."""
    real = {STAND_IN[role]: light for role, (light, _) in PALETTE.items()}

    def swap(artist: Any, kind: str) -> None:
        getter = getattr(artist, f"get_{kind}", None)
        color = getter() if getter else None
        if isinstance(color, str) and color in real:
            getattr(artist, f"set_{kind}")(real[color])

    for artist in figure.findobj():
        for kind in ("color", "markerfacecolor", "markeredgecolor"):
            swap(artist, kind)


def picture(results: Mapping[str, Any]) -> bytes:
    """Loss, difference and interval panels side by side as a PNG, in the light palette."""
    rows = sum(bool(entry.get("difference")) for entry in results["entries"])
    with _house_style(9.5):
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
        _in_light(figure)
        stream = io.BytesIO()
        figure.savefig(
            stream,
            format="png",
            dpi=160,
            facecolor=PALETTE["surface"][0],
            metadata={"Software": None},
        )
    return stream.getvalue()
