"""`polyak forgetting`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyak.cli._options import parse
from polyak.cli._runs import RunPaths, check_named, look
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

    runs: RunPaths = ()
    """Finished runs, comparisons, or folders of runs."""
    trust_code: bool = False
    """Run the code of a rule that comes with a run; that of runs made here needs no word."""

    def __post_init__(self) -> None:
        check_named(self.runs, "forgetting RUN --onto CORPUS")
        ForgettingConfig.__post_init__(self)


def main(words: Sequence[str]) -> int:
    """Run the command."""
    config = parse(ForgettingOptions, "forgetting", words, DESCRIPTION)
    from polyak.study.forgetting.measure import forgetting
    from polyak.study.forgetting.page import tables

    return look(
        "forgetting",
        words,
        config.out,
        lambda line, bar, _: forgetting(config.runs, config, command=line, progress=bar),
        tables,
    )
