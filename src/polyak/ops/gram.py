"""The moving average of Gram matrices that shampoo and soap precondition with."""

from __future__ import annotations

from torch import Tensor

from polyak.ops import reference


def gram_ema(beta: Tensor, r: Tensor, g: Tensor) -> Tensor:
    """Return βR + (1−β)GᵀG."""
    return reference.gram_ema_reference(beta, r, g)
