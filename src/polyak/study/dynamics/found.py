"""What kept dynamics look like: names of parts and numbers, and a closed table for each."""

from __future__ import annotations

import re
from typing import Any

from polyak.analysis.dynamics_config import DynamicsConfig
from polyak.reading import (
    Check,
    UnfitError,
    between,
    list_of,
    named,
    one_of,
    only,
    optional,
    text,
    whole,
    with_path,
)

_PLACES = 10_000
"""Points along depth, at most."""
_NUMBER = between(-1e30, 1e30)
_FLAG = one_of(True, False)
_KEY = re.compile(r"(?:whole|\d{1,4})(?:/\w{1,200}){1,2}", re.ASCII)
"""`POINT/NAME`, or `POINT/STREAM/NAME`, of a number along depth."""
_LOOP = re.compile(r"(?:updates|random)/\d[\d.e-]{0,20}", re.ASCII)
_SUBSTEP = re.compile(r"field/[1-9]\d{0,3}", re.ASCII)

INTERVAL = only(
    {**dict.fromkeys(("value", "low", "high", "half_width"), _NUMBER), "samples": whole()}
)
_MAYBE = optional(INTERVAL)
_LABELS = list_of(text(200), _PLACES, 1)
_SUMMARY = only(
    {
        "mean": _MAYBE,
        "quantiles": optional(list_of(optional(_NUMBER), 3, 3)),
        "missing": optional(_NUMBER),
    }
)
_ALONG = only(
    {
        "labels": _LABELS,
        "numbers": named(lambda key: _SUMMARY if _KEY.fullmatch(key) else None),
    },
    {"tokens": whole()},
)
_MATRIX = only(
    {
        **dict.fromkeys(("kappa", "kappa_probes", "kappa_token", "own_share", "trace"), _MAYBE),
        "r": optional(list_of(optional(_NUMBER), 3, 3)),
    }
)
_SYMMETRIC = only(
    {**dict.fromkeys(("top", "bottom", "positive"), _MAYBE), "bounds": optional(whole())}
)
_LOOPED = only({"share": _MAYBE, "per_area": _MAYBE, "floor": optional(_NUMBER)})
_TOP = only({"value": optional(_NUMBER), "residual": optional(_NUMBER), "converged": _FLAG})
_GAUSS_NEWTON = only(
    {
        **dict.fromkeys(("trace", "rest", "size", "cosine", "output_gradient"), _MAYBE),
        **dict.fromkeys(("top_hessian", "top_gauss_newton"), _TOP),
        **dict.fromkeys(("probes", "tokens"), whole()),
        "top": optional(_NUMBER),
    }
)


def fits(config: DynamicsConfig) -> Check:
    """A run's parts, as `dynamics_of` gives them when asked for this; some may be missing."""

    def part_named(name: str) -> Check | None:
        return _check_of(name) if name.partition("/")[0] in config.chosen else None

    return named(part_named)


def _check_of(name: str) -> Check | None:
    if _SUBSTEP.fullmatch(name):
        return only({"label": text(200), "trained": _field, "untrained": _field})
    return {
        "curve": _curve,
        "path": _ALONG,
        "field/nulls": only({"random": _MATRIX, "triangular": _MATRIX}),
        "energy": only({"does_not_apply": text(2000)}),
        **dict.fromkeys(
            (f"{part}/{which}" for part in ("energy", "stability") for which in _TWINS), _ALONG
        ),
        "gauss_newton": _GAUSS_NEWTON,
    }.get(name)


_TWINS = ("trained", "untrained")


def _curve(value: Any) -> None:
    """Losses at every point, changes between them, and losses through the lens or none."""
    losses = list_of(INTERVAL, _PLACES, 1)
    shape = {"labels": _LABELS, "loss": losses, "change": list_of(INTERVAL, _PLACES)}
    only({**shape, "lens": optional(losses), "tokens": whole()})(value)
    count = len(value["labels"])
    for name, wanted in (("loss", count), ("change", count - 1), ("lens", count)):
        if value[name] is not None and len(value[name]) != wanted:
            raise UnfitError(f"a list of {wanted:,}", value[name]).inside(name)


def _field(value: Any) -> None:
    """An oracle's Jacobian, and what loops of both kinds at full size give."""
    loops = named(lambda key: _LOOPED if _LOOP.fullmatch(key) else None)
    only(
        {
            "oracle": _MATRIX,
            **dict.fromkeys(("core", "metric"), optional(_MATRIX)),
            "symmetric": _SYMMETRIC,
            "loops": loops,
        }
    )(value)
    for name in ("updates/1", "random/1"):
        with_path(_LOOPED, value["loops"].get(name), f"loops.{name}")
