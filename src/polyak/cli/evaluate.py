"""`polyak evaluate`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from polyak.cli._options import parse
from polyak.errors import ConfigError
from polyak.evaluation.config import EvaluateConfig

DESCRIPTION = """Loss, bits per byte and perplexity of trained models on any text, with
standard errors. Writes report.html and results.json.

examples:
  polyak evaluate runs/mine
  polyak evaluate runs/compare --corpora stdlib,prose,~/texts
  polyak evaluate runs/mine --corpora wikitext-103,lambada,c4 --split validation
  polyak evaluate runs/first runs/second --stride 32 --tokens 200000
  polyak evaluate runs/mine --per-position --attention-entropy --out runs/look"""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions(EvaluateConfig):
    """Which runs, on what, and where the page goes."""

    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(at least one)"),
    ] = ()
    """Finished runs, comparisons, or folders of runs; differences are from the first."""

    def __post_init__(self) -> None:
        EvaluateConfig.__post_init__(self)
        if not self.runs:
            raise ConfigError("no run is named; write polyak evaluate RUN, a run's folder")


def main(words: Sequence[str]) -> int:
    """Run the command."""
    config = parse(EvaluateOptions, "evaluate", words, DESCRIPTION)
    from rich.console import Console

    from polyak.cli._bars import Bar
    from polyak.study.evaluation import evaluate, tables

    console = Console(markup=False, highlight=False)
    command = shlex.join(["polyak", "evaluate", *words])
    with Bar(console) as bar:
        results = evaluate(config.runs, config, command=command, progress=bar)
    console.print(tables(results), width=80)
    console.print(f"Report: {config.out / 'report.html'}", soft_wrap=True)
    return 0
