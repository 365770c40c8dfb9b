"""What `polyak spectrum` is asked for. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from polyak.checks import check_number, check_whole
from polyak.errors import ConfigError
from polyak.training.config.corpus import CorpusConfig

PARTS = ("a", "b", "c", "d")
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpectrumConfig(CorpusConfig):
    """Which maps are looked at, on which tokens, how precisely.

    Raises:
        ConfigError: a field cannot work; the message names it, its value and the fix.
    """

    length: int | None = None
    """Tokens of a sequence; default: the model's context."""
    sequences: int = 1
    """Sequences, evenly spaced over the validation side; each has spectra of its own."""
    parts: str = "a,b,c,d"
    """a: x to x, streams frozen. b: x and all streams. c: the residual oracle. d: products of
    all blocks' maps, of those of a and b that are named."""
    quantiles: tuple[float, ...] = ()
    """Quantiles of the singular values; 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99 if none is given."""
    tolerance: float = 1e-8
    """Largest relative residual of σ_max² and 1/σ_min²; what is above is given as a bound."""
    max_products: int = 1000
    """Lanczos steps for one end; what has not converged then is a bound."""
    probes: int = 2
    """Random vectors for quantiles; more make their intervals narrower."""
    steps: int = 96
    """Lanczos steps from each."""
    most_gb: float = 4.0
    """Memory in GB that one map may take; a larger one gets its top end and bounds only."""
    dtype: Literal["float64", "float32"] = "float64"
    """Arithmetic."""
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    """`cpu`, `cuda` or `auto`."""
    seed: int = 0
    """Of every random vector."""
    out: Path = Path("runs/spectrum")
    """Folder for results.json and report.html; a second start there goes on."""

    def __post_init__(self) -> None:
        self.check_corpus()
        for name, least in (
            *(("sequences", 1), ("max_products", 10), ("probes", 1), ("steps", 4), ("seed", 0)),
        ):
            check_whole(name, getattr(self, name), least)
        check_whole("length", self.length, 2, optional=True)
        if not 0 < self.tolerance < 1e-2:
            raise ConfigError(f"tolerance={self.tolerance!r} must be above 0 and below 0.01")
        check_number("most_gb", self.most_gb)
        for q in self.quantiles:
            check_number("quantiles", q, 0, 1, above=True)
        for part in self.chosen:
            if part not in PARTS:
                raise ConfigError(f"parts={self.parts!r}: {part!r} must be one of a, b, c, d")
        if not set(self.chosen) - {"d"}:
            raise ConfigError(f"parts={self.parts!r} names none of a, b, c; products are of a or b")
        if self.chosen == ("c", "d"):
            raise ConfigError(f"parts={self.parts!r}: products are of a or b; name one of them")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The parts, each once, in order."""
        given = {part.strip() for part in self.parts.split(",") if part.strip()}
        return tuple(sorted(given))

    @property
    def wanted(self) -> tuple[float, ...]:
        """The quantiles, each once, in order."""
        return tuple(sorted(set(self.quantiles))) or QUANTILES
