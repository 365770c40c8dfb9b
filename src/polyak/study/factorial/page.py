"""The page, the terminal's tables and the CSV files of a factorial study."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from polyak.files import write_atomic
from polyak.report.pages import draw
from polyak.report.tables import house_table
from polyak.study.factorial.figures import all_figures
from polyak.words import NONE, compact, decimals, fixed, folded, loss_places, mean_and_sd, plural


def render(results: Mapping[str, Any]) -> str:
    """The page for `results`, the content of results.json."""
    return draw(
        "factorial.html",
        {"statistics": None, **results},
        figures=all_figures(results),
        places=loss_places(results),
        effects=[{**row, **effect_texts(row)} for row in results["effects"]],
        terms=[{**row, **term_texts(row)} for row in results["terms"]],
        swept=any(cell["sweep"] for cell in results["entries"]),
        settings=[(k, v) for k, v in results["settings"].items() if k not in ("model", "training")],
    )


def effect_texts(row: Mapping[str, Any]) -> dict[str, str]:
    """One effect's `size` and `interval` as text."""
    if row["low"] is None:
        return {"size": fixed(row["mean"], 4), "interval": NONE}
    places = decimals((row["high"] - row["low"]) / 2)
    low, high = (fixed(row[end], places) for end in ("low", "high"))
    return {"size": fixed(row["mean"], places), "interval": f"{low} to {high}"}


def term_texts(row: Mapping[str, Any]) -> dict[str, str]:
    """One line's `part`, `test` and `chance` as text."""
    chance = NONE if row["p"] is None else "<0.0001" if row["p"] < 1e-4 else f"{row['p']:.4f}"
    test = NONE if row["f"] is None else compact(row["f"])
    return {"part": f"{100 * row['share']:.1f}%", "test": test, "chance": chance}


def tables(results: Mapping[str, Any]) -> RenderableType:
    """Cells, effects and the analysis of variance, in at most 80 columns."""
    places = loss_places(results)
    swept = any(cell["sweep"] for cell in results["entries"])
    columns = ["", "nats/token\nmean ± s.d.", "seeds", "params", *(["rate"] if swept else [])]
    cells = house_table("Last validation loss of every cell", *columns)
    for cell in results["entries"]:
        rate = [_rate(cell["sweep"])] if swept else []
        count = str((cell["loss"] or {}).get("n", 0))
        loss = mean_and_sd(cell["loss"], places)
        name = Text(folded(cell["name"], 36))
        cells.add_row(name, loss, count, compact(cell["parameters"]), *rate)
    first = ", ".join(f"{f['name']}={f['levels'][0]}" for f in results["factors"])
    effects = house_table(
        f"Effects on the loss, {plural(len(results['seeds']), 'seed')}; relative to {first}",
        *("", "effect", "simultaneous\n95% interval", ""),
    )
    for row in results["effects"]:
        texts = effect_texts(row)
        name = Text(folded(row["name"], 36))
        effects.add_row(name, texts["size"], texts["interval"], row["verdict"] or "")
    variance = house_table(
        "Analysis of variance: what of the differences between cells is whose",
        *("", "df", "sum of\nsquares", "share", "F", "p"),
    )
    for row in results["terms"]:
        texts = term_texts(row)
        squares = f"{row['sum_of_squares']:.3g}"
        name = Text(folded(row["name"], 36))
        variance.add_row(
            name, str(row["df"]), squares, texts["part"], texts["test"], texts["chance"]
        )
    shown: list[RenderableType] = [cells]
    shown += [effects, variance] if results["effects"] else []
    return Group(*shown, Text(results["sentence"]), *map(Text, results["left_out"]))


def _rate(sweep: Mapping[str, Any] | None) -> str:
    if sweep is None:
        return ""
    chosen = sweep["chosen"]
    values = chosen if isinstance(chosen, list) else [chosen]
    text = "none" if chosen is None else "×".join(f"{value:g}" for value in values)
    return f"{text} (edge)" if sweep["at_edge"] else text


def write_tables(out: Path, results: Mapping[str, Any]) -> None:
    """Write cells.csv, effects.csv and variance.csv.

    Raises:
        UnwritableError: the folder cannot be written.
    """
    names = [factor["name"] for factor in results["factors"]]
    cells = [
        [cell["name"], *cell["levels"], seed, loss]
        for cell in results["entries"]
        for seed, loss in ((cell["loss"] or {}).get("per_seed") or {}).items()
    ]
    write_atomic(out / "cells.csv", _csv(["cell", *names, "seed", "loss"], cells))
    for name, rows, columns in (
        ("effects", results["effects"], ("name", "mean", "low", "high", "verdict")),
        ("variance", results["terms"], ("name", "df", "sum_of_squares", "share", "f", "p")),
    ):
        lines = ([row[column] for column in columns] for row in rows)
        write_atomic(out / f"{name}.csv", _csv(columns, lines))


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return stream.getvalue()
