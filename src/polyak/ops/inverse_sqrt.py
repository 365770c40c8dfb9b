"""The ten-iteration inverse square root of shampoo and soap, and their second moment."""

from __future__ import annotations

from torch import Tensor

from polyak.ops import reference


def gram_ema(beta: Tensor, r: Tensor, g: Tensor) -> Tensor:
    """Return βR + (1−β)GᵀG."""
    return reference.gram_ema_reference(beta, r, g)


def inverse_sqrt_apply(m: Tensor, r: Tensor, steps: int = 10) -> Tensor:
    """Return M·X/√n, X/√n ≈ (R + 1e-6 I)^{-1/2} by `steps` Newton–Schulz iterations."""
    return reference.inverse_sqrt_apply_reference(m, r, steps)
