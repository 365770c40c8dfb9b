"""results.json and report.html of `polyak sharpness`: any runs, side by side.

Each part of a run's measurement is written to results.json as soon as it is known, so that a
stopped command goes on with the next one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from polyak.analysis.config import SharpnessConfig
from polyak.errors import RunError
from polyak.evaluation.subjects import Subject, TokenSet, load_subjects, token_set
from polyak.files import locked, make_folder, read_json, write_atomic, write_json
from polyak.study.pages import check_out
from polyak.study.results import commit, now
from polyak.study.sharpness import Found, Progress, sharpness_of
from polyak.study.sharpness_page import render
from polyak.training.runs import environment as this_environment

FORMAT = 1
KIND = "sharpness"


def sharpness(
    runs: Sequence[Path],
    config: SharpnessConfig,
    *,
    command: str,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure runs into `config.out`, or go on where an earlier call with these settings stopped.

    Args:
        runs: runs, comparisons, or folders of runs.
        config: what is measured.
        command: the command line that repeats it.
        progress: see `Progress`.

    Returns:
        The content of results.json.

    Raises:
        PolyakError: a run or corpus cannot be used, or `config.out` holds something else.
    """
    check_out(config.out, KIND)
    subjects = load_subjects(runs, device=config.device)
    sets = [token_set(subject, config.corpus, tokens=config.tokens) for subject in subjects]
    results = _begin(subjects, sets, config, command)
    make_folder(config.out)
    with locked(config.out, "polyak sharpness"):
        results["runs"] = _kept(config.out, results)
        for index, (subject, tokens) in enumerate(zip(subjects, sets, strict=True)):
            run = results["runs"][index]

            def save(found: Found, run: Found = run) -> None:
                run["found"] = found
                write_json(config.out / "results.json", results)

            def tell(share: float, what: str, index: int = index, name: str = subject.name) -> None:
                if progress is not None:
                    progress((index + share) / len(subjects), f"{name}: {what}")

            run["found"] = sharpness_of(
                subject, tokens, config, tell, found=run.get("found"), save=save
            )
            run["status"] = "complete"
            save(run["found"])
            write_atomic(config.out / "report.html", render(results))
        results["status"] = "complete"
        results["updated"] = now()
        write_json(config.out / "results.json", results)
        write_atomic(config.out / "report.html", render(results))
    return results


def _begin(
    subjects: Sequence[Subject], sets: Sequence[TokenSet], config: SharpnessConfig, command: str
) -> dict[str, Any]:
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(SharpnessConfig)}
    del settings["out"]
    return {
        "format": FORMAT,
        "kind": KIND,
        "status": "partial",
        "created": now(),
        "command": command,
        "commit": commit(),
        **this_environment(),
        "settings": {**settings, "rho": list(config.radii)},
        "baseline": subjects[0].name,
        "entries": [{"name": subject.name} for subject in subjects],
        "runs": [_about(s, t) for s, t in zip(subjects, sets, strict=True)],
    }


def _about(subject: Subject, tokens: TokenSet) -> dict[str, Any]:
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
        },
        "status": "partial",
    }


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _kept(out: Path, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs, with what an earlier start in this folder has found of them.

    Raises:
        RunError: it was asked for something else.
    """
    runs: list[dict[str, Any]] = list(results["runs"])
    if not (out / "results.json").exists():
        return runs
    before = read_json(out / "results.json")
    here = json.loads(json.dumps(results["settings"]))
    there = before.get("settings") or {}
    differ = [key for key in here if here[key] != there.get(key)]
    names = [[run.get("name") for run in one] for one in (before.get("runs") or [], runs)]
    if differ or names[0] != names[1]:
        what = (
            "; ".join(f"{key}: {there.get(key)!r} there, {here[key]!r} now" for key in differ)
            or "other runs"
        )
        raise RunError(f"{out} was made with other settings ({what}); choose another --out")
    for run, old in zip(runs, before["runs"], strict=True):
        same = all(run[key] == old.get(key) for key in ("weights", "tokens"))
        if same and isinstance(old.get("found"), dict):
            run["found"] = old["found"]
    return runs
