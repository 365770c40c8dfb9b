"""`polyak sharpness`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyak.analysis.config import SharpnessConfig
from polyak.cli._options import parse
from polyak.cli._runs import RunPaths, check_named, look

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

    runs: RunPaths = ()
    """Finished runs, comparisons, or folders of runs."""
    trust_code: bool = False
    """Run the code of a rule that comes with a run; that of runs made here needs no word."""

    def __post_init__(self) -> None:
        SharpnessConfig.__post_init__(self)
        check_named(self.runs, "sharpness RUN, a run's folder")


def main(words: Sequence[str]) -> int:
    """Run the command."""
    config = parse(SharpnessOptions, "sharpness", words, DESCRIPTION)
    from polyak.study.sharpness.page import tables
    from polyak.study.sharpness.runs import sharpness

    return look(
        "sharpness",
        words,
        config.out,
        lambda line, bar, _: sharpness(config.runs, config, command=line, progress=bar),
        tables,
    )
