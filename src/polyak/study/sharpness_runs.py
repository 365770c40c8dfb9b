"""results.json and report.html of `polyak sharpness`: any runs, side by side.

Each part of a run's measurement is written to results.json as soon as it is known, so that a
stopped command goes on with the next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyak.analysis.config import SharpnessConfig
from polyak.evaluation.subjects import Subject, TokenSet, load_subjects, token_set
from polyak.files import locked, make_folder, write_atomic, write_json
from polyak.study.measured import about, kept
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
        results["runs"] = kept(config.out, results)
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
        "runs": [about(s, t) for s, t in zip(subjects, sets, strict=True)],
    }
