"""Newton–Schulz orthogonalisation per token, on the smaller side's Gram matrix.

With Y = UΣVᵀ every iterate is U p(Σ) Vᵀ, so the iteration can run on G = YYᵀ (the smaller side),
collect Q = Π (aI + bG + cG²) and apply it once: Q·Y.  All matrices of the recursion are
polynomials in G: symmetric and commuting.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyak.ops.autograd import (
    add_to_diagonal,
    apply,
    apply_uncompiled,
    batch_first,
    forward_mode,
    full_precision,
    pushforward,
    symmetric,
    vjp,
    zero_if_none,
)
from polyak.ops.reference import (
    NEWTON_SCHULZ_COEFFICIENTS,
    NEWTON_SCHULZ_EPS,
    newton_schulz_reference,
    using_reference_forms,
)

# torch.bmm sends products of fewer than 400 multiply-adds to a plain loop, three times slower
# than the library call on 8×8 matrices, so smaller Gram matrices are padded with zeros to this.
_SMALLEST_GRAM = 8


def newton_schulz(y: Tensor, steps: int = 5) -> Tensor:
    r"""Orthogonalise each token's matrix approximately.

    :math:`Y \leftarrow Y/\max(\|Y\|_F, 10^{-12})`, then `steps` times
    :math:`Y \leftarrow Y(aI + bA + cA^2)`, :math:`A = Y^\top Y`,
    (a, b, c) = (3.4445, −4.7750, 2.0315).

    Shapes: y (..., H, D) to (..., H, D).  Only `y` is saved for the backward pass, whatever
    `steps` is.  16-bit inputs are computed in float32.
    Source: the Muon optimizer's iteration (Jordan et al., 2024), per token as in arXiv 2605.24425.
    """
    assert steps >= 1, "Newton–Schulz needs at least one iteration"
    if using_reference_forms():
        return newton_schulz_reference(y, steps)
    with full_precision(y.device):
        wide = y if y.shape[-2] <= y.shape[-1] else y.transpose(-2, -1)
        working = torch.promote_types(y.dtype, torch.float32)
        flat = wide.to(working).reshape(-1, *wide.shape[-2:])
        result: Tensor = apply_uncompiled(_NewtonSchulz, flat, steps).reshape(wide.shape)
        return (result if wide.shape == y.shape else result.transpose(-2, -1)).to(y.dtype)


def newton_schulz_flops(heads: int, head_dim: int, steps: int = 5) -> tuple[int, int]:
    """Matrix-product FLOPs per token of the fast form: (forward, backward).

    Counts 2 per multiply-add, as torch's FlopCounterMode does.
    """
    small, large = sorted((heads, head_dim))
    gram = max(small, _SMALLEST_GRAM) ** 3
    thin = small * small * large
    forward = 2 * thin + (4 * steps - 3) * gram
    backward = 4 * thin + (12 * steps - 9) * gram
    return 2 * forward, 2 * backward


class _NewtonSchulz(torch.autograd.Function):
    """Q(G)·Y for y (N, p, q) with p ≤ q."""

    @staticmethod
    def forward(y: Tensor, steps: int) -> Tensor:
        return _value(y, steps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, ctx.steps = inputs
        ctx.save_for_backward(y)
        ctx.save_for_forward(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return apply(_NewtonSchulzVjp, y, grad, ctx.steps), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        with forward_mode(*ctx.saved_tensors) as (y,):
            return _jvp(y, tangent, ctx.steps)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], y: Tensor, steps: int) -> tuple[Tensor, int]:
        (y,) = batch_first(info.batch_size, in_dims, y)
        return apply(_NewtonSchulz, y.flatten(0, 1), steps).unflatten(0, y.shape[:2]), 0


class _NewtonSchulzVjp(torch.autograd.Function):
    """The gradient of `_NewtonSchulz` as a Function of its own.

    It saves its two inputs only, so a double backward holds no intermediates of the recursion
    either; second derivatives recompute it with torch's own differentiation.
    """

    @staticmethod
    def forward(y: Tensor, grad: Tensor, steps: int) -> Tensor:
        return _vjp(y, grad, steps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, grad, ctx.steps = inputs
        ctx.save_for_backward(y, grad)
        ctx.save_for_forward(y, grad)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor, None]:
        y, grad = ctx.saved_tensors
        _, pull = vjp(partial(_vjp, steps=ctx.steps), y, grad)
        return *pull(cotangent), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        with forward_mode(*ctx.saved_tensors) as primals:
            filled = tuple(zero_if_none(t, p) for t, p in zip(tangents, primals, strict=False))
            result: Tensor = pushforward(partial(_vjp, steps=ctx.steps), primals, filled)
            return result

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], y: Tensor, grad: Tensor, steps: int
    ) -> tuple[Tensor, int]:
        y, grad = batch_first(info.batch_size, in_dims, y, grad)
        flat = apply(_NewtonSchulzVjp, y.flatten(0, 1), grad.flatten(0, 1), steps)
        return flat.unflatten(0, y.shape[:2]), 0


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """A·Bᵀ per token, padded."""
    product = torch.bmm(a, b.transpose(-2, -1))
    missing = _SMALLEST_GRAM - product.shape[-1]
    return F.pad(product, (0, missing, 0, missing)) if missing > 0 else product


def _normalised_gram(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(G/n², 1/n, c): n = max(‖Y‖_F, 1e-12) and ‖Y‖_F² = tr G; c is 0 where n is clamped, else 1.

    Y/n itself is never formed: every use of it is a product that takes the factor on its small
    side.
    """
    gram = _outer(y, y)
    squared = _trace(gram)
    reciprocal = squared.clamp_min(NEWTON_SCHULZ_EPS**2).rsqrt()
    moving = (squared >= NEWTON_SCHULZ_EPS**2).to(y.dtype)
    return gram * reciprocal**2, reciprocal, moving


def _trace(a: Tensor) -> Tensor:
    return a.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def _unpad(a: Tensor, rows: int) -> Tensor:
    return a if a.shape[-1] == rows else a[..., :rows, :rows]


def _quintic(gram: Tensor) -> Tensor:
    """P = aI + bG + cG²."""
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    return add_to_diagonal(torch.baddbmm(gram, gram, gram, beta=b, alpha=c), a)


def _polynomial(gram: Tensor, steps: int) -> Tensor:
    """Q = Π P_k, where P_k = aI + bG_k + cG_k² and G_{k+1} = P_k²·G_k."""
    q = _quintic(gram)
    p = q
    for _ in range(steps - 1):
        gram = torch.bmm(p, torch.bmm(p, gram))
        p = _quintic(gram)
        q = torch.bmm(q, p)
    return q


def _quintic_tangent(gram: Tensor, e: Tensor) -> Tensor:
    """Derivative of P in the direction E: bE + c(GE + EG)."""
    _, b, c = NEWTON_SCHULZ_COEFFICIENTS
    half = torch.baddbmm(e, gram, e, beta=b, alpha=c)
    return torch.baddbmm(half, e, gram, alpha=c)


def _frechet(gram: Tensor, e: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Q(G) and its derivative L in the symmetric direction E."""
    q, dq = _quintic(gram), _quintic_tangent(gram, e)
    p, dp = q, dq
    for _ in range(steps - 1):
        half = torch.bmm(p, gram)
        dhalf = torch.baddbmm(torch.bmm(dp, gram), p, e)
        gram, e = torch.bmm(p, half), torch.baddbmm(torch.bmm(dp, half), p, dhalf)
        p, dp = _quintic(gram), _quintic_tangent(gram, e)
        q, dq = torch.bmm(q, p), torch.baddbmm(torch.bmm(dq, p), q, dp)
    return q, dq


def _value(y: Tensor, steps: int) -> Tensor:
    """Q(G)·Y/n."""
    gram, reciprocal, _ = _normalised_gram(y)
    q = _polynomial(gram, steps) * reciprocal
    return torch.bmm(_unpad(q, y.shape[-2]), y)


def _vjp(y: Tensor, grad: Tensor, steps: int) -> Tensor:
    """Gradient of ⟨grad, Q(G)·U⟩ with U = Y/n.

    L is self-adjoint, so Ū = Q·grad + 2 L(sym C)·U with C = grad·Uᵀ, and Ȳ = (Ū − ⟨Ū,U⟩U)/n.
    """
    rows = y.shape[-2]
    gram, reciprocal, moving = _normalised_gram(y)
    c = _outer(grad, y) * reciprocal
    q, dq = _frechet(gram, symmetric(c), steps)
    radial = moving * (q * c + 2 * dq * gram).sum(dim=(-2, -1), keepdim=True)
    on_y = add_to_diagonal(2 * dq, -radial[..., 0]) * reciprocal**2
    on_grad = q * reciprocal
    return torch.baddbmm(torch.bmm(_unpad(on_grad, rows), grad), _unpad(on_y, rows), y)


def _jvp(y: Tensor, tangent: Tensor, steps: int) -> Tensor:
    """Derivative of Q(G)·U in the direction dY: dU = (dY − ⟨dY,U⟩U)/n, dG = dU·Uᵀ + U·dUᵀ."""
    rows = y.shape[-2]
    gram, reciprocal, moving = _normalised_gram(y)
    c = _outer(tangent, y) * reciprocal**2
    radial = moving * _trace(c)
    q, dq = _frechet(gram, 2 * (symmetric(c) - radial * gram), steps)
    on_y = (dq - radial * q) * reciprocal
    on_tangent = q * reciprocal
    return torch.baddbmm(torch.bmm(_unpad(on_tangent, rows), tangent), _unpad(on_y, rows), y)
