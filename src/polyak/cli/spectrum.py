"""`polyak spectrum`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from polyak.analysis.spectrum_config import SpectrumConfig
from polyak.cli._options import parse
from polyak.errors import ConfigError

DESCRIPTION = """Singular values of the Jacobians of trained models' blocks on fixed tokens:
both ends with residuals, condition, stable rank, norm and quantiles; of x
alone, of the whole state, of the residual oracle, and of products over
depth. Writes results.json and report.html; stopped, it goes on when started
again.

examples:
  polyak spectrum runs/mine
  polyak spectrum runs/compare --parts a,b --length 64 --out runs/spectra
  polyak spectrum runs/mine --corpus prose --sequences 3
  polyak spectrum runs/mine --quantiles 0.05 --quantiles 0.5"""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpectrumOptions(SpectrumConfig):
    """Which runs, and what is looked at."""

    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(at least one)"),
    ] = ()
    """Finished runs, comparisons, or folders of runs."""

    def __post_init__(self) -> None:
        SpectrumConfig.__post_init__(self)
        if not self.runs:
            raise ConfigError("no run is named; write polyak spectrum RUN, a run's folder")


def main(words: Sequence[str]) -> int:
    """Run the command."""
    config = parse(SpectrumOptions, "spectrum", words, DESCRIPTION)
    from rich.console import Console

    from polyak.cli._bars import Bar
    from polyak.study.spectrum.measure import spectra
    from polyak.study.spectrum.page import tables

    console = Console(markup=False, highlight=False)
    command = shlex.join(["polyak", "spectrum", *words])
    with Bar(console) as bar:
        results = spectra(config.runs, config, command=command, progress=bar)
    console.print(tables(results), width=80)
    console.print(f"Report: {config.out / 'report.html'}", soft_wrap=True)
    return 0
