r"""Slices of the loss along filter-normalised random directions (Li et al., arXiv:1712.09913).

A direction d is drawn with normal entries. Then every filter, that is every row of weights that
feeds one output, is scaled to the norm of the same filter of the weights: d_i ← d_i ‖θ_i‖/‖d_i‖.
Filters are the rows of an `nn.Linear`, the columns of Hugging Face's `Conv1D` (stored transposed),
the rows (one token or position each) of an embedding, the output channels of a convolution. Vectors
(norm gains, biases) and single scalars are held fixed, as in the paper: they have no
filter, and a random change of a gain by its own size says little about the minimum. The slice is

    (a, b) ↦ L(θ + a d₁ + b d₂),

computed through `functional_call`; weights are never changed in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polyak.analysis.hessian import Surface
from polyak.errors import ConfigError


def direction(surface: Surface, seed: int) -> Tensor:
    """A filter-normalised random direction in the surface's parameters, float64 (N,).

    Raises:
        ConfigError: none of the parameters has filters.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = surface.view.split(surface.weights)
    parts = []
    for name, weight in weights.items():
        drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        parts.append(_filtered(drawn.to(weight.device), weight, filters(surface.model, name)))
    found = surface.view.join(parts)
    if not float(found.norm()) > 0:
        raise ConfigError(
            "no slice: the chosen parameters are all vectors or zero, without filters"
        )
    return found


def filters(model: nn.Module, name: str) -> int | None:
    """The dimension along which a parameter's filters are counted; None if it has none."""
    parameter = model.get_parameter(name)
    if parameter.dim() < 2:
        return None
    owner = model.get_submodule(name.rpartition(".")[0])
    return 1 if type(owner).__name__ == "Conv1D" and parameter.dim() == 2 else 0


def filter_norms(weight: Tensor, dimension: int) -> Tensor:
    """‖θ_i‖ of each filter, broadcastable to the weight."""
    others = [axis for axis in range(weight.dim()) if axis != dimension]
    norms: Tensor = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return norms


def _filtered(drawn: Tensor, weight: Tensor, dimension: int | None) -> Tensor:
    if dimension is None:
        return torch.zeros_like(weight)
    return drawn * (filter_norms(weight, dimension) / filter_norms(drawn, dimension))


def slice_1d(
    surface: Surface, *, seed: int, radius: float = 0.5, points: int = 21, directions: int = 3
) -> dict[str, Any]:
    """L(θ + a d) for a from −radius to radius, along several directions.

    Returns:
        `a`, and `losses`: one list per direction (seeds `seed`, `seed` + 1, …).

    Raises:
        ConfigError: a number that cannot work.
    """
    at = _grid(radius, points)
    lines = [direction(surface, seed + index) for index in range(directions)]
    losses = [[_loss(surface, a * line) for a in at] for line in lines]
    return {"a": at, "losses": losses, "seed": seed}


def slice_2d(
    surface: Surface, *, seed: int, radius: float = 0.5, points: int = 11
) -> dict[str, Any]:
    """L(θ + a d₁ + b d₂) on a square grid; `losses[i][j]` is at a = at[i], b = at[j].

    Raises:
        ConfigError: a number that cannot work.
    """
    at = _grid(radius, points)
    one, two = direction(surface, seed), direction(surface, seed + 1)
    losses = [[_loss(surface, a * one + b * two) for b in at] for a in at]
    return {"at": at, "losses": losses, "seed": seed}


def _loss(surface: Surface, shift: Tensor) -> float | None:
    """None where the loss is not finite: JSON has no infinity."""
    found = surface.loss(shift)
    return found if abs(found) < float("inf") else None


def _grid(radius: float, points: int) -> list[float]:
    if not 0 < radius < float("inf"):
        raise ConfigError(f"slice_radius={radius} must be above 0")
    if points < 3 or points % 2 == 0:
        raise ConfigError(f"slice points={points} must be odd and at least 3")
    middle = points // 2
    return [radius * (index - middle) / middle for index in range(points)]
