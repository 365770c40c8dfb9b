"""The comparison as text: two stacked tables that fit 80 columns, and the verdict.

Also the wording of quantities (parameters, FLOPs, bytes) that the page uses.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from polyak.study.verdict import fixed, shown

NONE = "–"
NAME_WIDTH = 22
WORDS = {"better": "below", "worse": "above", "unresolved": "unclear"}


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


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.title_justify = "left"
    table.add_column(columns[0], no_wrap=True)  # folded already, where it means something
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def tables(results: Mapping[str, Any]) -> RenderableType:
    """Both tables and the verdict as one rich renderable."""
    baseline = results["baseline"]
    places = loss_places(results)
    seeds = len({run["seed"] for run in results["runs"]})
    losses = _table(
        f"Last validation loss, {seeds} seed{'s' if seeds != 1 else ''}; "
        f"difference from {baseline}",
        "",
        "nats/token\nmean ± s.d.",
        "difference",
        "simultaneous\n95% interval",
        "",
    )
    costs = _table(
        "Cost",
        "",
        "bits/byte\nmean ± s.d.",
        "params",
        "FLOPs\n/token",
        "tokens/s",
        "peak\nmemory",
    )
    for entry in results["entries"]:
        gap = entry.get("difference")
        base = entry["name"] == baseline
        losses.add_row(
            Text(folded(entry["name"])),
            mean_and_sd(entry.get("loss"), places),
            "baseline" if base else difference_text(gap),
            "" if base else interval_text(gap),
            WORDS.get((gap or {}).get("verdict") or "", ""),
        )
        speed = entry.get("tokens_per_second")
        costs.add_row(
            Text(folded(entry["name"])),
            mean_and_sd(entry.get("bits_per_byte"), places),
            compact(entry.get("parameters")),
            compact(entry.get("flops_per_token")),
            f"{speed['median']:,.0f}" if speed else NONE,
            memory(entry.get("peak_memory_bytes")),
        )
    parts: list[RenderableType] = [losses, costs]
    verdict = results.get("verdict")
    if verdict:
        parts.append(Text(verdict["sentence"]))
        parts += [Text(f"  {line}") for line in verdict["details"]]
    return Group(*parts)


def table_text(results: Mapping[str, Any], width: int = 80) -> str:
    """The tables as plain text, every line at most `width` columns."""
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, force_terminal=False).print(
        tables(results)
    )
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def print_table(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the tables and the verdict at most 80 columns wide."""
    (console or Console()).print(tables(results), width=80)
