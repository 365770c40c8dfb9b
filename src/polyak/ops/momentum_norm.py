"""LN(βv + γg): how the momentum rules update their velocity, in one op.

No more is kept for the gradient than inputs and the result would take (and each row's mean and
deviation): βv + γg is computed anew, or kept in g's place.
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
    inputs = beta, v, gamma, g, weight, bias
    result: Tensor
    if weight is not None and numbers_serve(beta, v, gamma, g):
        if not differentiable():
            return _numeric_form(*inputs, eps)[0]
        result, _ = apply(_NumericMomentumNorm, *inputs, eps)
    else:
        result = apply(_MomentumNorm, *inputs, eps)
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
    return readable((beta, gamma), v, g) and 8 * number(gamma) > abs(number(beta)) + 1e-5


def _numeric_form(
    beta: Tensor,
    v: Tensor,
    gamma: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LN(βv + γg) as LN of u = g + (β/γ)v with eps/γ²; u; each row's mean and 1/√(var + eps/γ²)."""
    gain = number(gamma)
    u = torch.add(g, v, alpha=number(beta) / gain)
    y, mean, rstd = torch.native_layer_norm(u, u.shape[-1:], weight, bias, eps / gain**2)
    return y, u, mean, rstd


class _NumericMomentumNorm(torch.autograd.Function):
    """LN(βv + γg) with fewer passes over memory, β and γ being numbers that can be read.

    LN with eps of γu equals LN with eps/γ² of u, so the input is taken as u = g + (β/γ)v, which is
    one pass; torch's kernel for its gradient then gives γū, the gradient with respect to g, at
    once.  u is kept in g's place, which nothing else needs when it comes from a linear map; it is
    an output so that gradients computed from it can be differentiated again.
    """

    @staticmethod
    def forward(  # not `setup_context`: mean and rstd are saved, and are no outputs
        ctx: Any,
        beta: Tensor,
        v: Tensor,
        gamma: Tensor,
        g: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.eps = eps
        y, u, mean, rstd = _numeric_form(beta, v, gamma, g, weight, bias, eps)
        ctx.save_for_backward(beta, v, gamma, u, weight, bias, mean, rstd)
        ctx.set_materialize_grads(False)
        return y, u

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, by_u: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once: checkpoints hand them out once
        beta, v, gamma, u, weight, bias = saved[:6]
        at = [t for t in (grad, beta, v, gamma, u) if t is not None]
        again = by_u is not None or to_differentiate(*at) or in_legacy_vmap(*at)
        if grad is not None and not again:
            return *_numeric_gradients(grad, saved, ctx.eps), None
        ratio = beta / gamma
        inputs = beta, v, gamma, u - ratio * v, weight, bias
        grad = torch.zeros_like(u) if grad is None else grad
        found: tuple[Any, ...] = _momentum_norm_gradients(grad, inputs, ctx.eps)
        by_beta, by_v, by_gamma, by_g, *affine = found
        if by_u is not None:  # u's own gradient: of g + (β/γ)v
            along = dot(by_u, v).reshape(beta.shape) / gamma
            by_beta, by_v = by_beta + along, by_v + ratio * by_u
            by_gamma, by_g = by_gamma - ratio * along, by_g + by_u
        return by_beta, by_v, by_gamma, by_g, *affine, None


def _numeric_gradients(
    grad: Tensor, saved: tuple[Any, ...], eps: float
) -> tuple[Tensor | None, ...]:
    """Gradients of `_NumericMomentumNorm` with respect to its six tensors."""
    beta, v, gamma, u, weight, bias, mean, rstd = saved
    gain = number(gamma)
    by_g, *affine = layer_norm_backward(grad, u, weight, bias, mean, rstd)
    by_beta = dot(by_g, v) / gain
    # see _momentum_norm_gradients; Σ rstd²·⟨grad, y⟩ is ⟨weight, its gradient were rstd cubed⟩
    _, cubed, _ = layer_norm_backward(grad, u, weight, None, mean, rstd**3, input_too=False)
    assert cubed is not None, "the weight is never None"
    along_u = (eps / gain**2) * torch.dot(weight, cubed)
    by_gamma = (along_u - beta * by_beta) / gain
    by_v = (number(beta) / gain) * by_g
    return by_beta.reshape(beta.shape), by_v, by_gamma.reshape(gamma.shape), by_g, *affine
