"""`polyak sharpness`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from polyak.analysis.config import SharpnessConfig
from polyak.cli._options import parse
from polyak.errors import ConfigError

DESCRIPTION = """Curvature of trained models' loss on fixed tokens: both ends of the Hessian's
spectrum, trace and density with intervals, the rise of the loss within a
radius, slices, and a form that reparametrisation leaves alone. Writes
results.json and report.html; stopped, it goes on when started again.

examples:
  polyak sharpness runs/mine
  polyak sharpness runs/compare --tokens 4096 --top-k 3 --out runs/sharp
  polyak sharpness runs/mine --corpus prose --rho 0.05 --rho 0.5
  polyak sharpness runs/mine --groups --gauss-newton --out runs/parts"""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharpnessOptions(SharpnessConfig):
    """Which runs, and what is measured."""

    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(at least one)"),
    ] = ()
    """Finished runs, comparisons, or folders of runs."""

    def __post_init__(self) -> None:
        SharpnessConfig.__post_init__(self)
        if not self.runs:
            raise ConfigError("no run is named; write polyak sharpness RUN, a run's folder")


def main(words: Sequence[str]) -> int:
    """Run the command."""
    config = parse(SharpnessOptions, "sharpness", words, DESCRIPTION)
    from rich.console import Console

    from polyak.cli._bars import Bar
    from polyak.study.sharpness.page import tables
    from polyak.study.sharpness.runs import sharpness

    console = Console(markup=False, highlight=False)
    command = shlex.join(["polyak", "sharpness", *words])
    with Bar(console) as bar:
        results = sharpness(config.runs, config, command=command, progress=bar)
    console.print(tables(results), width=80)
    console.print(f"Report: {config.out / 'report.html'}", soft_wrap=True)
    return 0
