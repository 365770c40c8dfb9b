"""`polyak dynamics`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyak.analysis.dynamics_config import DynamicsConfig
from polyak.cli._options import parse
from polyak.cli._runs import RunPaths, check_named, look

DESCRIPTION = """What the layers of trained models do, seen as steps of an optimizer: the loss
after every substep; the path of x through depth, and what velocities and
other streams keep of themselves; whether attention and MLP are gradients, and
the substeps contract; energies of attention; how much of the curvature is
Gauss–Newton's. Each with its interval. Writes results.json and report.html;
stopped, it goes on when started again.

examples:
  polyak dynamics runs/mine
  polyak dynamics runs/compare --parts curve --tokens 32768 --out runs/curves
  polyak dynamics runs/mine --parts field --sequences 16
  polyak dynamics runs/mine --lens-tokens 65536
  polyak dynamics runs/mine --corpus prose"""


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicsOptions(DynamicsConfig):
    """Which runs, and what is looked at."""

    runs: RunPaths = ()
    """Finished runs, comparisons, or folders of runs."""
    trust_code: bool = False
    """Run the code of a rule that comes with a run; that of runs made here needs no word."""

    def __post_init__(self) -> None:
        DynamicsConfig.__post_init__(self)
        check_named(self.runs, "dynamics RUN, a run's folder")


def main(words: Sequence[str]) -> int:
    """Run the command."""
    config = parse(DynamicsOptions, "dynamics", words, DESCRIPTION)
    from polyak.study.dynamics.measure import dynamics
    from polyak.study.dynamics.page import tables

    return look(
        "dynamics",
        words,
        config.out,
        lambda line, bar, _: dynamics(config.runs, config, command=line, progress=bar),
        tables,
    )
