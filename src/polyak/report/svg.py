"""The look of the figures, and matplotlib figures as inline SVG that follows the page's colours.

Every figure is drawn once, in stand-in colours. For the page these become CSS variables, so one
SVG serves light and dark; a PNG is drawn in the light palette itself. Text stays text, in the
page's font. Entries differ by colour, dash and marker, so that no reading hangs on colour alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import escape
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle

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
LIGHT = {role: light for role, (light, _) in PALETTE.items()}
_colors: ContextVar[Mapping[str, str]] = ContextVar("colors", default=STAND_IN)
SERIES = [role for role in PALETTE if role.startswith("series")]
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
MARKERS = "sD^vPX*hp<>"


def color(role: str) -> str:
    """The colour a palette role is drawn with: a stand-in for SVG, the light palette for PNG."""
    return _colors.get()[role]


@dataclass(frozen=True, slots=True)
class Style:
    """How one entry is drawn everywhere: a palette role, a dash pattern and a marker."""

    role: str
    dash: tuple[float, ...]
    marker: str

    @property
    def color(self) -> str:
        """The colour to draw with."""
        return color(self.role)

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


@contextmanager
def house_style(size: float, colors: Mapping[str, str] = STAND_IN) -> Iterator[None]:
    """Matplotlib's settings for our figures; `color` gives `colors` meanwhile."""
    token = _colors.set(colors)
    settings: dict[Any, Any] = {
        "font.family": "DejaVu Sans",  # comes with matplotlib, so layout is the same everywhere
        "font.size": size,
        "axes.labelsize": size,
        "axes.labelcolor": color("muted"),
        "axes.edgecolor": color("muted"),
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": color("grid"),
        "grid.linewidth": 0.8,
        "xtick.color": color("muted"),
        "ytick.color": color("muted"),
        "text.color": color("ink"),
        "axes.formatter.useoffset": False,
        "axes.unicode_minus": True,
        "svg.fonttype": "none",
        "svg.hashsalt": "polyak",
        "mathtext.default": "regular",
        "text.parse_math": False,  # a name with $ is a name; our own labels ask for it
    }
    try:
        with mpl.rc_context(settings):
            yield
    finally:
        _colors.reset(token)


def to_svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an `<svg>` element for a page: titled, in CSS variables, ids made unique."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # what stands between tags is text, which may come from anywhere, and stays as it is
    text = re.sub(r"<[^>]*>", lambda tag: _for_a_page(tag[0], name), text)
    width, height = (72 * x for x in figure.get_size_inches())
    opening = (
        f'<svg class="figure" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'aria-labelledby="{name}-title"><title id="{name}-title">{escape(title)}</title>'
    )
    return opening + text[text.index(">") + 1 :]


def _for_a_page(tag: str, name: str) -> str:
    for role, color in STAND_IN.items():
        tag = tag.replace(color, f"var(--{role})")
    tag = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", tag)
    tag = re.sub(r"font: ([\d.]+)px inherit", r"font-size: \1px", tag)
    tag = re.sub(r"\bid=\"", f'id="{name}-', tag)
    tag = re.sub(r"url\(#", f"url(#{name}-", tag)
    return re.sub(r"href=\"#", f'href="#{name}-', tag)


def key(style: Style) -> str:
    """A short sample of an entry's line and marker, for legends and table rows."""
    marker = MarkerStyle(style.marker)
    outline = marker.get_path().transformed(marker.get_transform())
    shape = "".join(
        "M" + "L".join(f"{16 + 8 * x:.2f} {6 - 8 * y:.2f}" for x, y in np.asarray(polygon)) + "Z"
        for polygon in outline.to_polygons()
    )
    dash = " ".join(f"{1.8 * d:g}" for d in style.dash)
    return (
        '<svg class="key" viewBox="0 0 32 12" aria-hidden="true">'
        f'<path d="M0 6H32" stroke="var(--{style.role})" stroke-width="1.8" '
        f'stroke-dasharray="{dash}"/><path d="{shape}" fill="var(--{style.role})"/></svg>'
    )
