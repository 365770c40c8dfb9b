"""What a kept measurement of curvature looks like: a closed table for each of its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polyak.analysis.config import SharpnessConfig
from polyak.analysis.groups import GROUPS
from polyak.reading import (
    Check,
    anything,
    between,
    list_of,
    mapping_of,
    named,
    one_of,
    only,
    optional,
    text,
    whole,
    with_path,
)

NUMBER = between(-1e30, 1e30)
"""Its eighth power, which moments and their intervals come to, is still a number."""
POINTS = 10_000
"""Of a curve, at most."""
_FLAG = one_of(True, False)
_COST = {"seconds": NUMBER, "products": whole()}
_INTERVAL = only(
    {**dict.fromkeys(("value", "low", "high", "half_width"), NUMBER), "samples": whole()}
)
_TRACE = only(
    {
        **{f"{name}{of}": _INTERVAL for name in ("deflated", "hutchinson") for of in ("", "_mean")},
        **dict.fromkeys(("deflated_directions", "products"), whole()),
        **dict.fromkeys(("reached", "exact"), _FLAG),
        "precision": NUMBER,
    }
)
_LOSS = {
    **dict.fromkeys(("value", "gradient_norm", "weight_norm"), NUMBER),
    "parameters": whole(1),
    "flops_per_product": optional(whole()),
}
_RISE = only(
    {
        **dict.fromkeys(("rho", "at_least", "sam", "first_order"), NUMBER),
        "start": text(100),
        "by_start": mapping_of(NUMBER, 100),
    }
)


def fits(config: SharpnessConfig) -> Check:
    """A run's parts, as `sharpness_of` gives them when asked for this; some may be missing."""
    return named(part_of(config))


def part_of(config: SharpnessConfig) -> Callable[[str], Check | None]:
    """What the part of a name must be; None for what is no part."""
    pair = only({"value": NUMBER, "residual": NUMBER, "converged": _FLAG})
    pairs = list_of(pair, config.top_k)
    curvature = {
        **dict.fromkeys(("top", "bottom"), pairs),
        "tolerance": NUMBER,
        "parameters": whole(1),
        "trace": _TRACE,
        **_COST,
    }
    radii = len(config.radii)
    parts = {
        "loss": only({**_LOSS, **_COST}),
        "spectrum": only({**curvature, "peak_memory_bytes": optional(whole())}),
        "density": _density(config),
        "rise": only({"rises": list_of(_RISE, radii, radii), **_COST}),
        "slices": only({"line": _grid("a"), "plane": _grid("at", square=True), **_COST}),
        "scaled": only({**curvature, "scale": one_of(config.scale)}),
        "gauss_newton": only(curvature),
        **{f"group {name}": only({**curvature, "group": one_of(name)}) for name in GROUPS},
    }
    return parts.get


def _density(config: SharpnessConfig) -> Check:
    """Nodes and weights of each probe, and what follows from them; without all probes, partial."""
    wanted = {
        **{
            name: list_of(list_of(each, config.density_steps, 1), config.density_probes, 1)
            for name, each in (("nodes", NUMBER), ("weights", between(0, 2)))
        },
        **dict.fromkeys(("steps", "probes"), whole(1)),
        "moments": list_of(_INTERVAL, 100),
        "negative": optional(_INTERVAL),
        "curves": named({"whole": _curve, "middle": _curve}.get),
        "products": whole(),
    }
    may = {"status": one_of("partial"), "seconds": NUMBER}

    def check(value: Any) -> None:
        only(wanted, may)(value)
        with_path(_sized(anything, len(value["nodes"])), value["weights"], "weights")
        for place, nodes in enumerate(value["nodes"]):
            each = _sized(anything, len(nodes))
            with_path(each, value["weights"][place], f"weights.{place}")

    return check


def _curve(value: Any) -> None:
    """Heights over points, as many as there are points."""
    heights = list_of(between(0, 1e30), POINTS)
    only({"x": list_of(NUMBER, POINTS), "density": heights})(value)
    with_path(_sized(anything, len(value["x"])), value["density"], "density")


def _grid(axis: str, *, square: bool = False) -> Check:
    """Losses, null where they are not finite, in rows as long as the axis."""
    row = list_of(optional(NUMBER), POINTS)

    def check(value: Any) -> None:
        only(
            {axis: list_of(NUMBER, POINTS, 3), "losses": list_of(row, POINTS, 1), "seed": whole()}
        )(value)
        size = len(value[axis])
        rows = _sized(_sized(anything, size), size if square else len(value["losses"]))
        with_path(rows, value["losses"], "losses")

    return check


def _sized(check: Check, size: int) -> Check:
    return list_of(check, size, size)
