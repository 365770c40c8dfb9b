"""The norms that rules, oracles and heads use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polyak import ops


class LayerNorm(nn.Module):
    r"""LayerNorm over the last dimension: w·(u − mean u)/√(var u + eps) (+ b).

    Args:
        width: d, the size of the last dimension.
        eps: added to the biased variance.
        bias: whether to learn b; the released models do not.
    """

    def __init__(self, width: int, eps: float = 1e-5, bias: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, u: Tensor) -> Tensor:
        """(..., d) → (..., d)."""
        return ops.layer_norm(u, self.weight, self.bias, self.eps)

    def combine(self, beta: Tensor, v: Tensor, gamma: Tensor, g: Tensor) -> Tensor:
        """LN(βv + γg), fused; v and g are (..., d), β and γ have one element."""
        return ops.momentum_norm(beta, v, gamma, g, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """For printing a model."""
        return f"{self.weight.numel()}, eps={self.eps}, bias={self.bias is not None}"


class RMSNorm(nn.Module):
    r"""RMSNorm over the last dimension: w·u/√(mean u² + eps) (arXiv:1910.07467).

    Args:
        width: d, the size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, u: Tensor) -> Tensor:
        """(..., d) → (..., d)."""
        return ops.rms_norm(u, self.weight, self.eps)

    def combine(self, beta: Tensor, v: Tensor, gamma: Tensor, g: Tensor) -> Tensor:
        """RMSNorm(βv + γg), fused; v and g are (..., d), β and γ have one element."""
        return ops.momentum_rms_norm(beta, v, gamma, g, self.weight, self.eps)

    def extra_repr(self) -> str:
        """For printing a model."""
        return f"{self.weight.numel()}, eps={self.eps}"


def norm_of(kind: str, width: int, eps: float, bias: bool) -> LayerNorm | RMSNorm:
    """A norm of a model's kind, `layer` or `rms`; an RMSNorm has no bias."""
    return RMSNorm(width, eps) if kind == "rms" else LayerNorm(width, eps, bias)


class NoNorm(nn.Module):
    """Stands in for a norm that was switched off."""

    def forward(self, u: Tensor) -> Tensor:
        """U unchanged."""
        return u

    def combine(self, beta: Tensor, v: Tensor, gamma: Tensor, g: Tensor) -> Tensor:
        """βv + γg."""
        return ops.axpby(beta, v, gamma, g)
