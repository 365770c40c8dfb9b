"""Moving averages along depth and the scaling by a root mean square (adam, rmsprop, soap)."""

from __future__ import annotations

from torch import Tensor

from polyak.ops import reference


def ema(beta: Tensor, m: Tensor, g: Tensor) -> Tensor:
    """Return βm + (1−β)g."""
    return reference.ema_reference(beta, m, g)


def ema_square(beta: Tensor, s: Tensor, g: Tensor) -> Tensor:
    """Return βs + (1−β)g²."""
    return reference.ema_square_reference(beta, s, g)


def rms_scale(m: Tensor, s: Tensor, eps: float = 1e-8) -> Tensor:
    """Return m/(√s + eps)."""
    return reference.rms_scale_reference(m, s, eps)
