"""Layer norm, with derivatives that are right to every order."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyak.ops.autograd import (
    apply,
    in_legacy_vmap,
    plain_form_needed,
    readable,
    to_differentiate,
)
from polyak.ops.reference import layer_norm_reference


def layer_norm(u: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return LN(u) = (u − mean u)/√(var u + eps)·weight + bias over the last dimension.

    torch's kernel for the value and the first gradient only: its higher derivatives are silently
    wrong in several transforms (pytorch issues 196700 and 175754, and jacrev of jacrev with respect
    to weight and input, torch 2.13), so those come from the plain equation.

    Shapes: u (..., d), weight and bias (d,) or None.
    """
    if torch.compiler.is_compiling():
        return F.layer_norm(u, u.shape[-1:], weight, bias, eps)
    if plain_form_needed():
        return layer_norm_reference(u, weight, bias, eps)
    affine = [t for t in (weight, bias) if t is not None]
    form = _KeepingLayerNorm if readable(affine, u) else _LayerNorm
    result: Tensor = apply(form, u, weight, bias, eps)
    return result


class _KeepingLayerNorm(torch.autograd.Function):
    """`_LayerNorm`, with each row's mean and deviation kept for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(u, u.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(u, weight, bias, mean, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, weight, bias, mean, rstd = ctx.saved_tensors
        if to_differentiate(grad, u) or in_legacy_vmap(grad, u):
            return *layer_norm_gradients(grad, u, weight, bias, ctx.eps), None
        return *layer_norm_backward(grad, u, weight, bias, mean, rstd), None


class _LayerNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return F.layer_norm(u, u.shape[-1:], weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, weight, bias = ctx.saved_tensors
        return *layer_norm_gradients(grad, u, weight, bias, ctx.eps), None


def layer_norm_gradients(
    grad: Tensor, u: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of LN with respect to u, weight and bias; mean and variance are recomputed.

    With h = grad·weight and y the normalised u: ū = rstd·(h − mean h − y·mean(h·y)), as plain
    torch where it will be differentiated again, by torch's kernel otherwise.
    """
    if not to_differentiate(grad, u):
        _, mean, rstd = torch.native_layer_norm(u, u.shape[-1:], weight, bias, eps)
        return layer_norm_backward(grad.to(u.dtype), u, weight, bias, mean, rstd)
    centred = u - u.mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt((centred * centred).mean(dim=-1, keepdim=True) + eps)
    y = centred * rstd
    h = grad if weight is None else grad * weight
    along = y * (h * y).mean(dim=-1, keepdim=True)
    return (
        rstd * (h - h.mean(dim=-1, keepdim=True) - along),
        None if weight is None else (grad * y).reshape(-1, u.shape[-1]).sum(0),
        None if bias is None else grad.reshape(-1, u.shape[-1]).sum(0),
    )


def layer_norm_backward(
    grad: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    input_too: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """torch's kernel for the gradients of LN, given the mean and 1/√(var + eps) of each row."""
    mask = (input_too, weight is not None, bias is not None)
    kernel: Any = torch.ops.aten.native_layer_norm_backward
    by_u, by_weight, by_bias = kernel(grad, u, u.shape[-1:], mean, rstd, weight, bias, mask)
    return by_u, by_weight, by_bias
