"""The page and the tables of a landscape study."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from polyak.report.pages import draw
from polyak.report.tables import house_table
from polyak.study.landscape import figures as landscape_figures
from polyak.study.landscape.results import number, sentence, value_of
from polyak.words import folded, plural

PAIRS = {
    "loss": (("loss", "other_loss"),),
    "persistence": (
        ("persistence_frozen", "loss"),
        ("persistence_later", "loss"),
        ("persistence_full", "loss"),
    ),
    "flatness": (
        ("trace", "loss"),
        ("trace", "forgetting"),
        ("trace", "other_loss"),
        ("scaled_trace", "forgetting"),
        ("plasticity", "forgetting"),
        ("top", "loss"),
    ),
}
"""Properties drawn against each other, (horizontal, vertical), by section of the page."""


def render(results: Mapping[str, Any]) -> str:
    """The page for `results`, the content of results.json."""
    every = [pair for pairs in PAIRS.values() for pair in pairs]
    tested = [row for row in results["correlations"] if row["p"] is not None]
    shown = [row for row in results["correlations"] if row["rho_runs"] is not None]
    kinds = len(results["entries"])
    return draw(
        "landscape.html",
        {**results, "correlations": shown},
        sentence=sentence(results),
        models=models(results),
        figures=landscape_figures.all_figures(results, every, layers(results)),
        pairs_of=PAIRS,
        number=number,
        labels={wanted["key"]: wanted["label"] for wanted in results["properties"]},
        exact=all(row["exact"] for row in tested),
        tested=len(tested),
        smallest=2 / math.factorial(kinds) if kinds > 2 else 1.0,
    )


def models(results: Mapping[str, Any]) -> str:
    """How many independently trained models a statement rests on."""
    counts = [len(entry["seeds"]) for entry in results["entries"]]
    seeds = f"{min(counts)} to {max(counts)}" if min(counts) != max(counts) else str(counts[0])
    return (
        f"{plural(sum(counts), 'independently trained model')}: {plural(len(counts), 'kind')} with "
        f"{seeds} {'seed' if seeds == '1' else 'seeds'} each."
    )


def layers(results: Mapping[str, Any]) -> dict[str, list[list[Any]]]:
    """ln σ_min by layer of every run, for the maps with frozen streams and of the full state."""
    return {name: [_by_layer(run, name) for run in results["runs"]] for name in ("frozen", "full")}


def _by_layer(run: Mapping[str, Any], name: str) -> list[float | None]:
    measured = run["measured"].get("spectrum")
    return [value_of(log) for log in measured["persistence"][name]["layers"]] if measured else []


def tables(results: Mapping[str, Any]) -> RenderableType:
    """A table for every property, and the correlations with an adjusted p below 0.05."""
    shown: list[RenderableType] = []
    for wanted in results["properties"]:
        table = house_table(
            wanted["label"], "", "mean", "s.d.", "seeds", "difference", "95% interval"
        )
        for entry in results["entries"]:
            found = results["summaries"][wanted["key"]][entry["name"]]
            value, gap = found["value"] or {}, found["difference"] or {}
            texts = [number(value.get(name), wanted["places"]) for name in ("mean", "sd")]
            low, high = (number(gap.get(end), wanted["places"]) for end in ("low", "high"))
            baseline = entry["name"] == results["baseline"]
            table.add_row(
                Text(folded(entry["name"], 18)),
                *texts,
                str(value.get("n", 0)),
                "baseline" if baseline else number(gap.get("mean"), wanted["places"]),
                f"{low} to {high}" if gap.get("low") is not None else "",
            )
        shown.append(table)
    labels = {wanted["key"]: wanted["label"] for wanted in results["properties"]}
    found = [row for row in results["correlations"] if (row["p_holm"] or 1) < 0.05]
    lines = [
        f"{labels[row['first']]} and {labels[row['second']]}: ρ = {number(row['rho'], 2)}, "
        f"adjusted p = {number(row['p_holm'], 3)} ({row['models']} kinds of model)"
        for row in found
    ]
    tested = sum(row["p"] is not None for row in results["correlations"])
    lines = lines or [f"No rank correlation has an adjusted p below 0.05 ({tested} tested)."]
    shown += [Text(models(results)), *map(Text, lines)]
    shown += [Text(f"Careful: {line}") for line in results["warnings"]]
    return Group(*shown)
