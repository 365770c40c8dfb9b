"""What results files of single measurements say of a run, and how they are found again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from polyak.errors import RunError
from polyak.evaluation.subjects import Subject, TokenSet
from polyak.files import read_json


def about(subject: Subject, tokens: TokenSet) -> dict[str, Any]:
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
        },
        "status": "partial",
    }


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def kept(out: Path, results: Mapping[str, Any]) -> list[dict[str, Any]]:
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
