"""`polyak spectrum`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyak.analysis.spectrum_config import SpectrumConfig
from polyak.cli._options import parse
from polyak.cli._runs import RunPaths, check_named, look

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

    runs: RunPaths = ()
    """Finished runs, comparisons, or folders of runs."""
    trust_code: bool = False
    """Run the code of a rule that comes with a run; that of runs made here needs no word."""

    def __post_init__(self) -> None:
        SpectrumConfig.__post_init__(self)
        check_named(self.runs, "spectrum RUN, a run's folder")


def main(words: Sequence[str]) -> int:
    """Run the command."""
    config = parse(SpectrumOptions, "spectrum", words, DESCRIPTION)
    from polyak.study.spectrum.measure import spectra
    from polyak.study.spectrum.page import tables

    return look(
        "spectrum",
        words,
        config.out,
        lambda line, bar, _: spectra(config.runs, config, command=line, progress=bar),
        tables,
    )
