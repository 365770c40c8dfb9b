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
from polyak.settings import defaults
from polyak.study.measured import Measurement, measure_runs
from polyak.study.sharpness.found import fits
from polyak.study.sharpness.measure import Found, Progress, sharpness_of
from polyak.study.sharpness.page import render

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
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(SharpnessConfig)}
    del settings["out"]

    def measure(subject: Subject, tokens: TokenSet, progress: Progress, **kept: Any) -> Found:
        return sharpness_of(subject, tokens, config, progress, **kept)

    subjects = load_subjects(runs, device=config.device)
    sets = [
        token_set(subject, config.corpus, tokens=config.tokens, **config.reading)
        for subject in subjects
    ]
    asked = Measurement(
        *(KIND, {**settings, "rho": list(config.radii)}, measure, render),
        defaults=defaults(SharpnessConfig),
        fits=fits(config),
    )
    return measure_runs(asked, subjects, sets, config.out, command=command, progress=progress)
