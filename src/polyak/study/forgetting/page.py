"""Page and terminal tables of `polyak forgetting`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from polyak.report.pages import draw
from polyak.report.tables import house_table
from polyak.study.forgetting import figures as forgetting_figures
from polyak.words import duration, fixed, folded, plural, with_error


def finished(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs that have a result."""
    return [run for run in results["runs"] if run["status"] == "finished"]


def sentence(results: Mapping[str, Any]) -> str:
    """What the page says first."""
    done, steps = finished(results), results["settings"]["steps"]
    after = f"after {plural(steps, 'step')} on {results['settings']['onto']}"
    if len(done) == 1:
        (run,) = done
        return (
            f"{run['name']} loses {fixed(run['forgetting']['value'], 4)} and gains "
            f"{fixed(run['plasticity']['value'], 4)} nats/token {after}."
        )
    if not done:
        return f"{plural(len(results['runs']), 'run')} {after}; none finished yet."
    values = [run["forgetting"]["value"] for run in done]
    return (
        f"{plural(len(done), 'run')} {after}: forgetting from {fixed(min(values), 4)} to "
        f"{fixed(max(values), 4)} nats/token."
    )


def tables(results: Mapping[str, Any]) -> RenderableType:
    """Forgetting and plasticity of every run, and the losses behind them, in 80 columns."""
    done, config = finished(results), results["settings"]
    change = house_table(
        f"{plural(config['steps'], 'step')} of {config['optimizer']} on {config['onto']}, "
        f"nats/token\n± standard error over the validation text",
        "",
        "forgetting",
        "plasticity",
        "time",
    )
    losses = house_table(
        "Validation losses, nats/token",
        "",
        "source\nbefore",
        "source\nafter",
        "target\nbefore",
        "target\nafter",
    )
    for run in done:
        name = Text(folded(run["name"], 28))
        change.add_row(
            name,
            with_error(run["forgetting"]),
            with_error(run["plasticity"]),
            duration(run["seconds"]),
        )
        losses.add_row(
            name,
            *(
                fixed(run[side][when]["loss"]["value"], 4)
                for side in ("source", "target")
                for when in ("before", "after")
            ),
        )
    return Group(change, losses, *[Text(f"Careful: {line}") for line in results["warnings"]])


def render(results: Mapping[str, Any]) -> str:
    """The page for `results`, the content of results.json."""
    return draw(
        "forgetting.html",
        results,
        done=finished(results),
        sentence=sentence(results),
        figures=forgetting_figures.all_figures(results),
    )
