"""RMSNorm, alone and of βv + γg, with derivatives that are right to every order.

torch's `rms_norm` has no CPU kernel: its backward pass is a chain of elementwise operations, among
them powers, and 18 times slower than LayerNorm's (torch 2.13).  As in `norms` and `momentum_norm`,
only inputs are kept for the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyak.ops.autograd import apply, in_legacy_vmap, plain_form_needed, to_differentiate
from polyak.ops.momentum import axpby_gradients
from polyak.ops.reference import momentum_rms_norm_reference, rms_norm_reference


def rms_norm(u: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return u/√(mean u² + eps)·weight over the last dimension, 16-bit inputs in float32.

    Shapes: u (..., d), weight (d,) or None.
    """
    if plain_form_needed():
        return _in_float32(rms_norm_reference, u, weight=weight, eps=eps)
    result: Tensor = apply(_RMSNorm, u, weight, eps)
    return result


def momentum_rms_norm(
    beta: Tensor, v: Tensor, gamma: Tensor, g: Tensor, weight: Tensor | None, eps: float
) -> Tensor:
    """Return RMSNorm(βv + γg), the velocity update of the momentum rules.

    Shapes: beta and gamma (1,) or (), v and g (..., d), weight (d,) or None.
    """
    if plain_form_needed() or beta.numel() != 1 or gamma.numel() != 1 or v.shape != g.shape:
        return _in_float32(momentum_rms_norm_reference, beta, v, gamma, g, weight=weight, eps=eps)
    result: Tensor = apply(_MomentumRMSNorm, beta, v, gamma, g, weight, eps)
    return result


class _RMSNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return _normed(u, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, weight = ctx.saved_tensors
        by_u, by_weight, _ = _gradients(grad, u, weight, ctx.eps)
        return by_u, by_weight, None


class _MomentumRMSNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        beta: Tensor, v: Tensor, gamma: Tensor, g: Tensor, weight: Tensor | None, eps: float
    ) -> Tensor:
        return _normed(torch.addcmul(beta * v, gamma, g), weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all inputs; γ̄ by β·β̄ + γ·γ̄ = Σ eps·rstd²·⟨grad, y⟩ as in `momentum_norm`."""
        beta, v, gamma, g, weight = ctx.saved_tensors
        inputs, every = (beta, v, gamma, g), (True,) * 4
        u_grad, by_weight, along = _gradients(
            grad, torch.addcmul(beta * v, gamma, g), weight, ctx.eps
        )
        by_beta, by_v, by_gamma, by_g = axpby_gradients(u_grad, inputs, every)
        if to_differentiate(grad, *inputs) or in_legacy_vmap(grad, *inputs):
            return by_beta, by_v, by_gamma, by_g, by_weight, None
        assert by_beta is not None
        assert by_gamma is not None
        exact = (ctx.eps * along.sum() - beta * by_beta) / gamma
        by_gamma = torch.where(4 * gamma >= beta, exact, by_gamma).to(gamma.dtype)
        return by_beta, by_v, by_gamma, by_g, by_weight, None


def _normed(u: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = u.to(torch.promote_types(u.dtype, torch.float32))
    y = wide * _rstd(wide, eps)
    if weight is None:
        return y.to(u.dtype)
    return (y * weight).to(torch.promote_types(u.dtype, weight.dtype))


def _rstd(u: Tensor, eps: float) -> Tensor:
    """1/√(mean u² + eps), (..., 1), without a tensor of u's size."""
    squares: Tensor = torch.linalg.vecdot(u, u)
    return torch.rsqrt(squares[..., None] / u.shape[-1] + eps)


def _gradients(
    grad: Tensor, u: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients with respect to u and weight, and rstd²·⟨grad, y⟩ of each row.

    With h = grad·weight and y = u·rstd: ū = rstd·(h − y·mean(h·y)).
    """
    wide = torch.promote_types(u.dtype, torch.float32)
    x, grad = u.to(wide), grad.to(wide)
    rstd = _rstd(x, eps)
    y = x * rstd
    h = grad if weight is None else grad * weight
    along: Tensor = torch.linalg.vecdot(h, y)[..., None]
    by_u = rstd * (h - y * (along / u.shape[-1]))
    by_weight = None
    if weight is not None:
        by_weight = (grad * y).reshape(-1, u.shape[-1]).sum(0).to(weight.dtype)
    return by_u.to(u.dtype), by_weight, rstd * rstd * along


def _in_float32(form: Any, *tensors: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """A reference form with its arithmetic in float32 or better."""
    dtype = tensors[-1].dtype
    exact = torch.promote_types(dtype, torch.float32)
    result: Tensor = form(*(t.to(exact) for t in tensors), weight, eps)
    return result.to(dtype if weight is None else torch.promote_types(dtype, weight.dtype))
