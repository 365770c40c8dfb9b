"""`polyak study`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from polyak.cli._options import parse
from polyak.errors import ConfigError, unknown
from polyak.study.landscape.config import LandscapeConfig

STUDIES = {"landscape": "losses, sharpness, forgetting and Jacobian spectra of several runs"}

DESCRIPTION = """Losses, sharpness, forgetting and Jacobian spectra of several trained
models on one page, with differences, intervals and rank correlations. Started
again with the same --out, it goes on where it was.

examples:
  polyak study landscape runs/compare
  polyak study landscape runs/muon runs/adamw --onto prose --out runs/landscape
  polyak study landscape runs/compare --parts sharpness --trace-precision 0.02
  polyak study landscape runs/compare --spectrum-length 64"""


@dataclass(frozen=True, kw_only=True, slots=True)
class LandscapeOptions(LandscapeConfig):
    """Which runs, and what is measured of them."""

    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(at least one)"),
    ] = ()
    """Finished runs, comparisons, or folders of runs."""

    def __post_init__(self) -> None:
        LandscapeConfig.__post_init__(self)
        if not self.runs:
            raise ConfigError("no run is named; write polyak study landscape RUN, a run's folder")


def usage() -> str:
    """The text of `polyak study --help`."""
    lines = [f"  {name:<10} {what}" for name, what in STUDIES.items()]
    example = "  polyak study landscape runs/compare --out runs/landscape"
    return "\n".join(
        ["usage: polyak study STUDY [OPTIONS]", "", "studies:", *lines, "", "examples:", example]
    )


def main(words: Sequence[str]) -> int:
    """Run the study that is named first."""
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    study, *rest = words
    if study not in STUDIES:
        print(f"polyak study: {unknown('study', study, STUDIES)}", file=sys.stderr)
        return 2
    return _landscape(rest)


def _landscape(words: Sequence[str]) -> int:
    config = parse(LandscapeOptions, "study landscape", words, DESCRIPTION)
    from rich.console import Console

    from polyak.cli._bars import Bar
    from polyak.study.landscape.measure import landscape
    from polyak.study.landscape.page import tables
    from polyak.words import duration, plural

    console = Console(markup=False, highlight=False)

    def planned(parts: int, there: int, seconds: float) -> None:
        finished = f", {there} of them there already" if there else ""
        console.print(
            f"{plural(parts, 'measurement')}{finished}: about {duration(seconds)}.", soft_wrap=True
        )

    command = shlex.join(["polyak", "study", "landscape", *words])
    with Bar(console) as bar:
        results = landscape(config.runs, config, command=command, planned=planned, progress=bar)
    console.print(tables(results), width=80)
    console.print(f"Report: {config.out / 'report.html'}", soft_wrap=True)
    return 0
