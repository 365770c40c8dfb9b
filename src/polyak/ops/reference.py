"""Every op written literally as its equation, and the switch that makes `polyak.ops` use them.

These forms are what the fast ones are compared with, in value and in gradient.  They are plain
differentiable torch code, so any transform torch supports works on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""(a, b, c) of the quintic Y(aI + bA + cA²), A = YᵀY (Jordan et al., the Muon optimizer)."""

NEWTON_SCHULZ_EPS = 1e-12
"""Smallest Frobenius norm a token's matrix is divided by in `newton_schulz`."""

ORTHOGONALIZE_EPS = 1e-7
"""Smallest Frobenius norm a gradient is divided by in `orthogonalize` (as in torch.optim.Muon)."""

INVERSE_SQRT_DAMPING = 1e-6
"""Added to R's diagonal before its inverse square root."""

# A plain module flag rather than a context variable: torch.compile guards on a global and
# recompiles when it changes, so compiled code obeys the switch too.
_reference_active = False


@contextmanager
def reference_forms() -> Iterator[None]:
    """Make every op use its plain reference inside the `with` block.

    The choice is made when an op is called (forward); a backward pass started later follows the
    form its forward used.  The switch is process-wide, not per thread.
    """
    global _reference_active
    before = _reference_active
    _reference_active = True
    try:
        yield
    finally:
        _reference_active = before


def using_reference_forms() -> bool:
    """Whether `reference_forms()` is active."""
    return _reference_active


def axpy_reference(scale: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """x + scale·v."""
    return x + scale * v


def axpby_reference(beta: Tensor, v: Tensor, gamma: Tensor, g: Tensor) -> Tensor:
    """βv + γg."""
    return beta * v + gamma * g


def layer_norm_reference(
    u: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """LN(u) = (u − mean u)/√(var u + eps) · weight + bias, over the last dimension."""
    centred = u - u.mean(dim=-1, keepdim=True)
    variance = (centred * centred).mean(dim=-1, keepdim=True)
    normed = centred / torch.sqrt(variance + eps)
    if weight is not None:
        normed = normed * weight
    return normed if bias is None else normed + bias


def rms_norm_reference(u: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """u/√(mean u² + eps) · weight, over the last dimension."""
    normed = u / torch.sqrt((u * u).mean(dim=-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight


def momentum_rms_norm_reference(
    beta: Tensor, v: Tensor, gamma: Tensor, g: Tensor, weight: Tensor | None, eps: float
) -> Tensor:
    """RMSNorm(βv + γg)."""
    return rms_norm_reference(beta * v + gamma * g, weight, eps)


def momentum_norm_reference(
    beta: Tensor,
    v: Tensor,
    gamma: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """LN(βv + γg)."""
    return layer_norm_reference(beta * v + gamma * g, weight, bias, eps)


def scaled_norm_add_reference(
    x: Tensor,
    gamma: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """x + γ LN(u)."""
    return x + gamma * layer_norm_reference(u, weight, bias, eps)


def ema_reference(beta: Tensor, m: Tensor, g: Tensor) -> Tensor:
    """βm + (1−β)g."""
    return beta * m + (1 - beta) * g


def ema_square_reference(beta: Tensor, s: Tensor, g: Tensor) -> Tensor:
    """βs + (1−β)g²."""
    return beta * s + (1 - beta) * g * g


def rms_scale_reference(m: Tensor, s: Tensor, eps: float = 1e-8) -> Tensor:
    """m/(√s + eps)."""
    return m / (torch.sqrt(s) + eps)


def gram_ema_reference(beta: Tensor, r: Tensor, g: Tensor) -> Tensor:
    """βR + (1−β)GᵀG."""
    beta = beta.reshape(())
    return beta * r + (1 - beta) * (g.transpose(-2, -1) @ g)


def newton_schulz_reference(y: Tensor, steps: int = 5) -> Tensor:
    """Y ← Y/max(‖Y‖_F, 1e-12), then `steps` times Y ← Y(aI + bA + cA²), A = YᵀY."""
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    # ‖Y‖_F is not differentiable at 0; below the clamp it takes no part, so neither may its
    # (infinite) derivative: the square is clamped, and its square root is never taken at 0.
    squared = (y * y).sum(dim=(-2, -1), keepdim=True)
    y = y / squared.clamp_min(NEWTON_SCHULZ_EPS**2).sqrt()
    for _ in range(steps):
        gram = y.transpose(-2, -1) @ y
        y = a * y + y @ (b * gram + c * (gram @ gram))
    return y


def frobenius_norm(x: Tensor) -> Tensor:
    """‖X‖_F of (..., m, n) as (..., 1, 1), summed by rows first.

    torch's float32 norm of a whole 3072×768 matrix is off by 4e-5 (2.13, CPU); this by 1e-7.
    """
    rows: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-2, keepdim=True)
    return norm


def orthogonalize_reference(matrix: Tensor, steps: int = 5) -> Tensor:
    """X ← X/max(‖X‖_F, 1e-7), `steps` times X ← aX + (bA + cA²)X, A = XXᵀ (wide side up)."""
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.transpose(-2, -1) if tall else matrix
    x = x / frobenius_norm(x).clamp_min(ORTHOGONALIZE_EPS)
    for _ in range(steps):
        gram = x @ x.transpose(-2, -1)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.transpose(-2, -1) if tall else x


def inverse_sqrt_apply_reference(m: Tensor, r: Tensor, steps: int = 10) -> Tensor:
    """M·X/√n: R' = R + 1e-6 I, n = ‖R'‖_F, X ← I, `steps` times X ← ½X(3I − X(R'/n)X)."""
    identity = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    damped = r + INVERSE_SQRT_DAMPING * identity
    norm = damped.square().sum(dim=(-2, -1), keepdim=True).sqrt()
    scaled = damped / norm
    x = identity.expand_as(r)
    for _ in range(steps):
        x = 0.5 * (x @ (3 * identity - x @ scaled @ x))
    return m @ x / norm.sqrt()


def linear_cross_entropy_reference(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Σ_n log Σ_v exp(l_nv) − l_{n,t_n} with l = XWᵀ, in float32 or better."""
    logits = features @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    at_target = logits.gather(1, targets[:, None])[:, 0]
    return (torch.logsumexp(logits, dim=1) - at_target).sum()
