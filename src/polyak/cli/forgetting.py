"""`polyak forgetting`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from polyak.cli._options import parse
from polyak.errors import ConfigError
from polyak.evaluation.config import ForgettingConfig

DESCRIPTION = """Train finished models on another corpus and measure what they forget of
their own (source loss, after minus before) and what they gain (target loss,
before minus after). The runs are left as they are. Writes report.html and
results.json; started again with the same --out, it goes on where it was.

examples:
  polyak forgetting runs/mine --onto prose
  polyak forgetting runs/compare --onto prose --steps 150
  polyak forgetting runs/first runs/second --onto ~/texts --optimizer muon
  polyak forgetting runs/big --onto tinystories --batch-size 480
       --micro-batch-size 16"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForgettingOptions(ForgettingConfig):
    """Which runs, onto what, and how."""

    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(at least one)"),
    ] = ()
    """Finished runs, comparisons, or folders of runs."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("no run is named; write polyak forgetting RUN --onto CORPUS")
        ForgettingConfig.__post_init__(self)


def main(words: Sequence[str]) -> int:
    """Run the command."""
    config = parse(ForgettingOptions, "forgetting", words, DESCRIPTION)
    from rich.console import Console

    from polyak.cli._bars import Bar
    from polyak.study.forgetting.measure import forgetting
    from polyak.study.forgetting.page import tables

    console = Console(markup=False, highlight=False)
    command = shlex.join(["polyak", "forgetting", *words])
    with Bar(console) as bar:
        results = forgetting(config.runs, config, command=command, progress=bar)
    console.print(tables(results), width=80)
    console.print(f"Report: {config.out / 'report.html'}", soft_wrap=True)
    return 0
