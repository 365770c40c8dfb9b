"""`polyak report`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from polyak.cli._options import parse
from polyak.errors import ConfigError
from polyak.output import say

DESCRIPTION = """Draw the curves of runs, finished or not, into one page that needs no
network: losses, learning rates, gradient norm, speed, memory, learned
scalars, and the settings that differ. Writes report.html and results.json.

examples:
  polyak report runs/mine
  polyak report runs/first runs/second --out runs/both
  polyak report runs/compare --out runs/curves"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Which runs, and where the page goes."""

    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(at least one)"),
    ] = ()
    """Run folders, comparisons, or folders of runs."""
    out: Path = Path("runs/report")
    """Folder for report.html and results.json."""
    trust_code: bool = False
    """Run the code of a rule that comes with a run; that of runs made here needs no word."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("no run is named; write polyak report RUN, a run's folder")


def main(words: Sequence[str]) -> int:
    """Run the command."""
    config = parse(ReportConfig, "report", words, DESCRIPTION)
    from polyak.study.runs.page import report, sentence

    results = report(config.runs, config.out, command=shlex.join(["polyak", "report", *words]))
    say(sentence(results))
    for line in results["warnings"]:
        say(f"Careful: {line}")
    say(f"Report: {config.out / 'report.html'}")
    return 0
