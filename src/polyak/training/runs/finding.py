"""Run folders: found below the paths that a user gives, and named to be told apart."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from polyak.errors import RunError


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run folders that paths mean: a run, a comparison, or a folder of runs; each run once.

    A comparison's sweep is left out.

    Raises:
        RunError: a path does not exist, or is no run and holds none.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise RunError(f"{path} does not exist")
        runs = [path] if (path / "run.json").exists() else _inside(path)
        if not runs:
            raise RunError(f"{path} is not a run and holds none: run.json is missing")
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _inside(path: Path) -> list[Path]:
    files = [*path.glob("*/run.json"), *path.glob("runs/*/run.json")]
    return sorted(file.parent for file in files)


def short_names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: its last part, and as many before it as tell all apart."""
    whole = [folder.resolve() for folder in folders]
    for parts in range(1, max((len(path.parts) for path in whole), default=1) + 1):
        names = ["/".join(path.parts[-parts:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [os.fspath(path) for path in whole]
