"""Several runs measured one after the other into results.json and report.html, and gone on with.

What `polyak sharpness` and `polyak spectrum` have in common. A run's measurement is made of parts;
each is written as soon as it is known, so that a stopped command goes on with the next one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from polyak import formats
from polyak.data.left_out import skipped_files
from polyak.errors import RunError, shown_value
from polyak.evaluation.subjects import Subject, TokenSet
from polyak.files import locked, make_folder, sha256_of_json, write_atomic, write_json
from polyak.reading import ANY_OBJECT, Check, fields, list_of, optional, table, text
from polyak.report.pages import check_out
from polyak.report.pages import save as write_results
from polyak.study.parts import check_unchanged
from polyak.training.machine import heading, now

Found = dict[str, Any]
Progress = Callable[[float, str], None]
"""Called with the share of the work that is done, from 0 to 1, and with what is under way."""


class Measure(Protocol):
    """Everything that is asked for about one model; goes on from `found`, saves as it goes."""

    def __call__(
        self,
        subject: Subject,
        tokens: TokenSet,
        progress: Progress,
        *,
        found: Found | None,
        save: Callable[[Found], None],
    ) -> Found:
        """Measure one model."""


@dataclass(frozen=True)
class Measurement:
    """What one command measures of every run.

    Attributes:
        kind: of the results: the command's name.
        settings: all that the numbers depend on besides runs and tokens.
        measure: of one run.
        render: the page.
        derive: what of a run follows from what was found, for results.json.
        defaults: of the settings: an older version may not have had some.
        fits: what an earlier start found of a run, where it is read again.
    """

    kind: str
    settings: Mapping[str, Any]
    measure: Measure
    render: Callable[[Mapping[str, Any]], str]
    derive: Callable[[Found], dict[str, Any]] = lambda found: {}
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fits: Check = ANY_OBJECT


def measure_runs(
    measurement: Measurement,
    subjects: Sequence[Subject],
    sets: Sequence[TokenSet],
    out: Path,
    *,
    command: str,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure runs into `out`, or go on where an earlier call with these settings stopped.

    Returns:
        The content of results.json.

    Raises:
        RunError: `out` holds something else, or is in use.
    """
    check_out(out, measurement.kind)
    results = _begin(measurement, subjects, sets, command)
    make_folder(out)
    with locked(out, f"polyak {measurement.kind}"):
        results["runs"] = _kept(out, results, measurement)
        for index, (subject, tokens) in enumerate(zip(subjects, sets, strict=True)):
            run = results["runs"][index]

            def save(found: Found, run: Found = run) -> None:
                run.update(found=found, sha256=sha256_of_json(found), **measurement.derive(found))
                write_json(out / "results.json", results)

            def tell(share: float, what: str, index: int = index, name: str = subject.name) -> None:
                if progress is not None:
                    progress((index + share) / len(subjects), f"{name}: {what}")

            found = measurement.measure(subject, tokens, tell, found=run.get("found"), save=save)
            run["status"] = "complete"
            save(found)
            if index + 1 < len(subjects):  # after the last one it is written below
                write_atomic(out / "report.html", measurement.render(results))
        results["status"] = "complete"
        results["updated"] = now()
        write_results(out, results, measurement.render)
    return results


def _begin(
    measurement: Measurement, subjects: Sequence[Subject], sets: Sequence[TokenSet], command: str
) -> dict[str, Any]:
    return {
        **heading(measurement.kind, command, status="partial"),
        "settings": dict(measurement.settings),
        "baseline": subjects[0].name,
        "entries": [{"name": subject.name} for subject in subjects],
        "runs": [_about(s, t) for s, t in zip(subjects, sets, strict=True)],
    }


def _about(subject: Subject, tokens: TokenSet) -> dict[str, Any]:
    """A run before anything is measured: where it is, what it is, and the tokens."""
    training = subject.settings.get("training") or {}
    model = subject.settings.get("model") or {}
    return {
        "name": subject.name,
        "folder": os.fspath(subject.folder),
        "rule": model.get("rule"),
        "seed": training.get("seed"),
        "optimizer": training.get("optimizer"),
        "weights": _fingerprint(subject.model),
        "tokens": {
            "count": tokens.tokens,
            "corpus": tokens.corpus,
            "split": tokens.split,
            "fingerprint": tokens.fingerprint,
            **skipped_files(tokens.left_out),
        },
        "status": "partial",
    }


def _measured(run: Mapping[str, Any]) -> tuple[Any, Any]:
    """What tells that two measurements are of one thing: weights and tokens."""
    tokens = run.get("tokens") or {}
    return run.get("weights"), {k: v for k, v in tokens.items() if k != "skipped_files"}


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _kept(out: Path, results: Mapping[str, Any], asked: Measurement) -> list[dict[str, Any]]:
    """The runs, with what an earlier start in this folder has found of them.

    Raises:
        RunError: it was asked for something else, or is not what such a start writes.
    """
    runs: list[dict[str, Any]] = list(results["runs"])
    if not (out / "results.json").exists():
        return runs
    file = out / "results.json"
    before = fields(formats.read_results(file), str(file), _BEFORE)
    here = json.loads(json.dumps(results["settings"]))
    there = {**{key: asked.defaults.get(key) for key in here}, **(before.get("settings") or {})}
    differ = [key for key in here if here[key] != there.get(key)]
    names = [[run["name"] for run in one] for one in (before["runs"], runs)]
    if differ or names[0] != names[1]:
        what = (
            "; ".join(
                f"{key}: {shown_value(there.get(key))} there, {shown_value(here[key])} now"
                for key in differ
            )
            or "other runs"
        )
        raise RunError(f"{out} was made with other settings ({what}); choose another --out")
    for run, old in zip(runs, before["runs"], strict=True):
        if _measured(run) == _measured(old) and old.get("found") is not None:
            where = f"{file}: what it says of {shown_value(run['name'])}"
            fields(old, where, {"found": asked.fits})
            check_unchanged(old["found"], old.get("sha256"), where, "choose another --out")
            run["found"] = old["found"]
    return runs


_BEFORE = {
    "settings": optional(ANY_OBJECT),
    "runs": list_of(
        table(
            {
                "name": text(),
                "tokens": optional(ANY_OBJECT),
                "found": optional(ANY_OBJECT),
                "sha256": optional(text(64)),
            }
        ),
        10_000,
    ),
}
"""What is taken of an earlier results.json."""
