"""Newton–Schulz orthogonalisation of weight gradients, for the Muon optimizer."""

from __future__ import annotations

import torch
from torch import Tensor

from polyak.ops import reference


@torch.no_grad()
def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Orthogonalise weight gradients (..., m, n) approximately; no autograd."""
    return reference.orthogonalize_reference(matrix, steps)
