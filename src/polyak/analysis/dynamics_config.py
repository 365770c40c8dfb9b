"""What `polyak dynamics` is asked for. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from polyak.checks import check_whole
from polyak.errors import ConfigError, unknown
from polyak.training.config.corpus import CorpusConfig

PARTS = ("curve", "path", "field", "energy", "stability", "gauss_newton")


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicsConfig(CorpusConfig):
    """What of the layers is looked at, on which tokens.

    Raises:
        ConfigError: a field cannot work; the message names it, its value and the fix.
    """

    parts: str = ",".join(PARTS)
    """curve: loss after every substep. path: sizes, angles, and what streams keep. field: whether
    the oracles are gradients. energy: whether attention ascends its interaction energy.
    stability: whether the substeps contract. gauss_newton: its share of the loss's curvature."""
    tokens: int = 8192
    """Validation tokens for curve and path, in evenly spaced blocks."""
    length: int | None = None
    """Tokens of a sequence; default: the model's context."""
    lens_tokens: int = 0
    """Training tokens that an affine lens is fitted on for a second curve; 0 leaves it out."""
    sequences: int = 8
    """Sequences of these tokens for all parts but curve and path."""
    probes: int = 4
    """Random vectors for each of them, for field."""
    dtype: Literal["float64", "float32"] = "float64"
    """Arithmetic."""
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    """`cpu`, `cuda` or `auto`."""
    seed: int = 0
    """Of every random vector."""
    out: Path = Path("runs/dynamics")
    """Folder for results.json and report.html; a second start there goes on."""

    def __post_init__(self) -> None:
        self.check_corpus()
        for name, least in (
            ("tokens", 2),
            ("lens_tokens", 0),
            ("sequences", 2),
            ("probes", 2),
            ("seed", 0),
        ):
            check_whole(name, getattr(self, name), least)
        check_whole("length", self.length, 2, optional=True)
        for part in self._named:
            if part not in PARTS:
                raise unknown("part", part, PARTS)
        if not self._named:
            raise ConfigError(f"parts={self.parts!r} names none of {', '.join(PARTS)}")
        if self.lens_tokens and "curve" not in self._named:
            raise ConfigError(
                f"lens_tokens={self.lens_tokens} is for the part curve, and parts={self.parts!r} "
                "does not name it"
            )

    @property
    def _named(self) -> list[str]:
        return [part.strip() for part in self.parts.split(",") if part.strip()]

    @property
    def chosen(self) -> tuple[str, ...]:
        """The parts, each once, in order."""
        return tuple(part for part in PARTS if part in self._named)
