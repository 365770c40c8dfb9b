r"""Curvature relative to the weights: the spectrum of D H D with D = diag(scale of each weight).

Multiply a LayerNorm's gain by c and divide the matrix behind it by c: the function is the same and
H is not (Dinh et al., arXiv:1703.04933). With θ' = Sθ for a diagonal S > 0, H' = S⁻¹HS⁻¹, and any
D with D' = SD gives D'H'D' = DHD. Three such D, each invariant under fewer S:

- `elements`: |θ_i|, for every S (that of ASAM, arXiv:2102.11600);
- `filters`: the root mean square of the weight's filter, for S constant on filters;
- `tensors`: the root mean square of its tensor, for S constant on tensors.

Vectors (gains, biases) always use |θ_i| under `filters`. A rule's raw scalars live on a logarithmic
scale already, without such a symmetry, so theirs is 1. λ_max(DHD)/2 is how much the loss rises, to
second order, when weights move by ε = Dδ, ‖δ‖ = 1, from a stationary point.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from polyak.analysis.groups import parameter_groups
from polyak.analysis.hessian import Operator, Surface
from polyak.analysis.landscape import filter_norms, filters
from polyak.errors import unknown

Scale = Literal["elements", "filters", "tensors"]


def scales(surface: Surface, scale: Scale = "elements") -> Tensor:
    """D's diagonal as a float64 vector (N,).

    Raises:
        UnknownNameError: no such scale.
    """
    if scale not in get_args(Scale):
        raise unknown("scale", scale, get_args(Scale))
    scalars = set(parameter_groups(surface.model).get("scalars", []))
    parts = []
    for name, weight in surface.view.split(surface.weights).items():
        dimension = filters(surface.model, name)
        if name in scalars:
            parts.append(torch.ones_like(weight))
        elif scale == "tensors":
            parts.append(torch.full_like(weight, float(weight.square().mean().sqrt())))
        elif scale == "elements" or dimension is None:
            parts.append(weight.abs())
        else:
            size = weight.numel() // weight.shape[dimension]
            rms = filter_norms(weight, dimension) / size**0.5
            parts.append(rms.expand_as(weight))
    return surface.view.join(parts)


def scaled(operator: Operator, diagonal: Tensor) -> Operator:
    """V ↦ D H D v."""
    return lambda vector: diagonal * operator(diagonal * vector)
