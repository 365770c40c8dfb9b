"""Momentum arithmetic along depth: scaled additions, alone and of a layer norm.

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
    differentiable,
    dot,
    in_legacy_vmap,
    number,
    plain_form_needed,
    readable,
    to_differentiate,
)
from polyak.ops.norms import layer_norm_gradients
from polyak.ops.reference import (
    axpby_reference,
    axpy_reference,
    scaled_norm_add_reference,
    using_reference_forms,
)


def axpy(scale: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """Return x + scale·v.

    Shapes: scale (1,) or (), v and x (..., d).
    """
    if not differentiable() and not using_reference_forms():
        return torch.addcmul(x, scale, v)
    if plain_form_needed() or scale.numel() != 1 or v.shape != x.shape:
        return axpy_reference(scale, v, x)
    result: Tensor = apply(_Axpy, scale, v, x)
    return result


def axpy_through(scale: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x + scale·v, v): `axpy`, and v again for whatever uses it next.

    A gradient that comes back through the second output is added to scale·x̄ in the same pass
    over memory; without it, autograd makes scale·x̄ first and adds afterwards.

    Shapes: as `axpy`.
    """
    if not differentiable() and not using_reference_forms():
        return torch.addcmul(x, scale, v), v
    plain = plain_form_needed() or scale.numel() != 1 or v.shape != x.shape
    if plain or not readable((scale,), v, x):
        return axpy(scale, v, x), v
    result: tuple[Tensor, Tensor] = apply(_AxpyThrough, scale, v, x)
    return result


def axpby(beta: Tensor, v: Tensor, gamma: Tensor, g: Tensor) -> Tensor:
    """Return βv + γg.

    Shapes: beta and gamma (1,) or (), v and g (..., d).
    """
    if plain_form_needed() or beta.numel() != 1 or gamma.numel() != 1 or v.shape != g.shape:
        return axpby_reference(beta, v, gamma, g)
    result: Tensor = apply(_Axpby, beta, v, gamma, g)
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


class _AxpyThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(scale, v)
        ctx.set_materialize_grads(False)
        return torch.add(x, v, alpha=number(scale)), v.view_as(v)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, through: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        scale, v = ctx.saved_tensors
        if grad is None:
            return None, through, None
        if to_differentiate(grad, scale, v) or in_legacy_vmap(grad):
            by_v = scale * grad if through is None else through + scale * grad
        elif through is None:
            by_v = grad * number(scale)
        else:
            by_v = torch.add(through, grad, alpha=number(scale))
        return dot(grad, v).reshape(scale.shape), by_v, grad


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
        return axpby_gradients(grad, ctx.saved_tensors, ctx.needs_input_grad)


def axpby_gradients(
    grad: Tensor, inputs: tuple[Tensor, ...], needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of βv + γg with respect to (β, v, γ, g), None where one is not needed."""
    beta, v, gamma, g = inputs
    return (
        dot(grad, v).reshape(beta.shape) if needed[0] else None,
        beta * grad if needed[1] else None,
        dot(grad, g).reshape(gamma.shape) if needed[2] else None,
        gamma * grad if needed[3] else None,
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
