"""The moving average of Gram matrices that shampoo and soap precondition with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyak.ops.autograd import (
    apply,
    batch_first,
    dot,
    full_precision,
    plain_form_needed,
    with_batch,
)
from polyak.ops.reference import gram_ema_reference


def gram_ema(beta: Tensor, r: Tensor, g: Tensor) -> Tensor:
    r"""Return :math:`\beta R + (1-\beta) G^\top G`.

    Shapes: beta (1,) or (), r (..., D, D), g (..., H, D) to (..., D, D).  Only the inputs are
    saved, and the forward pass makes no D×D temporary besides its result.
    Source: arXiv 2605.24425 (ShampooFormer, SOAPFormer).
    """
    if plain_form_needed() or beta.numel() != 1 or r.dtype != g.dtype:
        return gram_ema_reference(beta, r, g)
    r, g = with_batch(r, g), with_batch(g, r)
    with full_precision(g.device):
        flat_r, flat_g = r.reshape(-1, *r.shape[-2:]), g.reshape(-1, *g.shape[-2:])
        result: Tensor = apply(_GramEma, beta, flat_r, flat_g)
    return result.reshape(r.shape)


def gram_ema_flops(heads: int, head_dim: int) -> tuple[int, int]:
    """Matrix-product FLOPs per token of the fast form: (forward, backward), 2 per multiply-add."""
    return 2 * heads * head_dim**2, 4 * heads * head_dim**2


class _GramEma(torch.autograd.Function):
    @staticmethod
    def forward(beta: Tensor, r: Tensor, g: Tensor) -> Tensor:
        result = beta * r
        return torch.baddbmm(result, ((1 - beta) * g).transpose(-2, -1), g, out=result)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        beta, r, g = ctx.saved_tensors
        needs_beta, needs_r, _ = ctx.needs_input_grad
        # grad need not be symmetric: Ḡ = (1−β) G(R̄ + R̄ᵀ).
        half = torch.bmm(g, grad)
        return (
            (dot(grad, r) - dot(half, g)).reshape(beta.shape) if needs_beta else None,
            beta * grad if needs_r else None,
            (1 - beta) * torch.baddbmm(half, g, grad.transpose(-2, -1)),
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], beta: Tensor, r: Tensor, g: Tensor
    ) -> tuple[Tensor, int]:
        r, g = batch_first(info.batch_size, in_dims[1:], r, g)
        if in_dims[0] is not None:
            beta = beta.reshape(info.batch_size, 1, 1, 1)
            return beta * r + (1 - beta) * (g.transpose(-2, -1) @ g), 0
        flat = apply(_GramEma, beta, r.flatten(0, 1), g.flatten(0, 1))
        return flat.unflatten(0, r.shape[:2]), 0
