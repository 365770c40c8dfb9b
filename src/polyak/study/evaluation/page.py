"""Page and terminal tables of `polyak evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from polyak.report.pages import draw
from polyak.report.tables import house_table
from polyak.study.evaluation import figures as evaluation_figures
from polyak.words import fixed, folded, listed, plural, with_error

NAME = 22
"""Columns for a run's name in the terminal."""


def sentence(results: Mapping[str, Any]) -> str:
    """What the page says first."""
    runs, corpora = results["runs"], results["runs"][0]["corpora"]
    names = listed([found["name"] for found in corpora])
    if len(runs) == 1:
        values = listed(
            [f"{fixed(found['loss']['value'], 4)} on {found['name']}" for found in corpora]
        )
        return f"{runs[0]['name']}: {values} (nats/token)."
    return f"{plural(len(runs), 'run')} on {names}."


def tables(results: Mapping[str, Any]) -> RenderableType:
    """A table for each corpus, and one of attention, in 80 columns."""
    shown: list[RenderableType] = []
    for place, first in enumerate(results["runs"][0]["corpora"]):
        shown.append(_loss_table(results, place, first))
    shown += [_attention_table(run) for run in results["runs"] if run["attention"]]
    shown += [Text(f"Careful: {line}") for line in results["warnings"]]
    return Group(*shown)


def title_of(found: Mapping[str, Any]) -> str:
    """`stdlib, validation: 32,768 tokens (256 blocks of 128, 61 documents)`."""
    stride, length = found["stride"], found["context_length"]
    how = f"blocks of {length}" if stride == length else f"blocks of {length}, stride {stride}"
    return (
        f"{found['name']}, {found['split']}: {found['tokens']:,} tokens ({found['blocks']:,} "
        f"{how}; {plural(found['documents'], 'document')})"
    )


def _loss_table(results: Mapping[str, Any], place: int, first: Mapping[str, Any]) -> RenderableType:
    over = first["se_over"]
    table = house_table(
        title_of(first) + (f"\n± standard error over {over}" if over else ""),
        "",
        "nats/token",
        "bits/byte",
        "ppl",
        *(["difference"] if len(results["runs"]) > 1 else []),
    )
    for run in results["runs"]:
        found = run["corpora"][place]
        table.add_row(
            Text(folded(run["name"], NAME)),
            with_error(found["loss"]),
            with_error({**found["bits_per_byte"], "se": None}),
            with_error({**found["perplexity"], "se": None}, 3),
            *([] if run is results["runs"][0] else [with_error(found["difference"])]),
        )
    return table


def _attention_table(run: Mapping[str, Any]) -> RenderableType:
    found = run["attention"]
    table = house_table(
        f"Attention entropy of {run['name']}\non {found['corpus']}, {found['sequences']} × "
        f"{found['length']} tokens: mean over heads,\nthe lowest and the highest head; in nats, "
        "and relative\nto ln of the visible keys",
        "layer",
        "nats",
        "lowest",
        "highest",
        "relative",
        "lowest",
        "highest",
    )
    several = any(row["call"] > 1 for row in found["layers"])
    for row in found["layers"]:
        words = [f"{row['layer']}.{row['call']}" if several else str(row["layer"])]
        for name in ("nats", "relative"):
            values = row[name]
            mean = sum(values) / len(values)
            words += [fixed(value, 3) for value in (mean, min(values), max(values))]
        table.add_row(*words)
    return table


def render(results: Mapping[str, Any]) -> str:
    """The page for `results`, the content of results.json."""
    return draw(
        "evaluation.html",
        results,
        sentence=sentence(results),
        title_of=title_of,
        figures=evaluation_figures.all_figures(results),
    )
