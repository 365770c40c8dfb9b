"""The comparison as text: two stacked tables that fit 80 columns, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from polyak.report.tables import as_text, house_table
from polyak.words import (
    NONE,
    compact,
    difference_text,
    folded,
    interval_text,
    loss,
    loss_places,
    mean_and_sd,
    memory,
    plural,
)

WORDS = {"better": "below", "worse": "above", "unresolved": "unclear"}


def tables(results: Mapping[str, Any]) -> RenderableType:
    """Both tables and the verdict as one rich renderable."""
    baseline = results["baseline"]
    places = loss_places(results)
    seeds = len({run["seed"] for run in results["runs"]})
    losses = house_table(
        f"Last validation loss, {seeds} seed{'s' if seeds != 1 else ''}; "
        f"difference from {baseline}",
        "",
        "nats/token\nmean ± s.d.",
        "difference",
        "simultaneous\n95% interval",
        "",
    )
    costs = house_table(
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
    if any(entry.get("sweep") for entry in results["entries"]):
        parts.append(_rates(results))
    verdict = results.get("verdict")
    if verdict:
        parts.append(Text(verdict["sentence"]))
        parts += [Text(f"  {line}") for line in verdict["details"]]
    return Group(*parts)


def _rates(results: Mapping[str, Any]) -> RenderableType:
    """What a sweep tried, and the rate that each entry was given."""
    swept = next(entry["sweep"] for entry in results["entries"] if entry.get("sweep"))
    seeds = plural(len(swept["seeds"]), "seed")
    heading = f"{swept['field']}: last validation loss of each value, {seeds} of their own"
    values = [_rate(value) for value in swept["values"]]
    table = house_table(heading, "", *values, "chosen", "")
    for entry in results["entries"]:
        found = entry.get("sweep")
        if not found:  # its sweep is still to come
            continue
        chosen = found["chosen"]
        table.add_row(
            Text(folded(entry["name"])),
            *(loss(value) for value in found["losses"]),
            "none works" if chosen is None else _rate(chosen),
            "at the edge of the grid" if found["at_edge"] else "",
        )
    return table


def _rate(value: Any) -> str:
    """A swept rate, or the rates of a grid's point."""
    return " × ".join(f"{rate:g}" for rate in (value if isinstance(value, list) else [value]))


def table_text(results: Mapping[str, Any], width: int = 80) -> str:
    """The tables as plain text, every line at most `width` columns."""
    return as_text(tables(results), width)


def print_table(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the tables and the verdict at most 80 columns wide."""
    (console or Console()).print(tables(results), width=80)
