"""Figures of `polyak dynamics`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from polyak.report.figures import Panel, drawn
from polyak.report.svg import color, styles

WALK = {
    "update": "size of updates ‖u‖/√d",
    "turn": "cos(u, update before)",
    "size": "size of x, ‖x‖/√d",
}
"""What is drawn of x along depth."""
Numbers = Mapping[str, Any]


def numbers_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """The path's numbers by `POINT/NAME`."""
    return dict(((run.get("found") or {}).get("path") or {}).get("numbers") or {})


def along(run: Mapping[str, Any], name: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(point, mean with its interval) of one of x's numbers, where it is defined."""
    for key, one in numbers_of(run).items():
        point, _, own = key.partition("/")
        if own == name and point != "whole" and one["mean"]:
            yield int(point), one["mean"]


def streams_of(results: Mapping[str, Any]) -> list[str]:
    """The streams of any run."""
    parts = [key.split("/") for run in results["runs"] for key in numbers_of(run)]
    return list(dict.fromkeys(key[1] for key in parts if len(key) == 3))


def _line(axes: Axes, run: Mapping[str, Any], results: Mapping[str, Any], points: Any) -> bool:
    """One run's values along depth with bars for their intervals."""
    found = list(points)
    if not found:
        return False
    style = styles(results)[run["name"]]
    axes.errorbar(
        [place for place, _ in found],
        [one["value"] for _, one in found],
        yerr=[one["half_width"] for _, one in found],
        color=style.color,
        linestyle=style.line,
        marker=style.marker,
        markersize=4,
        linewidth=1.2,
        elinewidth=0.8,
    )
    return True


def _open_marks(
    axes: Axes, run: Mapping[str, Any], results: Mapping[str, Any], points: Any
) -> None:
    """The values of a run's untrained twin, without bars."""
    style = styles(results)[run["name"]]
    axes.plot(
        [place for place, _ in points],
        [one["value"] for _, one in points],
        linestyle="none",
        marker=style.marker,
        markersize=4,
        color=style.color,
        markerfacecolor="none",
    )


def _depth(axes: Axes, results: Mapping[str, Any], ylabel: str) -> None:
    """Points by name where the runs have the same, by number elsewhere."""
    parts = [part for run in results["runs"] for part in (run.get("found") or {}).values()]
    every = {tuple(part["labels"]) for part in parts if "labels" in part}
    axes.set_ylabel(ylabel)
    axes.set_xlabel("substep")
    if len(every) == 1 and len(labels := next(iter(every))) <= 13:
        short = [label.replace("attention", "att") for label in labels]
        axes.set_xticks(range(len(labels)), short, rotation=60, ha="right", fontsize="small")


def losses(axes: Axes, results: Mapping[str, Any], which: str) -> bool:
    """Loss through the final norm and head after every substep; through the lens."""
    drew = False
    for run in results["runs"]:
        curve = (run.get("found") or {}).get("curve") or {}
        drew |= _line(axes, run, results, enumerate(curve.get(which) or ()))
    _depth(axes, results, "loss, nats per token")
    return drew


def walk(axes: Axes, results: Mapping[str, Any], name: str) -> bool:
    """One of x's numbers along depth."""
    drew = [_line(axes, run, results, along(run, name)) for run in results["runs"]]
    _depth(axes, results, WALK[name])
    return any(drew)


def retention(axes: Axes, results: Mapping[str, Any], stream: str) -> bool:
    """The cosine of a stream after and before a substep, along depth."""
    name = f"{stream}/retention"
    drew = [_line(axes, run, results, along(run, name)) for run in results["runs"]]
    _depth(axes, results, f"cos({stream}′, {stream})")
    return any(drew)


def fields_of(run: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(substep from 1, what was found) of a run's oracles."""
    for key, one in (run.get("found") or {}).items():
        part, _, place = key.partition("/")
        if part == "field" and place.isdigit():
            yield int(place), one


def kappas(axes: Axes, results: Mapping[str, Any], which: str) -> bool:
    """κ of the oracles along depth: trained with bars, untrained as open marks."""
    drew = False
    for run in results["runs"]:
        found = list(fields_of(run))
        values = [(n, one["trained"]["oracle"][which]) for n, one in found]
        drew |= _line(axes, run, results, [(n, value) for n, value in values if value])
        nulls = [(n, one["untrained"]["oracle"][which]) for n, one in found]
        _open_marks(axes, run, results, [(n, value) for n, value in nulls if value])
    axes.axhline(0, color=color("muted"), linewidth=0.8)
    _depth(axes, results, {"kappa": "κ", "kappa_token": "κ of own tokens"}[which])
    return drew


GROWTH = {
    "log_product": ("stability", "ln ‖Π‖ from the start"),
    "inside": ("stability", "share inside the region"),
    "update/rise": ("energy", "rise of ln E"),
}
"""Part and axis of what is drawn along depth beside untrained models."""


def part_of(run: Mapping[str, Any], part: str, which: str) -> dict[str, Any]:
    """The numbers of `energy` or `stability`, by name; `which`: trained or untrained."""
    return dict(((run.get("found") or {}).get(f"{part}/{which}") or {}).get("numbers") or {})


def growth(axes: Axes, results: Mapping[str, Any], name: str) -> bool:
    """One number along depth; untrained as open marks."""
    drew, (part, title) = False, GROWTH[name]
    for run in results["runs"]:
        found = {
            which: [
                (int(key.partition("/")[0]), one["mean"])
                for key, one in part_of(run, part, which).items()
                if key.partition("/")[2] == name and one["mean"]
            ]
            for which in ("trained", "untrained")
        }
        drew |= _line(axes, run, results, found["trained"])
        _open_marks(axes, run, results, found["untrained"])
    _depth(axes, results, title)
    return drew


def all_figures(results: Mapping[str, Any]) -> dict[str, Markup]:
    """Every figure of the page that has something to show, by name."""
    return drawn(
        results,
        (
            Panel("loss", "Loss after every substep", losses, ("loss",)),
            Panel("lens", "Loss after every substep, through the affine lens", losses, ("lens",)),
            *(Panel(name, f"Along depth: {what}", walk, (name,)) for name, what in WALK.items()),
            *(
                Panel(f"kept-{stream}", f"What {stream} keeps", retention, (stream,), svg=f"k{n}")
                for n, stream in enumerate(streams_of(results))
            ),
            Panel("kappa", "κ of every oracle", kappas, ("kappa",)),
            Panel("kappa-token", "κ of every oracle, own tokens", kappas, ("kappa_token",)),
            *(
                Panel(name.replace("/", "-"), f"Along depth: {what}", growth, (name,))
                for name, (_, what) in GROWTH.items()
            ),
        ),
    )
