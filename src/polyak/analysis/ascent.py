r"""SAM-style sharpness: how much the loss rises within a distance ρ of the weights.

    S(ρ) = max_{‖ε‖ ≤ ρ} L(θ + ε) − L(θ)

over all chosen parameters together. The maximum is sought by projected ascent,
ε ← Π_ρ(ε + ½ρ ∇L(θ+ε)/‖∇L‖), from several starts: the gradient's direction, both signs of given
directions (top eigenvectors), and random ones. What is found is a lower bound of S, and stated as
one. Beside it stands what SAM (arXiv:2010.01412) itself uses: L(θ + ρ∇L/‖∇L‖) − L(θ), and its
first-order form ρ‖∇L‖.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from polyak.analysis.hessian import Surface
from polyak.errors import ConfigError

STEP = 0.5
"""Length of an ascent step, relative to ρ; halved when a step does not climb."""


@dataclass(frozen=True, kw_only=True)
class Rise:
    """The rise of the loss within one radius."""

    rho: float
    at_least: float
    """The largest rise found, at some ‖ε‖ ≤ ρ: a lower bound of the maximum."""
    start: str
    """Where the ascent that found it began."""
    by_start: dict[str, float]
    sam: float
    """Rise after one step of length ρ along the gradient."""
    first_order: float
    """ρ‖∇L‖."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def rises(
    surface: Surface,
    radii: Sequence[float],
    *,
    directions: Tensor | None = None,
    random: int = 1,
    steps: int = 8,
    seed: int = 0,
) -> list[Rise]:
    """The largest rise found within each radius.

    Args:
        surface: the loss.
        radii: every ρ > 0.
        directions: (k, N) unit rows to start along, in both signs.
        random: random starts.
        steps: gradients after each start.
        seed: of the random starts.

    Raises:
        ConfigError: a radius is not above 0, or so large that the loss is not finite.
    """
    for rho in radii:
        if not 0 < rho < float("inf"):
            raise ConfigError(f"rho={rho} must be above 0")
    base = surface.loss()
    gradient = surface.gradient()
    norm = float(gradient.norm())
    starts: dict[str, Tensor] = {}
    if norm > 0:
        starts["gradient"] = gradient / norm
    for index, direction in enumerate([] if directions is None else directions):
        unit = direction / direction.norm()
        starts[f"+eigenvector {index + 1}"], starts[f"−eigenvector {index + 1}"] = unit, -unit
    generator = torch.Generator().manual_seed(seed)
    for index in range(random if starts else max(1, random)):
        drawn = torch.randn(surface.size, generator=generator, dtype=torch.float64)
        starts[f"random {index + 1}"] = (drawn / drawn.norm()).to(surface.device)
    return [_rise(surface, rho, starts, steps, base, norm) for rho in radii]


def _rise(
    surface: Surface, rho: float, starts: dict[str, Tensor], steps: int, base: float, norm: float
) -> Rise:
    found = {name: _climb(surface, rho, rho * unit, steps) - base for name, unit in starts.items()}
    best = max(found, key=lambda name: found[name])
    sam = surface.loss(rho * starts["gradient"]) - base if "gradient" in starts else 0.0
    if not all(math.isfinite(rise) for rise in (*found.values(), sam)):
        raise ConfigError(
            f"rho={rho} reaches weights at which the loss is not finite; use a smaller one"
        )
    return Rise(
        rho=rho,
        at_least=max(found[best], 0.0),  # ε = 0 is allowed
        start=best if found[best] > 0 else "none",
        by_start=found,
        sam=sam,
        first_order=rho * norm,
    )


def _climb(surface: Surface, rho: float, shift: Tensor, steps: int) -> float:
    """The highest loss that ascent from `shift` finds inside the ball."""
    best, step = surface.loss(shift), STEP
    gradient = surface.gradient(shift) if steps else None
    for _ in range(steps):
        if gradient is None or not float(gradient.norm()) > 0:
            break
        moved = shift + step * rho * gradient / gradient.norm()
        length = float(moved.norm())
        moved = moved * (rho / length) if length > rho else moved
        loss = surface.loss(moved)
        if loss > best:
            best, shift = loss, moved
            gradient = surface.gradient(shift)
        else:
            step /= 2
    return best
