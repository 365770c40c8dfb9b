"""What figures of every page share: panels and their SVG, learned scalars along depth."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from polyak.report.svg import color, house_style, styles, to_svg
from polyak.words import folded

SIZE = (5.0, 3.6)  # inches of 72 units: 360 wide, so that a phone shows text at its true size
LOW = (SIZE[0], 2.6)


ROW_NAME = 56
"""Letters of a row's name that have room in a figure."""
GREEK = "alpha|beta|gamma|delta|eta|kappa|lambda|mu|nu|rho|sigma|tau"


class Panel(NamedTuple):
    """A figure of a page.

    Attributes:
        name: by which the page's template finds it.
        title: for those who cannot see it.
        draw: draws on axes, given them, the results and `arguments`; False for nothing to draw.
        arguments: see `draw`.
        size: in inches.
        svg: what its ids begin with; `name` if None.
    """

    name: str
    title: str
    draw: Callable[..., bool]
    arguments: tuple[Any, ...] = ()
    size: tuple[float, float] = SIZE
    svg: str | None = None


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
        for substep, values in substeps.items():
            # at layers without this scalar there is None, and a gap
            flat = np.asarray(values, dtype=np.float64).reshape(len(values), -1).mean(-1)
            position = int(substep == "mlp")
            offset = position / 2
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
    axes.set_title(symbol(name), loc="left", fontsize="large", parse_math=symbol(name) != name)
    return layers > 0


def symbol(name: str) -> str:
    """`beta1` and `betaR` with their letter and index; other names as they are."""
    parts = re.fullmatch(rf"({GREEK})_?(\d+|[A-Z])?_?", name)
    if parts is None:
        return name
    index = f"_{{{parts[2]}}}" if parts[2] else ""
    return f"$\\{parts[1]}{index}$"


def scalar_panels(results: Mapping[str, Any]) -> Iterator[Panel]:
    """A panel for every learned scalar, by depth."""
    for index, name in enumerate(scalar_names(results)):
        title = f"Learned scalar {name} by layer"
        yield Panel(f"scalar-{name}", title, scalar_depth, (name,), LOW, f"scalar-{index}")


def rows_axes(axes: Axes, top: float, bottom: float, label: str) -> None:
    """Axes whose rows are named beside them: no vertical scale, and round numbers below."""
    axes.set_ylim(bottom, top)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.set_xlabel(label)


def rows_size(names: Sequence[str]) -> tuple[float, float]:
    """Of a figure with a row for each name, in inches."""
    each = 0.5 if all(len(name) <= ROW_NAME for name in names) else 0.7
    return SIZE[0], max(1.6, 0.75 + each * len(names))


def row_name(axes: Axes, name: str, row: float, size: float = 0.92) -> None:
    """Write a row's name above what is drawn in it; a long one in lines, where its parts meet.

    Args:
        axes: those of `rows_axes`.
        name: what the row is of.
        row: its place.
        size: of the letters, relative to the figure's.
    """
    written = axes.annotate(
        name if len(name) <= ROW_NAME else folded(name, ROW_NAME),
        (0, row - 0.28),
        xycoords=("axes fraction", "data"),
        va="bottom",
        fontsize=size * float(mpl.rcParams["font.size"]),
        color=color("ink"),
        bbox={"facecolor": color("surface"), "edgecolor": "none", "pad": 1.5},
    )
    written.set_in_layout(False)  # text never takes the axes' room


def drawn(results: Mapping[str, Any], panels: Iterable[Panel]) -> dict[str, Markup]:
    """The panels that have something to show, as SVG by name."""
    made = {}
    for panel in panels:
        with house_style(11):
            figure = Figure(figsize=panel.size, layout="constrained")
            if panel.draw(figure.subplots(), results, *panel.arguments):
                made[panel.name] = Markup(to_svg(figure, panel.svg or panel.name, panel.title))
    return made
