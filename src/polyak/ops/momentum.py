"""Momentum arithmetic along depth: scaled additions, and layer norms joined to them.

The Functions save their inputs only and recompute the rest: βv + γg and the normalised values
cost a pass over memory, much less than keeping them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyak.ops.autograd import (
    apply,
    cache_blocks,
    dot,
    in_legacy_vmap,
    plain_form_needed,
    to_differentiate,
)
from polyak.ops.norms import layer_norm_backward, layer_norm_gradients
from polyak.ops.reference import (
    axpby_reference,
    axpy_reference,
    momentum_norm_reference,
    scaled_norm_add_reference,
)


def axpy(scale: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """Return x + scale·v.

    Shapes: scale (1,) or (), v and x (..., d).
    """
    if plain_form_needed() or scale.numel() != 1 or v.shape != x.shape:
        return axpy_reference(scale, v, x)
    result: Tensor = apply(_Axpy, scale, v, x)
    return result


def axpby(beta: Tensor, v: Tensor, gamma: Tensor, g: Tensor) -> Tensor:
    """Return βv + γg.

    Shapes: beta and gamma (1,) or (), v and g (..., d).
    """
    if plain_form_needed() or beta.numel() != 1 or gamma.numel() != 1 or v.shape != g.shape:
        return axpby_reference(beta, v, gamma, g)
    result: Tensor = apply(_Axpby, beta, v, gamma, g)
    return result


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
    result: Tensor = apply(_MomentumNorm, beta, v, gamma, g, weight, bias, eps)
    return result


def scaled_norm_add(
    x: Tensor,
    gamma: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Return x + γ LN(u), how the preconditioned rules add their update.

    Shapes: gamma (1,) or (), x and u (..., d), weight and bias (d,) or None.
    """
    if plain_form_needed() or gamma.numel() != 1 or x.shape != u.shape:
        return scaled_norm_add_reference(x, gamma, u, weight, bias, eps)
    result: Tensor = apply(_ScaledNormAdd, x, gamma, u, weight, bias, eps)
    return result


class _Axpy(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(scale: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return torch.addcmul(x, scale, v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale, v = ctx.saved_tensors
        needs_scale, needs_v, _ = ctx.needs_input_grad
        return (
            dot(grad, v).reshape(scale.shape) if needs_scale else None,
            scale * grad if needs_v else None,
            grad,
        )


class _Axpby(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(beta: Tensor, v: Tensor, gamma: Tensor, g: Tensor) -> Tensor:
        return torch.addcmul(beta * v, gamma, g)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _axpby_gradients(grad, ctx.saved_tensors, ctx.needs_input_grad)


def _axpby_gradients(
    grad: Tensor, inputs: tuple[Tensor, ...], needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    beta, v, gamma, g = inputs
    return (
        dot(grad, v).reshape(beta.shape) if needed[0] else None,
        beta * grad if needed[1] else None,
        dot(grad, g).reshape(gamma.shape) if needed[2] else None,
        gamma * grad if needed[3] else None,
    )


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
        beta, v, gamma, g, weight, bias = ctx.saved_tensors
        inputs, needed = (beta, v, gamma, g), ctx.needs_input_grad
        if to_differentiate(grad, *inputs) or in_legacy_vmap(grad, *inputs):
            u = torch.addcmul(beta * v, gamma, g)
            u_grad, *affine = layer_norm_gradients(grad, u, weight, bias, ctx.eps)
            return *_axpby_gradients(u_grad, inputs, needed), *affine, None
        return *_momentum_norm_gradients(grad, *inputs, weight, bias, ctx.eps), None


def _momentum_norm_gradients(
    grad: Tensor,
    beta: Tensor,
    v: Tensor,
    gamma: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of LN(βv + γg), by blocks of rows whose intermediates stay in the cache.

    LN hardly changes when its input is scaled: β·β̄ + γ·γ̄ = ⟨ū, u⟩ is the small number
    Σ eps·rstd²·⟨grad, y⟩ over rows, y the LN without its bias.  A plain dot product of ū with g
    would leave only rounding errors of γ̄ where v = 0, so γ̄ comes from that identity unless γ is
    small against β.
    """
    shape = g.shape[-1:]
    rows_grad, rows_v, rows_g = (t.reshape(-1, *shape) for t in (grad, v, g))
    v_grad, g_grad = torch.empty_like(rows_v), torch.empty_like(rows_g)
    affine: list[Tensor | None] = [None, None]
    inner = []
    for part in cache_blocks(rows_g):
        block_v, block_g = rows_v[part], rows_g[part]
        u = (beta * block_v).addcmul_(gamma, block_g)
        y, mean, rstd = torch.native_layer_norm(u, shape, weight, None, eps)
        block_grad = rows_grad[part].to(u.dtype)
        u_grad, *block_affine = layer_norm_backward(block_grad, u, weight, bias, mean, rstd)
        affine = [
            b if a is None or b is None else a + b
            for a, b in zip(affine, block_affine, strict=True)
        ]
        along_u = eps * (rstd.square() * y.mul_(block_grad).sum(-1, keepdim=True)).sum()
        inner.append(torch.stack((dot(u_grad, block_v), dot(u_grad, block_g), along_u)))
        torch.mul(u_grad, beta, out=v_grad[part])
        torch.mul(u_grad, gamma, out=g_grad[part])
    by_beta, by_gamma, along_u = torch.stack(inner).sum(0)
    exact = (along_u - beta * by_beta) / gamma
    by_gamma = torch.where(4 * gamma >= beta, exact, by_gamma)
    return (
        by_beta.reshape(beta.shape),
        v_grad.reshape(v.shape),
        by_gamma.reshape(gamma.shape),
        g_grad.reshape(g.shape),
        *affine,
    )


class _ScaledNormAdd(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        gamma: Tensor,
        u: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        return torch.addcmul(x, gamma, F.layer_norm(u, u.shape[-1:], weight, bias, eps))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gamma, u, weight, bias = ctx.saved_tensors
        # γ is folded into the affine map, so its gradient is a sum over d numbers, not over x.
        gain = gamma.expand(u.shape[-1:]) if weight is None else gamma * weight
        offset = None if bias is None else gamma * bias
        u_grad, by_gain, by_offset = layer_norm_gradients(grad, u, gain, offset, ctx.eps)
        assert by_gain is not None, "the gain is never None"
        gamma_grad = (by_gain if weight is None else by_gain * weight).sum()
        if bias is not None and by_offset is not None:
            gamma_grad = gamma_grad + (by_offset * bias).sum()
        return (
            grad,
            gamma_grad.reshape(gamma.shape),
            u_grad,
            None if weight is None else gamma * by_gain,
            None if by_offset is None else gamma * by_offset,
            None,
        )
