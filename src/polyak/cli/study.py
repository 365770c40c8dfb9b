"""`polyak study`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from polyak.checks import check_whole
from polyak.cli._options import parse
from polyak.cli._runs import RunPaths, check_named, look
from polyak.compare.config import CompareConfig, MatchBy
from polyak.errors import ConfigError, unknown
from polyak.output import show, tell
from polyak.study.landscape.config import LandscapeConfig

if TYPE_CHECKING:
    from polyak.cli._bars import Bar
    from polyak.cli._console import Console

STUDIES = {
    "factorial": "a grid of options, trained: effects, interactions, intervals",
    "landscape": "losses, sharpness, forgetting and Jacobian spectra of several runs",
}

DESCRIPTION = """Losses, sharpness, forgetting and Jacobian spectra of several trained
models on one page, with differences, intervals and rank correlations. Started
again with the same --out, it goes on where it was.

examples:
  polyak study landscape runs/compare
  polyak study landscape runs/muon runs/adamw --onto prose --out runs/landscape
  polyak study landscape runs/compare --parts sharpness --trace-precision 0.02
  polyak study landscape runs/compare --spectrum-length 64"""


FACTORIAL = """Train every combination of some options with every seed, on the same batches, and
report what each option and each interaction does to the loss: an analysis of
variance and effects with simultaneous intervals. Started again with the same
--out, it goes on where it was.

examples:
  polyak study factorial \\
    --factors "rule=heavy_ball,spherical;embedding_norm=none,layer" --seeds 6
  polyak study factorial --rule triple_momentum \\
    --factors "stream_start=zeros,x,none;embedding_norm=none,layer" \\
    --sweep training.muon_lr=0.01,0.02,0.04"""


@dataclass(frozen=True, kw_only=True, slots=True)
class FactorialOptions(CompareConfig):
    """Which grid, and how its cells are trained."""

    factors: str = ""
    """Options that differ, with their levels: `NAME=LEVEL,LEVEL;NAME=LEVEL,LEVEL`. `rule`, or what
    stands in an entry's brackets. Effects are relative to each one's first level."""
    rule: str = "gradient_descent"
    """Rule of all cells, options in brackets, where the rule is no factor."""
    order: int = 2
    """Of how many factors at most interactions get intervals; fewer are narrower."""
    steps: int | None = None
    """Optimizer steps of the first cell; the others follow from --match. Default: 1200."""
    out: Path = Path("runs/factorial")
    """Folder for results.json, report.html, CSV files and the runs (in comparison/); started
    again, it goes on where it was."""
    rules: Annotated[str | None, tyro.conf.Suppress] = None
    quick: Annotated[bool, tyro.conf.Suppress] = False
    match_by: Annotated[MatchBy, tyro.conf.Suppress] = "width"

    def __post_init__(self) -> None:
        CompareConfig.__post_init__(self)
        check_whole("order", self.order)
        if not self.factors.strip():
            raise ConfigError("no factor is named; write --factors NAME=LEVEL,LEVEL;…")


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
    examples = [
        '  polyak study factorial --factors "rule=adam,muon;embedding_norm=none,layer"',
        "  polyak study landscape runs/compare --out runs/landscape",
    ]
    return "\n".join(
        ["usage: polyak study STUDY [OPTIONS]", "", "studies:", *lines, "", "examples:", *examples]
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
    return _landscape(rest) if study == "landscape" else _factorial(rest)


def _factorial(words: Sequence[str]) -> int:
    config = parse(FactorialOptions, "study factorial", words, FACTORIAL)
    from polyak.cli._console import Console
    from polyak.cli.compare import TerminalDisplay
    from polyak.study.factorial.measure import factorial
    from polyak.study.factorial.page import tables

    console = Console(highlight=False)
    display = TerminalDisplay(console)
    try:
        results = factorial(
            config,
            config.factors,
            rule=config.rule,
            order=config.order,
            command=shlex.join(["polyak", "study", "factorial", *words]),
            display=display,
        )
    finally:
        display.close()
    console.print(tables(results), width=80)
    console.print(f"Report: {config.out / 'report.html'}", soft_wrap=True)
    return 1 if results["failed"] else 0


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
