"""What `polyak evaluate` and `polyak forgetting` are asked for. Imports no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from polyak.errors import ConfigError, unknown
from polyak.training.run_config import Device

Split = Literal["train", "validation", "test"]
OWN = "own"
"""The name that stands for the corpus a run was trained on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What is measured, on what.

    Raises:
        ConfigError: a field cannot work; the message names it, its value and the fix.
    """

    corpora: str = OWN
    """Corpora separated by commas: names, paths to text, or folders of `polyak prepare`; `own`:
    what each run was trained on."""
    text_field: str = "text"
    """Field that holds the text in JSONL, Parquet and hub records."""
    split: Split = "validation"
    """The side of the corpora: `validation`, `train` or `test`."""
    tokens: int = 65_536
    """Tokens that are scored on each corpus at most, in evenly spaced blocks."""
    stride: int | None = None
    """Slide the window by so many tokens: each token is scored once, with at least T − stride
    tokens before it. None: blocks of T tokens, each begun without context."""
    sliding_window: bool = False
    """The same with a stride of half the context."""
    per_position: bool = False
    """Also the loss at each position of a block."""
    attention_entropy: bool = False
    """Also the entropy of attention by layer and head."""
    device: Device = "auto"
    """`cpu`, `cuda` or `auto`."""
    out: Path = Path("runs/evaluate")
    """Folder for report.html and results.json."""

    def __post_init__(self) -> None:
        _whole(self, "tokens", 1)
        if self.stride is not None:
            _whole(self, "stride", 1)
        for name, kind in (("split", Split), ("device", Device)):
            if getattr(self, name) not in get_args(kind):
                raise unknown(name, str(getattr(self, name)), get_args(kind))
        if self.stride is not None and self.sliding_window:
            raise ConfigError(
                f"sliding_window=True is a stride of half the context, and stride={self.stride} "
                "another; leave out one"
            )
        if self.per_position and (self.stride is not None or self.sliding_window):
            raise ConfigError(
                "per_position=True is the loss along plain blocks; leave out --stride and "
                "--sliding-window"
            )
        corpora_of(self.corpora)


def corpora_of(text: str) -> tuple[str | None, ...]:
    """Corpora separated by commas outside brackets, each once; None stands for a run's own.

    Raises:
        ConfigError: there is none.
    """
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]
    if not parts:
        raise ConfigError("corpora: nothing to evaluate on; name at least one corpus, or 'own'")
    return tuple(None if part == OWN else part for part in dict.fromkeys(parts))


def _whole(config: object, name: str, least: int) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")


def _number(config: object, name: str, low: float, high: float = math.inf) -> None:
    value = getattr(config, name)
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not low <= value <= high:
        bound = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ConfigError(f"{name}={value!r} must be a number {bound}")
