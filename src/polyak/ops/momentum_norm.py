"""LN(βv + γg): how the momentum rules update their velocity, in one op.

Only inputs and the result are kept for the gradient (and each row's mean and deviation);
βv + γg is computed anew, which costs a pass over memory, much less than keeping it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyak.ops.autograd import (
    apply,
    differentiable,
    dot,
    in_legacy_vmap,
    number,
    plain_form_needed,
    readable,
    to_differentiate,
)
from polyak.ops.momentum import axpby_gradients
from polyak.ops.norms import layer_norm_backward, layer_norm_gradients
from polyak.ops.reference import momentum_norm_reference


def momentum_norm(
    beta: Tensor,
    v: Tensor,
    gamma: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Return LN(βv + γg), the velocity update of heavy_ball, nesterov and triple_momentum.

    Shapes: beta and gamma (1,) or (), v and g (..., d), weight and bias (d,) or None.
    """
    if plain_form_needed() or beta.numel() != 1 or gamma.numel() != 1 or v.shape != g.shape:
        return momentum_norm_reference(beta, v, gamma, g, weight, bias, eps)
    form = _NumericMomentumNorm if numbers_serve(beta, v, gamma, g) else _MomentumNorm
    if form is _NumericMomentumNorm and not differentiable():
        return _numeric_form(beta, v, gamma, g, weight, bias, eps)[0]
    result: Tensor = apply(form, beta, v, gamma, g, weight, bias, eps)
    return result


class _MomentumNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        beta: Tensor,
        v: Tensor,
        gamma: Tensor,
        g: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        u = torch.addcmul(beta * v, gamma, g)
        return F.layer_norm(u, u.shape[-1:], weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_momentum_norm_gradients(grad, ctx.saved_tensors, ctx.eps), None


def _momentum_norm_gradients(
    grad: Tensor, saved: tuple[Any, ...], eps: float
) -> tuple[Tensor | None, ...]:
    """Gradients of LN(βv + γg) with respect to its six tensors.

    LN hardly changes when its input is scaled: β·β̄ + γ·γ̄ = ⟨ū, u⟩ is the small number
    Σ eps·rstd²·⟨grad, y⟩ over rows, y the LN without its bias.  A plain dot product of ū with g
    would leave only rounding errors of γ̄ where v = 0, so γ̄ comes from that identity unless γ is
    small against β.
    """
    beta, v, gamma, g, weight, bias = saved
    inputs, every = saved[:4], (True,) * 4
    u = torch.addcmul(beta * v, gamma, g)
    if to_differentiate(grad, *inputs) or in_legacy_vmap(grad, *inputs):
        u_grad, *affine = layer_norm_gradients(grad, u, weight, bias, eps)
        return *axpby_gradients(u_grad, inputs, every), *affine
    y, mean, rstd = torch.native_layer_norm(u, u.shape[-1:], weight, None, eps)
    grad = grad.to(u.dtype)
    u_grad, *affine = layer_norm_backward(grad, u, weight, bias, mean, rstd)
    by_beta, by_v, by_gamma, by_g = axpby_gradients(u_grad, inputs, every)
    assert by_beta is not None
    assert by_gamma is not None
    along_u = eps * (rstd.square().squeeze(-1) * torch.linalg.vecdot(grad, y)).sum()
    exact = (along_u - beta * by_beta) / gamma
    return by_beta, by_v, torch.where(4 * gamma >= beta, exact, by_gamma), by_g, *affine


def numbers_serve(beta: Tensor, v: Tensor, gamma: Tensor, g: Tensor) -> bool:
    """Whether β and γ can be read as numbers, and γ is large enough to divide by."""
    return readable((beta, gamma), v, g) and number(gamma) > 1e-3 * abs(number(beta)) + 1e-6


def _numeric_form(
    beta: Tensor,
    v: Tensor,
    gamma: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """LN(βv + γg) as LN of g + (β/γ)v with eps/γ², and each row's mean and 1/√(var + eps/γ²)."""
    gain = number(gamma)
    u = torch.add(g, v, alpha=number(beta) / gain)
    return torch.native_layer_norm(u, u.shape[-1:], weight, bias, eps / gain**2)


class _NumericMomentumNorm(torch.autograd.Function):
    """LN(βv + γg) with fewer passes over memory, β and γ being numbers that can be read.

    LN with eps of γu equals LN with eps/γ² of u, so the input is taken as g + (β/γ)v, which is one
    pass; torch's kernel for its gradient then gives γū, the gradient with respect to g, at once.
    """

    @staticmethod
    def forward(  # not `setup_context`: mean and rstd are saved, and are no outputs
        ctx: Any,
        beta: Tensor,
        v: Tensor,
        gamma: Tensor,
        g: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        ctx.eps = eps
        y, mean, rstd = _numeric_form(beta, v, gamma, g, weight, bias, eps)
        ctx.save_for_backward(beta, v, gamma, g, weight, bias, y, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, moments = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        if to_differentiate(grad, *inputs[:4]) or in_legacy_vmap(grad, *inputs[:4]):
            return *_momentum_norm_gradients(grad, inputs, ctx.eps), None
        return *_numeric_gradients(grad, inputs, moments, ctx.eps), None


def _numeric_gradients(
    grad: Tensor, inputs: tuple[Any, ...], moments: tuple[Tensor, ...], eps: float
) -> tuple[Tensor | None, ...]:
    """Gradients of `_NumericMomentumNorm` with respect to its six tensors."""
    beta, v, gamma, g, weight, bias = inputs
    y, mean, rstd = moments
    gain = number(gamma)
    ratio = number(beta) / gain
    u = torch.add(g, v, alpha=ratio)
    by_g, *affine = layer_norm_backward(grad, u, weight, bias, mean, rstd)
    by_beta = dot(by_g, v) / gain
    if 4 * gain >= number(beta):  # see _momentum_norm_gradients
        along = torch.linalg.vecdot(grad, y)
        if bias is not None:
            along = along - grad @ bias
        along_u = (eps / gain**2) * (rstd.square().squeeze(-1) * along).sum()
        by_gamma = (along_u - beta * by_beta) / gain
    else:
        by_gamma = dot(by_g, g) / gain
    by_v = torch.mul(by_g, ratio, out=u)  # u is not needed any more
    return by_beta.reshape(beta.shape), by_v, by_gamma.reshape(gamma.shape), by_g, *affine
