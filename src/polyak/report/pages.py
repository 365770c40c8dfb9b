"""What every page has in common: the templates and their filters.

A page makes no network request (a Content-Security-Policy in it says so to the browser) and holds
its figures as inline SVG that follow the reader's light or dark setting.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from polyak import formats, words
from polyak.errors import RunError
from polyak.files import read_json, write_atomic, write_json
from polyak.report import svg


@lru_cache
def environment() -> jinja2.Environment:
    """Jinja2 with the templates of this package, autoescaping, and the words that pages use."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("polyak.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("compact", "duration", "fixed", "listed", "loss", "mean_and_sd", "memory"):
        made.filters[name] = getattr(words, name)
    made.filters.update(plural=words.plural, short=words.short, with_error=words.with_error)
    made.filters.update(interval=words.interval_text, difference=words.difference_text)
    made.filters.update(breakable=breakable, scalar=scalar, zip=zip)
    made.globals.update(NONE=words.NONE, palette=svg.css())
    return made


def check_out(out: Path, kind: str, command: str | None = None) -> None:
    """Refuse to write over what another command found.

    Args:
        out: the folder of the results.
        kind: of the results that are to be written.
        command: of a command that begins anew each time, its line: results of the same kind, made
            by another line, are said to be replaced.

    Raises:
        RunError: the results.json in `out` is of another kind, or there is a page without one.
    """
    if not (out / "results.json").exists():
        if (out / "report.html").exists():
            raise RunError(f"{out} holds a report.html of something else; choose another --out")
        return
    found = read_json(out / "results.json")
    there = found.get("kind") if isinstance(found, dict) else None
    if there != kind:
        raise RunError(
            f"{out} holds the results of another command ({there or 'unknown'}); "
            "choose another --out"
        )
    formats.up_to_date(found, kind, out / "results.json")
    if command is not None and found.get("command") not in (None, command):
        warnings.warn(f"{out}: the results of {found['command']!r} are replaced", stacklevel=1)


def save(out: Path, results: Mapping[str, Any], page: Callable[[Mapping[str, Any]], str]) -> None:
    """Write results.json and the page that `page` draws of it, each all or nothing."""
    write_json(out / "results.json", results)
    write_atomic(out / "report.html", page(results))


def draw(template: str, results: Mapping[str, Any], **more: Any) -> str:
    """A page: a template with the results as `r`, the entries' keys, the machine, and `more`."""
    return (
        environment()
        .get_template(template)
        .render(r=results, keys=keys_of(results), machine=machine_of(results), **more)
    )


def keys_of(results: Mapping[str, Any]) -> dict[str, Markup]:
    """A sample of every entry's line and marker, by name."""
    return {name: Markup(svg.key(style)) for name, style in svg.styles(results).items()}


def breakable(text: str) -> Markup:
    """Text whose long names wrap where their parts meet; options stay together if they fit."""
    escaped = str(escape(text))
    for sign in "_/:=":
        escaped = escaped.replace(sign, f"{sign}<wbr>")
    return Markup(re.sub(r"(\[[^\]]*\])", r'<span class="options">\1</span>', escaped))


def scalar(value: Any) -> str:
    """A setting as text: floats in short form, lists with commas."""
    if value is None:
        return words.NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(scalar(x) for x in value) or words.NONE
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {scalar(x)}" for k, x in value.items()) or words.NONE
    return str(value)


def machine_of(results: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Versions, commit and hardware as (name, text) pairs."""
    machine = dict(results["machine"])
    if machine.get("memory_bytes"):
        machine["memory"] = words.memory(machine.pop("memory_bytes"))
    return [*results["versions"].items(), ("commit", results.get("commit")), *machine.items()]
