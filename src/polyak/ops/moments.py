"""Moving averages along depth and the scaling by a root mean square (adam, rmsprop, soap).

The Functions save their inputs only: torch would keep g², √s and √s + eps as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyak.ops.autograd import apply, dot, plain_form_needed
from polyak.ops.reference import ema_reference, ema_square_reference, rms_scale_reference


def ema(beta: Tensor, m: Tensor, g: Tensor) -> Tensor:
    """Return βm + (1−β)g.

    Shapes: beta (1,) or (), m and g (..., d).
    """
    if plain_form_needed() or beta.numel() != 1 or m.shape != g.shape:
        return ema_reference(beta, m, g)
    result: Tensor = apply(_Ema, beta, m, g)
    return result


def ema_square(beta: Tensor, s: Tensor, g: Tensor) -> Tensor:
    """Return βs + (1−β)g².

    Shapes: beta (1,) or (), s and g (..., d).
    """
    if plain_form_needed() or beta.numel() != 1 or s.shape != g.shape:
        return ema_square_reference(beta, s, g)
    result: Tensor = apply(_EmaSquare, beta, s, g)
    return result


def rms_scale(m: Tensor, s: Tensor, eps: float = 1e-8) -> Tensor:
    """Return m/(√s + eps).

    Shapes: m and s (..., d), s ≥ 0.  As in any such formula the derivative at s = 0 is infinite.
    """
    if plain_form_needed() or m.shape != s.shape:
        return rms_scale_reference(m, s, eps)
    result: Tensor = apply(_RmsScale, m, s, eps)
    return result


class _Ema(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(beta: Tensor, m: Tensor, g: Tensor) -> Tensor:
        return torch.addcmul(beta * m, 1 - beta, g)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        beta, m, g = ctx.saved_tensors
        needs_beta, needs_m, needs_g = ctx.needs_input_grad
        return (
            (dot(grad, m) - dot(grad, g)).reshape(beta.shape) if needs_beta else None,
            beta * grad if needs_m else None,
            (1 - beta) * grad if needs_g else None,
        )


class _EmaSquare(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(beta: Tensor, s: Tensor, g: Tensor) -> Tensor:
        return torch.addcmul(beta * s, (1 - beta) * g, g)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        beta, s, g = ctx.saved_tensors
        needs_beta, needs_s, needs_g = ctx.needs_input_grad
        weighted = grad * g
        return (
            (dot(grad, s) - dot(weighted, g)).reshape(beta.shape) if needs_beta else None,
            beta * grad if needs_s else None,
            2 * (1 - beta) * weighted if needs_g else None,
        )


class _RmsScale(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(m: Tensor, s: Tensor, eps: float) -> Tensor:
        return m / (torch.sqrt(s) + eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        m, s, ctx.eps = inputs
        ctx.save_for_backward(m, s)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        m, s = ctx.saved_tensors
        needs_m, needs_s, _ = ctx.needs_input_grad
        root = torch.sqrt(s)
        scale = root + ctx.eps
        by_m = grad / scale
        return (
            by_m if needs_m else None,
            -0.5 * by_m * m / (scale * root) if needs_s else None,
            None,
        )
