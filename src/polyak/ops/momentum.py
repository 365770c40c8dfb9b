"""Momentum arithmetic along depth: scaled additions, and layer norms joined to them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from polyak.ops import reference
from polyak.ops.reference import using_reference_forms


def axpy(scale: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """Return x + scale·v.

    Shapes: scale (1,) or (), v and x (..., d).
    """
    return reference.axpy_reference(scale, v, x)


def axpby(beta: Tensor, v: Tensor, gamma: Tensor, g: Tensor) -> Tensor:
    """Return βv + γg.

    Shapes: beta and gamma (1,) or (), v and g (..., d).
    """
    return reference.axpby_reference(beta, v, gamma, g)


def layer_norm(u: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last dimension, torch's own.

    Shapes: u (..., d), weight and bias (d,) or None.
    """
    if using_reference_forms():
        return reference.layer_norm_reference(u, weight, bias, eps)
    return F.layer_norm(u, u.shape[-1:], weight, bias, eps)


def momentum_norm(
    beta: Tensor,
    v: Tensor,
    gamma: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Return LN(βv + γg), the velocity update of the momentum rules."""
    return reference.momentum_norm_reference(beta, v, gamma, g, weight, bias, eps)


def scaled_norm_add(
    x: Tensor,
    gamma: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Return x + γ LN(u), how the preconditioned rules add their update."""
    return reference.scaled_norm_add_reference(x, gamma, u, weight, bias, eps)
