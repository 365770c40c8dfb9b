"""What kept dynamics may hold: a closed table, whose refusals name the field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from polyak.analysis.dynamics_config import DynamicsConfig
from polyak.errors import RunError
from polyak.reading import fields
from polyak.study.dynamics.found import fits

INTERVAL = {"value": 1.0, "low": 0.5, "high": 1.5, "half_width": 0.5, "samples": 8}
SUMMARY = {"mean": INTERVAL, "quantiles": [0.1, 0.5, 0.9], "missing": 0.0}
MATRIX = {
    **dict.fromkeys(("kappa", "kappa_probes", "trace"), INTERVAL),
    **dict.fromkeys(("kappa_token", "own_share")),
    "r": [0.1, 0.2, 0.3],
}
LOOP = {"share": INTERVAL, "per_area": INTERVAL, "floor": 1e-6}
ORACLE = {
    **dict.fromkeys(("oracle", "core"), MATRIX),
    "metric": None,
    "symmetric": {**dict.fromkeys(("top", "bottom", "positive"), INTERVAL), "bounds": 0},
    "loops": {"updates/0.01": LOOP, "updates/1": LOOP, "random/1": LOOP},
}
TOP = {"value": 2.0, "residual": 1e-6, "converged": True}
LABELS = ["embedding", "1 attention", "1 mlp"]
FOUND: dict[str, Any] = {
    "curve": {
        "labels": LABELS,
        "loss": [INTERVAL] * 3,
        "change": [INTERVAL] * 2,
        "lens": None,
        "tokens": 64,
    },
    "path": {"labels": LABELS, "numbers": {"1/size": SUMMARY, "2/v/gain": SUMMARY}, "tokens": 64},
    "field/1": {"label": "1 attention", "trained": ORACLE, "untrained": ORACLE},
    "field/nulls": {"random": MATRIX, "triangular": MATRIX},
    "energy": {"does_not_apply": "attention=linear"},
    "stability/trained": {"labels": LABELS, "numbers": {"1/radius": SUMMARY}},
    "gauss_newton": {
        **dict.fromkeys(("trace", "rest", "size", "cosine", "output_gradient"), INTERVAL),
        "top": 0.5,
        "top_hessian": TOP,
        "top_gauss_newton": TOP,
        "probes": 8,
        "tokens": 64,
    },
}


def test_what_is_measured_fits() -> None:
    fits(DynamicsConfig())(FOUND)
    fits(DynamicsConfig())({})


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("x",), 1, "found.x must be left out: no field has this name"),
        (("field/0",), {}, "found.field/0 must be left out"),
        (("curve", "change"), [], "found.curve.change must be a list of 2"),
        (("curve", "loss", 1, "value"), "1", "loss.1.value must be a number"),
        (("curve", "loss", 1, "high"), 1e40, "from -1e+30 to 1e+30"),
        (("path", "numbers", "../size"), SUMMARY, "must be left out"),
        (("path", "numbers", "1/size", "quantiles"), [1, 2], "quantiles must be a list of 3"),
        (("field/1", "trained", "loops"), {}, "trained.loops.updates/1 must be an object"),
        (("stability/trained", "labels"), ["a" * 300], "labels.0 must be text of at most 200"),
        (("gauss_newton", "top_hessian", "converged"), 1, "converged must be one of True, False"),
    ],
)
def test_what_is_never_measured_is_refused_by_name(
    place: tuple[Any, ...], value: Any, says: str
) -> None:
    found = json.loads(json.dumps(FOUND))
    inside = found
    for step in place[:-1]:
        inside = inside[step]
    inside[place[-1]] = value
    with pytest.raises(RunError) as error:
        fields({"found": found}, "results.json", {"found": fits(DynamicsConfig())})
    assert says in str(error.value)


def test_parts_that_were_not_asked_for_are_refused() -> None:
    with pytest.raises(RunError, match=r"found\.path must be left out"):
        fields({"found": FOUND}, "f", {"found": fits(DynamicsConfig(parts="curve,field"))})
