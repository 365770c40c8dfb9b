"""What `polyak sharpness` is asked for. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from polyak.checks import check_number, check_whole
from polyak.errors import unknown
from polyak.training.config.corpus import CorpusConfig

Scaling = Literal["elements", "filters", "tensors", "none"]
Precision = Literal["float32", "float64"]
DEFAULT_RHO = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class SharpnessConfig(CorpusConfig):
    """What is measured, on which tokens, how precisely.

    Raises:
        ConfigError: a field cannot work; the message names it, its value and the fix.
    """

    tokens: int = 2048
    """Validation tokens that define the loss, in evenly spaced blocks of the model's context."""
    top_k: int = 5
    """Eigenvalues at each end of the spectrum."""
    tolerance: float = 1e-3
    """Largest residual ‖Hv − λv‖ of an eigenvalue, relative to max|λ|; others are bounds."""
    max_products: int = 400
    """Products for the ends of one spectrum; what has not converged then is a bound."""
    trace_precision: float = 0.05
    """Half-width of the trace's 95% interval, relative to the trace."""
    max_probes: int = 200
    """Probes for one trace at most."""
    density_probes: int = 8
    """Lanczos runs that are averaged to the spectral density; 0 leaves it out."""
    density_steps: int = 40
    """Steps of each."""
    rho: tuple[float, ...] = ()
    """Radius ρ of max L(θ+ε) − L(θ) over ‖ε‖ ≤ ρ; 0.05 if none is given."""
    scale: Scaling = "elements"
    """Scale-aware form D·H·D: D holds |θ| (`elements`), or root mean squares over `filters` or
    `tensors`; `none` leaves it out."""
    groups: bool = False
    """Also the Hessian's blocks of embeddings, streams, attention, MLP, norms and scalars."""
    gauss_newton: bool = False
    """Also the Gauss–Newton part: its largest eigenvalues and its trace."""
    slice_radius: float = 0.5
    """Reach of the filter-normalised slices of the loss, in weight norms; 0 leaves them out."""
    dtype: Precision = "float32"
    """Arithmetic of the model; vectors are float64 in any case."""
    device: Literal["cpu", "cuda", "auto"] = "auto"
    """`cpu`, `cuda` or `auto`."""
    seed: int = 0
    """Of every random vector."""
    out: Path = Path("runs/sharpness")
    """Folder for results.json and report.html; a second start there goes on."""

    def __post_init__(self) -> None:
        self.check_corpus()
        for name, least in (
            *(("tokens", 1), ("top_k", 1), ("max_products", 1), ("max_probes", 8)),
            *(("density_probes", 0), ("density_steps", 1), ("seed", 0)),
        ):
            check_whole(name, getattr(self, name), least)
        for name, zero in (
            *(("tolerance", False), ("trace_precision", False), ("slice_radius", True)),
        ):
            check_number(name, getattr(self, name), above=not zero)
        for rho in self.rho:
            check_number("rho", rho, above=True)
        for name, kind in (("scale", Scaling), ("dtype", Precision)):
            if getattr(self, name) not in get_args(kind):
                raise unknown(name, str(getattr(self, name)), get_args(kind))

    @property
    def radii(self) -> tuple[float, ...]:
        """ρ, each once."""
        return tuple(dict.fromkeys(self.rho)) or (DEFAULT_RHO,)
