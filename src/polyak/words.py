"""Numbers, names and lists as text, in the terminal and on the page."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

NONE = "–"
NAME_WIDTH = 22


def decimals(half_width: float | None, *numbers: float) -> int:
    """Decimals that show two digits of the half-width and turn no non-zero bound into zero."""
    places = 3
    if half_width and math.isfinite(half_width):
        places = min(max(1 - math.floor(math.log10(half_width)), 3), 6)
    smallest = min((abs(x) for x in numbers if x), default=1.0)
    while places < 6 and round(smallest, places) == 0:
        places += 1
    return places


def shown(difference: Mapping[str, Any]) -> int:
    """Decimals for one difference and its interval."""
    low, high = difference["low"], difference["high"]
    if low is None:
        return 3 if abs(difference["mean"]) >= 0.001 else 4
    bounds = (low, high) if difference["verdict"] != "unresolved" else ()
    return decimals((high - low) / 2, *bounds)


def fixed(value: float, places: int) -> str:
    """A number with a true minus sign, and no negative zero."""
    text = f"{value:.{places}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", "−")


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def plural(count: int, word: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def compact(value: float | None) -> str:
    """Three significant digits with k, M, G or T: 3420160 is `3.42M`."""
    if value is None:
        return NONE
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{_three(value / size)}{letter}"
    return _three(value)


def _three(value: float) -> str:
    places = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    text = f"{value:.{places}f}"
    return text if value != int(value) or abs(value) >= 100 else f"{value:.0f}"


def memory(value: float | None) -> str:
    """Bytes in the binary units memory is sold in: `412 MiB`."""
    if value is None:
        return NONE
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{_three(value / size)} {unit}"
    return f"{value:.0f} B"


def loss(value: float | None) -> str:
    """A loss with four decimals; a dash for none."""
    return NONE if value is None else fixed(value, 4)


def duration(seconds: float | None) -> str:
    """`42 s`, `7 min 5 s`, `3 h 20 min`, `2 d 4 h`."""
    if seconds is None:
        return NONE
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, part, smaller in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


def short(text: str) -> str:
    """A long hash by its beginning; other text as it is."""
    return f"{text[:10]}…" if re.fullmatch("[0-9a-f]{40,}", text) else text


def loss_places(results: Mapping[str, Any]) -> int:
    """Decimals for losses: two digits of the smallest s.d., between 3 and 4."""
    spreads = [e["loss"]["sd"] for e in results["entries"] if e.get("loss") and e["loss"]["sd"]]
    return 4 if not spreads or min(spreads) < 0.01 else 3


def mean_and_sd(value: Mapping[str, Any] | None, places: int) -> str:
    """`1.4963 ± 0.0051`, or the mean alone where there is one seed."""
    if not value:
        return NONE
    mean = f"{value['mean']:.{places}f}"
    return mean if value["sd"] is None else f"{mean} ± {value['sd']:.{places}f}"


def with_error(value: Mapping[str, Any] | None, places: int = 4) -> str:
    """`1.4963 ± 0.0051`, a value and its standard error; the value alone where there is none."""
    if not value or value["value"] is None:
        return NONE
    text = fixed(value["value"], places)
    return text if value["se"] is None else f"{text} ± {value['se']:.{places}f}"


def interval_text(difference: Mapping[str, Any] | None) -> str:
    """`−0.044 to −0.010`; a dash where there is no interval."""
    if not difference or difference["low"] is None:
        return NONE
    places = shown(difference)
    return f"{fixed(difference['low'], places)} to {fixed(difference['high'], places)}"


def difference_text(difference: Mapping[str, Any] | None) -> str:
    """`−0.027`; a dash for none."""
    return fixed(difference["mean"], shown(difference)) if difference else NONE


def folded(name: str, width: int = NAME_WIDTH) -> str:
    """The whole name in lines of at most `width`, broken where its parts meet."""
    lines: list[str] = []
    for part in re.split(r"(?=\[)", name):
        line = ""
        for piece in re.findall(r"[^_/:,=]*[_/:,=]?", part):
            if line and len(line) + len(piece) > width:
                lines.append(line)
                line = ""
            line += piece
            while len(line) > width:
                lines.append(line[:width])
                line = line[width:]
        lines += [line] if line else []
    return "\n".join(lines)
