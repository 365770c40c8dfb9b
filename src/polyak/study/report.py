"""report.html: one self-contained page for a comparison, or for the curves of any runs.

The page makes no network request (a Content-Security-Policy in it says so to the browser), holds
its figures as inline SVG that follow the reader's light or dark setting, and is written again
after every run, so it copes with whatever is not there yet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from polyak.files import write_atomic
from polyak.study import figures, svg
from polyak.study.words import (
    NONE,
    compact,
    difference_text,
    fixed,
    interval_text,
    listed,
    loss_places,
    mean_and_sd,
    memory,
    plural,
)


@lru_cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("polyak.study", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        compact=compact,
        memory=memory,
        interval=interval_text,
        difference=difference_text,
        mean_and_sd=mean_and_sd,
        fixed=fixed,
        listed=listed,
        plural=plural,
        breakable=breakable,
        scalar=scalar,
        zip=zip,
    )
    environment.globals.update(NONE=NONE, palette=svg.css())
    return environment


def breakable(text: str) -> Markup:
    """Text whose long names wrap where their parts meet; options stay together if they fit."""
    escaped = str(escape(text))
    for sign in "_/:=":
        escaped = escaped.replace(sign, f"{sign}<wbr>")
    return Markup(re.sub(r"(\[[^\]]*\])", r'<span class="options">\1</span>', escaped))


def scalar(value: Any) -> str:
    """A setting as text: floats in short form, lists with commas."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(scalar(x) for x in value) or NONE
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {scalar(x)}" for k, x in value.items()) or NONE
    return str(value)


def render(results: Mapping[str, Any]) -> str:
    """The page for `results` (the content of results.json, after `verdict.complete`).

    Args:
        results: a comparison in results.json's schema; runs may be missing, running or failed.
    """
    entries = results["entries"]
    keys = {name: Markup(svg.key(s)) for name, s in svg.styles(results).items()}
    scalars = figures.scalar_names(results)
    sweeps = [entry for entry in entries if entry.get("sweep")]
    settings = {k: v for k, v in results["settings"].items() if k not in ("model", "training")}
    return (
        _environment()
        .get_template("comparison.html")
        .render(
            r={"statistics": None, **results},
            entries=entries,
            keys=keys,
            figures={name: Markup(svg) for name, svg in figures.all_figures(results).items()},
            places=loss_places(results),
            failed=[run for run in results["runs"] if run["status"] == "failed"],
            waiting=[run for run in results["runs"] if run["status"] not in ("finished", "failed")],
            scalars=scalars,
            scalar_keys={e["name"]: keys[e["name"]] for e in entries if e.get("scalars")},
            sweeps=sweeps,
            sweep_keys={e["name"]: keys[e["name"]] for e in sweeps},
            edge=[e["name"] for e in sweeps if e["sweep"]["at_edge"]],
            groups=sorted({g for e in entries for g in e.get("parameter_groups") or {}}),
            equations={e["rule"]: e["equation"] for e in entries if e.get("equation")},
            comparison=list(settings.items()),
            machine=_machine(results),
        )
    )


def _machine(results: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Versions, commit and hardware as (name, text) pairs."""
    machine = dict(results["machine"])
    if machine.get("memory_bytes"):
        machine["memory"] = memory(machine.pop("memory_bytes"))
    return [*results["versions"].items(), ("commit", results.get("commit")), *machine.items()]


def write_report(results: Mapping[str, Any], folder: Path) -> Path:
    """Write `report.html` into `folder`, all or nothing, and return its path."""
    path = Path(folder) / "report.html"
    write_atomic(path, render(results))
    return path


def write_picture(results: Mapping[str, Any], path: Path) -> Path:
    """Write one PNG for a README: differences along training beside the final intervals."""
    path = Path(path)
    write_atomic(path, figures.picture(results))
    return path
