r"""Circulation: the work of a field around a closed path, 0 for every gradient.

    ∮ O·dx around the parallelogram x, x + a, x + a + b, x + b,

each side by 3-point Gauss–Legendre, exact for fields that are cubic along it. For small sides it is
aᵀ(Jᵀ − J)b. What is reported is |∮| over the sum of the sides' absolute integrals, from 0 for a
gradient to 1, and ∮/(‖a‖‖b‖), which does not vanish with the sides. The quadrature's own error is
found by halving the panels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from polyak.analysis._common import math_attention
from polyak.analysis.dynamics.asymmetry import Field
from polyak.statistics.intervals import Interval, student

NODES, WEIGHTS = np.polynomial.legendre.leggauss(3)


@dataclass(frozen=True, kw_only=True)
class Circulation:
    """Of one loop in each sequence.

    Attributes:
        share: |∮|/Σ|side|, mean over sequences.
        per_area: ∮/(‖a‖‖b‖), mean over sequences.
        floor: of the share, the largest change when panels are halved: what quadrature misses.
    """

    share: Interval
    per_area: Interval
    floor: float


def circulation(function: Field, x: Tensor, a: Tensor, b: Tensor) -> Circulation:
    """The circulation around one parallelogram for each of at least two sequences.

    Args:
        function: the field.
        x: a corner, (B, T, d); a sequence's T·d numbers are one vector.
        a: one side, likewise.
        b: the other.
    """
    coarse, fine = (sides(function, x, a, b, panels) for panels in (1, 2))
    whole, total = fine.sum(0), fine.abs().sum(0)
    before = coarse.sum(0).abs() / coarse.abs().sum(0)
    share = whole.abs() / total
    area = _size(a) * _size(b)
    return Circulation(
        share=student(share.tolist()),
        per_area=student((whole / area).tolist()),
        floor=float((share - before).abs().max()),
    )


def sides(function: Field, x: Tensor, a: Tensor, b: Tensor, panels: int) -> Tensor:
    """∫O·dx along the four sides, in the order and direction of the loop, (4, B)."""
    corners = ((x, a), (x + a, b), (x + a + b, -a), (x + b, -b))
    return torch.stack([_along(function, start, side, panels) for start, side in corners])


@torch.no_grad()
def _along(function: Field, start: Tensor, side: Tensor, panels: int) -> Tensor:
    total = torch.zeros(len(start), dtype=torch.float64)
    for panel in range(panels):
        for node, weight in zip(NODES, WEIGHTS, strict=True):
            t = (panel + (node + 1) / 2) / panels
            with math_attention():
                value = function(start + t * side)
            work = (value * side).flatten(1).double().sum(1).cpu()
            total += weight / (2 * panels) * work
    return total


def _size(side: Tensor) -> Tensor:
    found: Tensor = side.flatten(1).double().norm(dim=1)
    return found.cpu()
