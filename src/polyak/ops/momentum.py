"""Momentum arithmetic along depth: scaled additions, and layer norms joined to them.

The Functions save their inputs only and recompute the rest: βv + γg and the normalised values
cost a pass over memory, much less than keeping them.  Where a gradient is itself differentiated,
the plain reference takes over.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyak.ops.autograd import dot, plain_form_needed, to_differentiate
from polyak.ops.reference import (
    axpby_reference,
    axpy_reference,
    layer_norm_reference,
    momentum_norm_reference,
    scaled_norm_add_reference,
)


def axpy(scale: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """Return x + scale·v.

    Shapes: scale (1,) or (), v and x (..., d).
    """
    if plain_form_needed() or scale.numel() != 1 or v.shape != x.shape:
        return axpy_reference(scale, v, x)
    result: Tensor = _Axpy.apply(scale, v, x)
    return result


def axpby(beta: Tensor, v: Tensor, gamma: Tensor, g: Tensor) -> Tensor:
    """Return βv + γg.

    Shapes: beta and gamma (1,) or (), v and g (..., d).
    """
    if plain_form_needed() or beta.numel() != 1 or gamma.numel() != 1 or v.shape != g.shape:
        return axpby_reference(beta, v, gamma, g)
    result: Tensor = _Axpby.apply(beta, v, gamma, g)
    return result


def layer_norm(u: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return LN(u) = (u − mean u)/√(var u + eps)·weight + bias over the last dimension.

    torch's own kernel, except in forward mode, where that one is wrong at second order.

    Shapes: u (..., d), weight and bias (d,) or None.
    """
    if plain_form_needed() and not torch.compiler.is_compiling():
        return layer_norm_reference(u, weight, bias, eps)
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
    """Return LN(βv + γg), the velocity update of heavy_ball, nesterov and triple_momentum.

    Shapes: beta and gamma (1,) or (), v and g (..., d), weight and bias (d,) or None.
    """
    if plain_form_needed() or beta.numel() != 1 or gamma.numel() != 1 or v.shape != g.shape:
        return momentum_norm_reference(beta, v, gamma, g, weight, bias, eps)
    result: Tensor = _MomentumNorm.apply(beta, v, gamma, g, weight, bias, eps)
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
    result: Tensor = _ScaledNormAdd.apply(x, gamma, u, weight, bias, eps)
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
        if to_differentiate(grad, beta, v, gamma, g):
            return _reference_gradients(momentum_norm_reference, grad, ctx)
        u = torch.addcmul(beta * v, gamma, g)
        u_grad, *affine = _layer_norm_gradients(grad, u, weight, bias, ctx.eps)
        inputs = (beta, v, gamma, g)
        return *_axpby_gradients(u_grad, inputs, ctx.needs_input_grad), *affine, None


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
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)
        # The sum's own value is not needed to differentiate it: keep a placeholder's worth of x.
        ctx.x_needed = False

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError
