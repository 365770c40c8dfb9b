"""The table and the page of `polyak sharpness`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from polyak.data.left_out import lines
from polyak.report.pages import draw
from polyak.report.tables import house_table
from polyak.study.sharpness import figures as sharpness_figures
from polyak.words import NONE, fixed, folded, plural

NAME = 20
"""Columns for a run's name in the terminal."""


def number(value: float | None) -> str:
    """Three significant digits, with a true minus sign."""
    return NONE if value is None else f"{value:.3g}".replace("-", "−")


def eigenvalue(pair: Mapping[str, Any] | None, end: str) -> str:
    """A value, or a bound with its sign: `≥ 12.1` at the top, `≤ −3.2` at the bottom."""
    if not pair:
        return NONE
    sign = "" if pair["converged"] else "≥ " if end == "top" else "≤ "
    return sign + number(pair["value"])


def interval(value: Mapping[str, Any] | None) -> str:
    """`370 ± 15`: the half-width of the 95% interval with two digits."""
    if not value:
        return NONE
    half = value["half_width"]
    return f"{number(value['value'])} ± {half:.2g}"


def outermost(part: Mapping[str, Any] | None, end: str) -> str:
    """The outermost eigenvalue at one end."""
    return eigenvalue(part[end][0], end) if part and part[end] else NONE


def trace_of(part: Mapping[str, Any] | None, *, mean: bool = False) -> str:
    """The trace, or trace/N, with its interval."""
    return interval(part["trace"]["deflated_mean" if mean else "deflated"]) if part else NONE


def rise_of(found: Mapping[str, Any], place: int) -> str:
    """`≥ 0.013`: the largest rise found within a radius."""
    part = found.get("rise")
    return f"≥ {number(part['rises'][place]['at_least'])}" if part else NONE


def tables(results: Mapping[str, Any]) -> RenderableType:
    """What the terminal shows, 80 columns wide."""
    radii, scale = results["settings"]["rho"], results["settings"]["scale"]
    first = house_table(
        "Hessian of the loss; ± are 95% intervals, ≥ and ≤ bounds",
        *("", "loss", "λ max", "λ min", "trace", "trace/N ·10⁻³"),
    )
    second = house_table(
        f"Scale-aware spectrum ({scale}) and the largest rise found within ρ",
        *("", "λ max", "trace", *(f"ρ = {rho:g}" for rho in radii[:3])),
    )
    for run in results["runs"]:
        found = run.get("found") or {}
        spectrum, scaled = found.get("spectrum"), found.get("scaled")
        name = Text(folded(run["name"], NAME))
        first.add_row(
            name,
            fixed(found["loss"]["value"], 4) if "loss" in found else NONE,
            outermost(spectrum, "top"),
            outermost(spectrum, "bottom"),
            trace_of(spectrum),
            interval(_thousandths(spectrum["trace"]["deflated_mean"])) if spectrum else NONE,
        )
        second.add_row(
            name,
            outermost(scaled, "top"),
            trace_of(scaled),
            *(rise_of(found, place) for place in range(len(radii[:3]))),
        )
    missed = _missed(results)
    return Group(first, second, *(Text(line) for line in missed))


def _thousandths(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: 1e3 * value[key] for key in ("value", "half_width")}


def _missed(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before trusting a number."""
    said = []
    for run in results["runs"]:
        for part, content in (run.get("found") or {}).items():
            estimate = content.get("trace")
            if estimate and not estimate["reached"]:
                said.append(
                    f"{run['name']}, {part}: the trace's interval is wider than "
                    f"{100 * estimate['precision']:g}% of it; allow more --max-probes."
                )
    tokens = {run["tokens"]["fingerprint"] for run in results["runs"]}
    if len(tokens) > 1:
        said.append("The runs are measured on different tokens; their losses differ for that too.")
    optimizers = {run["optimizer"] for run in results["runs"]}
    if len(optimizers) > 1:
        said.append(
            "The runs were trained by different optimizers, which changes flatness by itself; "
            "compare within one."
        )
    return said


def sentence(results: Mapping[str, Any]) -> str:
    """What the page says first."""
    runs = results["runs"]
    done = [run for run in runs if "spectrum" in (run.get("found") or {})]
    if not done:
        return f"{plural(len(runs), 'run')}; nothing measured yet."
    if len(runs) == 1:
        spectrum = done[0]["found"]["spectrum"]
        return (
            f"{done[0]['name']}: largest eigenvalue {outermost(spectrum, 'top')}, smallest "
            f"{outermost(spectrum, 'bottom')}, trace {trace_of(spectrum)}."
        )
    values = [run["found"]["spectrum"]["trace"]["deflated"]["value"] for run in done]
    return (
        f"{plural(len(runs), 'run')}, {len(done)} measured; traces from {number(min(values))} to "
        f"{number(max(values))}."
    )


def render(results: Mapping[str, Any]) -> str:
    """The page for `results`, the content of results.json."""
    groups = [
        (run["name"], content)
        for run in results["runs"]
        for part, content in (run.get("found") or {}).items()
        if part.startswith("group ")
    ]
    return draw(
        "sharpness.html",
        results,
        figures=sharpness_figures.all_figures(results),
        sentence=sentence(results),
        warnings=[*lines([run["tokens"] for run in results["runs"]]), *_missed(results)],
        groups=groups,
        spectra=[
            (run, title, (run.get("found") or {})[part])
            for run in results["runs"]
            for part, title in (
                ("spectrum", "Hessian"),
                ("scaled", "scale-aware"),
                ("gauss_newton", "Gauss–Newton"),
            )
            if part in (run.get("found") or {})
        ],
        number=number,
        eigenvalue=eigenvalue,
        outermost=outermost,
        trace_of=trace_of,
        interval_of=interval,
        settings=list(results["settings"].items()),
    )
