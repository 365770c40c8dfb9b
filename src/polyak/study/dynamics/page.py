"""The tables, figures and page of `polyak dynamics`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from polyak.data.left_out import lines
from polyak.report.pages import draw
from polyak.report.tables import house_table
from polyak.study.dynamics.figures import (
    all_figures,
    fields_of,
    numbers_of,
    part_of,
    streams_of,
)
from polyak.words import NONE, fixed, folded, listed, plural

NAME = 20
Row = tuple[str, Sequence[str]]
"""A run's name and the cells behind it."""
HEADS = {
    "curve": ("after", "loss", "change"),
    "path": ("after", "‖u‖/√d", "‖u‖/‖x‖", "cos(u, u₋)", "damping"),
    "streams": ("stream", "after", "retention", "gain", "damping"),
    "field": ("oracle", "κ", "untrained", "κ token", "own share"),
    "sign": ("oracle", "tr J/√(n‖J‖²)", "λ min", "λ max", "λ > 0"),
    "norm": ("oracle", "κ core", "κ metric", "loop", "random loop"),
    "energy": ("after", "rise of ln E", "random", "cosine", "untrained"),
    "rising": ("after", "share rising", "random", "untrained", "its random"),
    "maps": ("after", "ρ(B)", "‖B‖", "departure", "retention"),
    "region": ("after", "inside", "untrained", "Re λ > 0", "untrained"),
    "growth": ("after", "ln‖Π‖", "untrained", "Σ ln‖B‖", "Σ ln ρ(B)"),
    "gauss_newton": ("tr G/tr H", "‖H − G‖/‖H‖", "λmax(G)/λmax(H)", "‖p − e_y‖"),
    "whole": ("length/√d", "distance/√d", "detour"),
}
PATH = ("whole", "path", "streams")
TWINS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "energy": (
        "energy",
        (
            ("trained", "update/rise"),
            ("trained", "random/rise"),
            ("trained", "update/cosine"),
            ("untrained", "update/cosine"),
        ),
    ),
    "rising": (
        "energy",
        tuple(
            (which, f"{what}/rising")
            for which in ("trained", "untrained")
            for what in ("update", "random")
        ),
    ),
    "maps": (
        "stability",
        tuple(("trained", n) for n in ("radius", "norm", "departure", "retention")),
    ),
    "region": (
        "stability",
        tuple((w, n) for n in ("inside", "ascending") for w in ("trained", "untrained")),
    ),
    "growth": (
        "stability",
        (
            ("trained", "log_product"),
            ("untrained", "log_product"),
            ("trained", "log_norms"),
            ("trained", "log_radii"),
        ),
    ),
}
"""Part and columns of the tables that have untrained models beside trained ones."""
FIELD = ("field", "sign", "norm")
WALKED = ("update", "relative", "turn", "damping")
KEPT = ("retention", "gain", "damping")
CAPTIONS = {
    "curve": "Loss through the final norm and head, nats per token",
    "path": "Updates u of x; damping 1 − ⟨u, u₋⟩/‖u₋‖²",
    "streams": "Streams: retention cos(v′, v), gain ‖∂v′/∂v‖, damping",
    "field": "κ = tr J²/‖J‖²: 1 a gradient, 0 as random, −1 a rotation",
    "sign": "Symmetric part of J; λ > 0: share of Σλ²",
    "norm": "κ without and in the metric of the pre-norm; loops |∮|/Σ|side|",
    "energy": "Interaction energy E along attention's update u; cosine of u with ∇S",
    "rising": "Share of (token, head) at which E rises along u",
    "maps": "State map of each substep, a token at a time",
    "region": "Shares of (token, eigenvalue λ of the oracle) in the region, and ascending",
    "growth": "Product Π of the state maps from the start",
    "gauss_newton": "Gauss–Newton's share G of the curvature H",
    "whole": "The whole path of x",
}


def over(part: str) -> str:
    """What the intervals of a table are over."""
    return "probes; of ‖p − e_y‖ over sequences" if part == "gauss_newton" else "sequences"


def interval(value: Mapping[str, Any] | None, places: int = 3) -> str:
    """`1.234 ± 0.021`: a mean and its 95% half-width; a dash for none."""
    if not value:
        return NONE
    return f"{fixed(value['value'], places)} ± {value['half_width']:.{places}f}"


def _mean(run: Mapping[str, Any], key: str) -> str:
    return interval((numbers_of(run).get(key) or {}).get("mean"))


def rows(results: Mapping[str, Any], part: str) -> Iterator[Row]:
    """The rows of one of the tables in `HEADS`."""
    for run in results["runs"]:
        found = run.get("found") or {}
        if part == "curve" and "curve" in found:
            yield from ((run["name"], cells) for cells in _curve(found["curve"]))
        if part in FIELD:
            yield from ((run["name"], cells) for cells in _field(run, part))
        elif part == "gauss_newton" and part in found:
            yield run["name"], _gauss_newton(found[part])
        elif part in TWINS:
            yield from ((run["name"], cells) for cells in _beside(run, part))
        elif part in PATH and "path" in found:
            labels = found["path"]["labels"]
            yield from ((run["name"], cells) for cells in _path(run, labels, part))


def _curve(curve: Mapping[str, Any]) -> Iterator[list[str]]:
    for place, (label, loss) in enumerate(zip(curve["labels"], curve["loss"], strict=True)):
        change = curve["change"][place - 1] if place else None
        yield [label, interval(loss), interval(change)]


def _path(run: Mapping[str, Any], labels: Sequence[str], part: str) -> Iterator[list[str]]:
    if part == "whole":
        yield [_mean(run, f"whole/{name}") for name in ("length", "distance", "detour")]
    for place, label in enumerate(labels):
        if part == "path" and place:
            yield [label, *(_mean(run, f"{place}/{name}") for name in WALKED)]
        if part == "streams":
            for stream in streams_of({"runs": [run]}):
                at = f"{place}/{stream}"
                if f"{at}/size" in numbers_of(run):
                    yield [stream, label, *(_mean(run, f"{at}/{name}") for name in KEPT)]


def _field(run: Mapping[str, Any], part: str) -> Iterator[list[str]]:
    for _, one in fields_of(run):
        found, null = one["trained"], one["untrained"]["oracle"]
        own = found["oracle"]
        cells = {
            "field": (own["kappa"], null["kappa"], own["kappa_token"], own["own_share"]),
            "sign": (
                own["trace"],
                *(found["symmetric"][name] for name in ("bottom", "top", "positive")),
            ),
            "norm": (
                *((found[name] or {}).get("kappa") for name in ("core", "metric")),
                *(found["loops"][f"{name}/1"]["share"] for name in ("updates", "random")),
            ),
        }[part]
        yield [one["label"], *map(short, cells)]
    nulls = (run.get("found") or {}).get("field/nulls") or {}
    for name, one in nulls.items() if part == "field" else ():
        columns = (one["kappa"], None, one["kappa_token"], one["own_share"])
        yield [f"({name})", *map(short, columns)]


def _beside(run: Mapping[str, Any], table: str) -> Iterator[list[str]]:
    """The rows of a table of `TWINS`: of the substeps at which there is something."""
    part, columns = TWINS[table]
    labels = ((run.get("found") or {}).get(f"{part}/trained") or {}).get("labels") or ()
    both = {which: part_of(run, part, which) for which in ("trained", "untrained")}
    for place, label in enumerate(labels):
        ones = [both[which].get(f"{place}/{name}") for which, name in columns]
        if any(ones):
            yield [label, *(short((one or {}).get("mean")) for one in ones)]


def _gauss_newton(found: Mapping[str, Any]) -> list[str]:
    sure = found["top_hessian"]["converged"] and found["top_gauss_newton"]["converged"]
    top = NONE if found["top"] is None else fixed(found["top"], 3) + ("" if sure else " (bounds)")
    return [short(found["trace"]), short(found["rest"]), top, short(found["output_gradient"])]


def short(value: Mapping[str, Any] | None) -> str:
    """`0.03 ± 0.01`, or with more digits what is small."""
    if not value:
        return NONE
    places = 3 if abs(value["value"]) < 10 else 1
    return interval(value, places)


def tables(results: Mapping[str, Any]) -> RenderableType:
    """What the terminal shows, 80 columns wide."""
    shown: list[RenderableType] = []
    for part, head in HEADS.items():
        table = house_table(f"{CAPTIONS[part]}; ± 95% over {over(part)}", "", *head)
        before = None
        for name, cells in rows(results, part):
            table.add_row(Text(folded(name, NAME) if name != before else ""), *cells)
            before = name
        if table.row_count:
            shown.append(table)
    return Group(*shown, *(Text(line) for line in warnings(results)))


def warnings(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before comparing."""
    said = lines([run["tokens"] for run in results["runs"]])
    if len({run["tokens"]["fingerprint"] for run in results["runs"]}) > 1:
        said.append("The runs are measured on different tokens.")
    for run in results["runs"]:
        for one in (run.get("found") or {}).values():
            if "does_not_apply" in one:
                said.append(f"{run['name']}: {one['does_not_apply']}.")
    return said


def sentence(results: Mapping[str, Any]) -> str:
    """What the page says first."""
    parts = listed([part.replace("_", " ") for part in results["settings"]["parts"]])
    return f"{plural(len(results['runs']), 'run')}: {parts}."


def render(results: Mapping[str, Any]) -> str:
    """The page for `results`, the content of results.json."""
    return draw(
        "dynamics.html",
        results,
        figures=all_figures(results),
        sentence=sentence(results),
        warnings=warnings(results),
        heads=HEADS,
        captions=CAPTIONS,
        over=over,
        rows={part: list(rows(results, part)) for part in HEADS},
        streams=streams_of(results),
        settings=list(results["settings"].items()),
    )
