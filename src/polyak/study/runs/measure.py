"""Runs as a report reads them: their metrics made short."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak import formats
from polyak.compare.results import mean_scalars
from polyak.errors import PolyakError, RunError, TrustError
from polyak.files import read_json
from polyak.reading import anything, fields, mapping_of, optional, table, text, whole
from polyak.training.machine import heading
from polyak.training.runs.folder import RunFolder
from polyak.words import listed

POINTS = 400
"""Points of a curve in a report; longer logs are averaged in groups of rows."""
PLACE = ("step", "tokens", "seconds")
VALUES = (
    "loss",
    "gradient_norm",
    "tokens_per_second",
    "flops_per_second",
    "peak_fraction",
    "memory_bytes",
)
EVENTS = ("resume", "cut", "spike", "skipped", "changed")
Row = Mapping[str, Any]


_SETTINGS = {
    "model": table({"rule": text()}),
    "training": table({"seed": whole(), "steps": whole()}),
    "validation": optional(table({"tokens": optional(whole()), "bytes": optional(whole())})),
}
_ENVIRONMENT = {
    "environment": optional(
        table({name: optional(mapping_of(anything)) for name in ("machine", "versions")})
    )
}
_CORPUS = {
    "corpus": optional(
        table({f"validation_{name}": optional(whole()) for name in ("tokens", "bytes")})
    )
}
"""What is taken of run.json, and of the results.json of the comparison around it."""


def read_run(folder: Path, name: str) -> dict[str, Any]:
    """All that a report shows of one run, finished or not.

    Returns:
        `train`: series of the training rows, at most about 400 points, None where a row has no
        value; `curve`: every validation; `events`; how far it got, and what its settings are.

    Raises:
        RunError: run.json or metrics.jsonl cannot be read; the line is named.
    """
    run = RunFolder(folder)
    recorded = run.recorded()
    settings, result = recorded["settings"], run.result()
    if "training" not in settings:
        raise RunError(f"{folder} was imported, not trained here: it has no curves to draw")
    fields(settings, str(run.settings_file), _SETTINGS)
    fields(recorded, str(run.settings_file), _ENVIRONMENT)
    rows = run.metrics()
    train = [row for row in rows if row["kind"] == "train"]
    checks = [row for row in rows if row["kind"] == "validation"]
    last = max((row for row in (*train, *checks)), key=lambda row: row["step"], default={})
    speeds = [row["tokens_per_second"] for row in train if row.get("tokens_per_second")]
    losses = [(row["loss"], row["step"]) for row in checks if row.get("loss") is not None]
    best, best_step = min(losses, default=(None, None))
    loss = losses[-1][0] if losses else None
    factor = _bits_per_byte_factor(settings, folder)
    ends = result or {}
    peaks = [row["memory_bytes"] for row in train if row.get("memory_bytes")]
    return {
        "name": name,
        "folder": os.fspath(folder),
        "settings": settings,
        "environment": recorded.get("environment") or {},
        "rule": settings["model"]["rule"],
        "seed": settings["training"]["seed"],
        "status": "finished" if result else "unfinished",
        "parameters": _parameters(settings["model"], folder),
        "step": last.get("step", 0),
        "steps": settings["training"]["steps"],
        "tokens": last.get("tokens"),
        "loss": loss,
        "best_loss": best,
        "best_step": best_step,
        "bits_per_byte": loss * factor if loss is not None and factor else None,
        "seconds": last.get("seconds"),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "peak_memory_bytes": ends.get("peak_memory_bytes") or max(peaks, default=None),
        "scalars": _last_scalars(checks) or _last_scalars(train),
        "events": [
            {key: value for key, value in row.items() if key not in ("tokens", "flops")}
            for row in rows
            if row["kind"] in EVENTS
        ],
        "curve": {key: [row.get(key) for row in checks] for key in (*PLACE, "loss")},
        "train": series(train),
    }


def series(rows: Sequence[Row]) -> dict[str, Any]:
    """Training rows as columns, averaged in groups of equal length if there are many.

    A learned scalar's columns are its mean, least and largest value over depth and substeps.
    """
    size = -(-len(rows) // POINTS) if rows else 1
    groups = [rows[at : at + size] for at in range(0, len(rows), size)]
    rates = _names(rows, "rates")
    return {
        "rows_per_point": size,
        **{key: [group[-1].get(key) for group in groups] for key in PLACE},
        **{key: [_mean(row.get(key) for row in group) for group in groups] for key in VALUES},
        "rates": {
            name: [_mean((row.get("rates") or {}).get(name) for row in group) for group in groups]
            for name in rates
        },
        "scalars": {
            name: _spread([(group[-1].get("scalars") or {}).get(name) for group in groups])
            for name in _names(rows, "scalars")
        },
    }


def _names(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.get(key) or {}))


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def _spread(values: Sequence[Mapping[str, Sequence[Any]] | None]) -> dict[str, list[float | None]]:
    flat = [[x for layers in (v or {}).values() for x in _leaves(layers)] for v in values]
    return {
        "mean": [statistics.fmean(x) if x else None for x in flat],
        "low": [min(x, default=None) for x in flat],
        "high": [max(x, default=None) for x in flat],
    }


def _leaves(value: Any) -> list[float]:
    if isinstance(value, list | tuple):
        return [leaf for inner in value for leaf in _leaves(inner)]
    return [] if value is None else [value]


def _last_scalars(rows: Sequence[Row]) -> Any:
    """The learned scalars last logged, the rows left out in which one was not finite."""
    for row in reversed(rows):
        if not any(name.startswith("scalars.") for name in row.get("nonfinite", ())):
            return row.get("scalars")
    return None


def _parameters(model: Mapping[str, Any], folder: Path) -> int | None:
    """Parameters of a model; None where a user's rule is no longer there to ask."""
    from polyak.nn.config import ModelConfig
    from polyak.nn.cost import cost
    from polyak.nn.pieces import opened

    try:
        return cost(ModelConfig.from_dict(opened(folder, model))).total_parameters
    except TrustError:
        raise
    except PolyakError:
        return None


def _bits_per_byte_factor(settings: Mapping[str, Any], folder: Path) -> float | None:
    """Bits/byte per nat/token: from the run, or from the comparison that it is a part of."""
    from polyak.statistics.verdict import bits_per_byte_factor

    own = settings.get("validation") or {}
    corpus = {"validation_tokens": own.get("tokens"), "validation_bytes": own.get("bytes")}
    around = folder.resolve().parent.parent / "results.json"
    if corpus["validation_bytes"] is None and around.exists():
        found = read_json(around)
        if not isinstance(found, dict) or found.get("kind") != "comparison":
            return None
        found = fields(formats.up_to_date(found, "comparison", around), str(around), _CORPUS)
        of_all = found.get("corpus")
        if isinstance(of_all, dict) and of_all.get("validation_tokens") == own.get("tokens"):
            corpus = of_all
    return bits_per_byte_factor(corpus)


KIND = "runs"


SHOWN_IN_A_NAME = 3


def gather(read: Sequence[dict[str, Any]], *, command: str) -> dict[str, Any]:
    """results.json of runs as `read_run` gives them.

    Raises:
        RunError: none of them has logged anything.
    """
    begun = [run for run in read if run["step"]]
    silent = [run["name"] for run in read if not run["step"]]
    if not begun:
        raise RunError(
            f"no metrics yet: {listed(silent)} logged no training step; come back when training "
            "has gone on for a while"
        )
    differ = differing([run["settings"] for run in begun])
    names = _entry_names(begun, differ)
    runs = [{**run, "entry": names[_identity(run)]} for run in begun]
    return {
        **heading(KIND, command),
        "baseline": runs[0]["entry"],
        "entries": [_entry(name, runs, differ) for name in dict.fromkeys(names.values())],
        "runs": runs,
        "differences": differ,
        "warnings": _warnings(runs, silent),
    }


def _identity(run: Mapping[str, Any]) -> str:
    """What is equal for runs that differ in nothing but their seed."""
    settings = run["settings"]
    return json.dumps(
        {**settings, "training": {**settings["training"], "seed": None}}, sort_keys=True
    )


def _flat(settings: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        dotted = f"{name}.{key}" if name else key
        flat.update(_flat(value, dotted) if isinstance(value, Mapping) else {dotted: value})
    return flat


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dotted names of the settings in which runs differ, without the seed, in a run's order."""
    flat = [_flat(one) for one in settings]
    known = dict.fromkeys(name for one in flat for name in one if name != "training.seed")
    return [name for name in known if any(one.get(name) != flat[0].get(name) for one in flat)]


def _entry_names(runs: Sequence[Mapping[str, Any]], differ: Sequence[str]) -> dict[str, str]:
    """A name for each identity: the rule and, in brackets as in `compare`, what else differs.

    Where that would be long or not tell the entries apart, the first run's name serves,
    without its seed.
    """
    first = {_identity(run): run for run in reversed(runs)}
    telling = [n for n in differ if n != "model.rule" and not n.endswith(("fingerprint", "source"))]
    names = {}
    for identity, run in first.items():
        flat = _flat(run["settings"])
        values = [f"{name.removeprefix('model.')}={_word(flat.get(name))}" for name in telling]
        brackets = f"[{','.join(values)}]" if values else ""
        names[identity] = f"{run['rule']}{brackets}"
    if len(telling) > SHOWN_IN_A_NAME or len(set(names.values())) < len(names):
        names = {key: run["name"] for key, run in first.items()}
        shorter = {key: re.sub(r"[-_/ ]*seed[-_ ]?\d+$", "", name) for key, name in names.items()}
        if all(shorter.values()) and len(set(shorter.values())) == len(names):
            names = shorter
    return {identity: names[identity] for identity in dict.fromkeys(map(_identity, runs))}


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _entry(name: str, runs: Sequence[Mapping[str, Any]], differ: Sequence[str]) -> dict[str, Any]:
    own = [run for run in runs if run["entry"] == name]
    flat = _flat(own[0]["settings"])
    return {
        "name": name,
        "rule": own[0]["rule"],
        "seeds": [run["seed"] for run in own],
        "settings": {key: flat.get(key) for key in differ},
        "scalars": mean_scalars([run["scalars"] for run in own if run["scalars"]]),
    }


def _warnings(runs: Sequence[Mapping[str, Any]], silent: Sequence[str]) -> list[str]:
    """What a reader must know before comparing the curves."""
    said = []
    sets = _validation_sets(runs)
    if len(sets) > 1:
        groups = "; ".join(listed(names) for names in sets.values())
        said.append(
            f"These runs are validated on {len(sets)} different sets, so their validation losses "
            f"cannot be compared. Same set: {groups}."
        )
    machines = {json.dumps(_hardware(run), sort_keys=True) for run in runs}
    if len(machines) > 1:
        said.append(
            "The runs were made on different machines, or with other versions or threads: "
            "times, tokens/s and memory cannot be compared."
        )
    if silent:
        said.append(f"Left out, because nothing is logged yet: {listed(silent)}.")
    return said


def _validation_sets(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Names of the runs that are validated on each set."""
    sets: dict[str, list[str]] = {}
    for run in runs:
        fingerprint = (run["settings"].get("validation") or {}).get("fingerprint")
        sets.setdefault(str(fingerprint), []).append(run["name"])
    return sets


def _hardware(run: Mapping[str, Any]) -> dict[str, Any]:
    found = run["environment"]
    versions = found.get("versions") or {}
    return {**(found.get("machine") or {}), "torch": versions.get("torch")}
