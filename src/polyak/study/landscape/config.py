"""What `polyak study landscape` measures. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from polyak.checks import check_number, check_whole
from polyak.errors import unknown
from polyak.training.config.run import Device
from polyak.training.config.training import Optimizer

PARTS = ("evaluate", "sharpness", "forgetting", "spectrum")
Which = Literal["first", "all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LandscapeConfig:
    """What is measured of every run, and how precisely.

    Raises:
        ConfigError: a field cannot work; the message names it, its value and the fix.
    """

    parts: tuple[str, ...] = ()
    """Measurements, by repeating --parts: `evaluate`, `sharpness`, `forgetting`, `spectrum`; all
    four if none is given."""
    corpora: str = "prose"
    """Other corpora whose loss is measured, separated by commas."""
    text_field: str = "text"
    """Field that holds the text in JSONL, Parquet and hub records of --corpora and --onto."""
    encoding: str = "utf-8"
    """Encoding of text files and JSON of --corpora and --onto, such as `latin-1`."""
    eval_tokens: int = 65_536
    """Tokens that are scored on each corpus at most."""
    sharpness_tokens: int = 2048
    """Tokens that the Hessian is taken on."""
    trace_precision: float = 0.05
    """Half-width of the trace's 95% interval, relative to the trace."""
    rho: float = 0.05
    """Radius of the ball in which the loss's largest rise is searched."""
    onto: str = "prose"
    """The corpus that forgetting is measured with."""
    forgetting_steps: int = 150
    """Optimizer steps on it."""
    forgetting_lr: float = 1e-4
    """Peak rate of AdamW on it."""
    forgetting_optimizer: Optimizer = "adamw"
    """`adamw`, or `muon` with AdamW for the rest."""
    spectrum_runs: Which = "first"
    """Jacobian spectra of the `first` run of each kind (the others are repetitions), or `all`."""
    spectrum_length: int | None = None
    """Tokens of the sequence that the Jacobians are taken on; default: the model's context."""
    baseline: str | None = None
    """The kind of model that differences are from; default: gradient descent if there, else the
    first."""
    seed: int = 0
    """Of every random vector and of the order of batches."""
    device: Device = "auto"
    """`cpu`, `cuda` or `auto`."""
    out: Path = Path("runs/landscape")
    """Folder for report.html, results.json and the parts; started again, it goes on."""

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise unknown("part", part, PARTS)
        for name, least in (
            *(("eval_tokens", 1), ("sharpness_tokens", 1), ("forgetting_steps", 1), ("seed", 0)),
        ):
            check_whole(name, getattr(self, name), least)
        for name in ("trace_precision", "rho", "forgetting_lr"):
            check_number(name, getattr(self, name), above=True)
        check_whole("spectrum_length", self.spectrum_length, 2, optional=True)
        for name, kind in (("spectrum_runs", Which), ("device", Device)):
            if getattr(self, name) not in get_args(kind):
                raise unknown(name, str(getattr(self, name)), get_args(kind))

    @property
    def reading(self) -> dict[str, Any]:
        """How the other corpora are read, as `polyak.evaluation.subjects.corpus_of` takes it."""
        return {"text_field": self.text_field, "encoding": self.encoding}

    @property
    def chosen(self) -> tuple[str, ...]:
        """The measurements, in their order."""
        return tuple(part for part in PARTS if not self.parts or part in self.parts)
