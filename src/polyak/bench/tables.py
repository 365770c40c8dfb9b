"""What a benchmark found, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from polyak.report.tables import house_table


def model_table(rows: Sequence[dict[str, Any]], first: str) -> Table:
    """Whole models, relative to the first."""
    table = _table("", "tokens/s", "speed", "low–high", "peak MB", "peak")
    table.caption = f"speed and peak memory relative to {first}; low–high over rounds"
    for row in rows:
        ratio = row["relative_speed"]
        table.add_row(
            Text(row["name"]),  # brackets are no markup
            f"{row['tokens_per_second']['median']:,.0f}",
            f"{ratio['median']:.3f}",
            f"{ratio['low']:.3f}–{ratio['high']:.3f}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
            f"{row['relative_peak']:.2f}",
        )
    return table


def op_table(rows: Sequence[dict[str, Any]], tokens: int) -> Table:
    """Fast ops beside their references."""
    table = _table("", "fast ms", "low–high", "reference ms", "speed-up")
    table.caption = f"ops on {tokens} tokens"
    for row in rows:
        fast = row["fast_seconds"]
        table.add_row(
            row["name"],
            f"{1e3 * fast['median']:.2f}",
            f"{1e3 * fast['low']:.2f}–{1e3 * fast['high']:.2f}",
            f"{1e3 * row['reference_seconds']['median']:.2f}",
            f"{row['speed_up']:.2f}×",
        )
    return table


def loss_table(rows: Sequence[dict[str, Any]], tokens: int, vocabulary: int) -> Table:
    """Ways to compute a loss, relative to the plain one."""
    table = _table("", "ms", "time", "low–high", "MB", "peak", "value", "grad")
    table.caption = (
        f"loss of {tokens} tokens, vocabulary {vocabulary}: time and peak memory relative to the "
        "plain form; relative error of the value and the larger one of its two gradients, against "
        "float64"
    )
    for row in rows:
        ratio, errors = row["relative_time"], row["relative_errors"]
        table.add_row(
            row["name"],
            f"{1e3 * row['seconds']['median']:.1f}",
            f"{ratio['median']:.2f}",
            f"{ratio['low']:.2f}–{ratio['high']:.2f}",
            f"{row['peak_bytes'] / 1e6:.1f}",
            f"{row['relative_peak']:.2f}",
            f"{errors['loss']:.0e}",
            f"{max(errors['features'], errors['weight']):.0e}",
        )
    return table


def generate_table(rows: Sequence[dict[str, Any]], new_tokens: int) -> Table:
    """Generation of text."""
    places = list(rows[0].get("seconds_at", {}))
    table = _table(
        *("", "tokens/s", "speed", "low–high"), *(f"ms at {int(at):,}" for at in places), "ratio"
    )
    last = rows[-1]["name"]
    table.caption = (
        f"greedy, one row, a short prompt and {new_tokens} new tokens; speed relative to "
        f"{last if last == 'GPT2LMHeadModel' else rows[0]['name']}"
    )
    if places:
        table.caption += (
            f"; one token's time at positions, with the speed relative to {rows[0]['name']} there, "
            "and the ratio of the last to the first"
        )
    for row in rows:
        ratio, late = row["relative_speed"], row.get("late_over_early")
        table.add_row(
            Text(row["name"]),  # brackets are no markup
            f"{row['tokens_per_second']['median']:,.1f}",
            f"{ratio['median']:.2f}",
            f"{ratio['low']:.2f}–{ratio['high']:.2f}",
            *(_at(row, at) if late else "–" for at in places),
            f"{late['median']:.2f}" if late else "–",
        )
    return table


def _at(row: dict[str, Any], place: str) -> str:
    seconds, speed = row["seconds_at"][place], row["relative_speed_at"][place]
    return f"{1e3 * seconds['median']:.3f} ({speed['median']:.2f})"


def attention_table(rows: Sequence[dict[str, Any]], tokens: int, last: bool) -> Table:
    """Kinds of attention at one length; the last table explains the columns."""
    columns = ("chunk", "ms", "speed", "low–high", "time", "growth", "peak")
    table = house_table(f"{tokens:,} tokens", "", *columns)
    if last:
        table.caption = (
            "attention of given queries, keys and values, with gradients; speed and peak memory "
            "relative to softmax (torch's scaled_dot_product_attention); time over linear's, of "
            "what is in brackets over the kind's; growth: time over that at the length before"
        )
    for row in rows:
        if row["tokens"] != tokens:
            continue
        kind, bracket, variant = row["name"].partition("[")
        ratio, growth = row["speed_up"], row["growth"]
        table.add_row(
            Text(f"  [{variant}" if bracket else kind),  # brackets are no markup
            str(row["chunk_size"] or "–"),
            _short(1e3 * row["seconds"]["median"]),
            f"{ratio['median']:.2f}",
            f"{ratio['low']:.2f}–{ratio['high']:.2f}",
            f"{row['relative_time']['median']:.2f}",
            f"{growth['median']:.2f}" if growth else "–",
            f"{row['relative_peak']:.2f}",
        )
    return table


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"


def _table(*columns: str) -> Table:
    return house_table("", *columns)
