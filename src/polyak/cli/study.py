"""`polyak study`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polyak.cli._options import parse
from polyak.cli._runs import RunPaths, check_named, look
from polyak.errors import unknown
from polyak.output import show, tell
from polyak.study.landscape.config import LandscapeConfig

if TYPE_CHECKING:
    from polyak.cli._bars import Bar
    from polyak.cli._console import Console

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

    runs: RunPaths = ()
    """Finished runs, comparisons, or folders of runs."""
    trust_code: bool = False
    """Run the code of a rule that comes with a run; that of runs made here needs no word."""

    def __post_init__(self) -> None:
        LandscapeConfig.__post_init__(self)
        check_named(self.runs, "study landscape RUN, a run's folder")


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
        show(usage())
        return 0 if words else 2
    study, *rest = words
    if study not in STUDIES:
        tell(f"polyak study: {unknown('study', study, STUDIES)}")
        return 2
    return _landscape(rest)


def _landscape(words: Sequence[str]) -> int:
    config = parse(LandscapeOptions, "study landscape", words, DESCRIPTION)
    from polyak.study.landscape.measure import landscape
    from polyak.study.landscape.page import tables
    from polyak.words import duration, plural

    def measure(line: str, bar: Bar, console: Console) -> dict[str, Any]:
        def planned(parts: int, there: int, seconds: float) -> None:
            finished = f", {there} of them there already" if there else ""
            console.say(f"{plural(parts, 'measurement')}{finished}: about {duration(seconds)}.")

        return landscape(config.runs, config, command=line, planned=planned, progress=bar)

    return look("study landscape", words, config.out, measure, tables)
