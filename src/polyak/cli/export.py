"""`polyak export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from polyak.cli._options import parse
from polyak.output import say

DESCRIPTION = """Write a run's weights as a released checkpoint of arXiv:2605.24425, for the code
that was published with it; polyak import reads it back bit for bit.

examples:
  polyak export runs/mine best.pt
  polyak export runs/mine best.pt --format training --overwrite"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Which run, and which file."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """The file to write."""
    format: Literal["bare", "training"] = "bare"
    """`bare`: the state dict alone. `training`: a dict with `model`, `step` and `val_loss`."""
    overwrite: bool = False
    """Replace a file that is there."""
    trust_code: bool = False
    """Run the code of a rule that comes with a run; that of runs made here needs no word."""


def main(words: Sequence[str]) -> int:
    """Run the command."""
    config = parse(ExportConfig, "export", words, DESCRIPTION)
    from polyak.interop.released_files import write
    from polyak.training.runs.folder import RunFolder, load_run

    model, _ = load_run(config.run)
    result = RunFolder(config.run).result() or {}
    write(
        model,
        config.file,
        config.format,
        step=result.get("steps"),
        val_loss=result.get("loss"),
        overwrite=config.overwrite,
    )
    say(f"{config.file}: {model.placement.name}, {config.format} format")
    return 0
