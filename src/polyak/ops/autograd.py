"""Small helpers shared by the custom autograd Functions of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

# Longest run that one fp32 dot product sums, so that its rounding error stays near 1e-6 even
# for the 8 million products of a D×D matrix per token.
_DOT_RUN = 1 << 18


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ a·b over all entries, without a temporary of their size."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return (a * b).sum()
    a, b = a.reshape(-1), b.reshape(-1)
    if a.numel() <= _DOT_RUN:
        return torch.dot(a, b)
    runs = zip(a.split(_DOT_RUN), b.split(_DOT_RUN), strict=True)
    return torch.stack([torch.dot(x, y) for x, y in runs]).sum()


def symmetric(a: Tensor) -> Tensor:
    """(A + Aᵀ)/2."""
    return 0.5 * (a + a.transpose(-2, -1))


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off: the matrix iterations lose all accuracy when rounded to 16 bits."""
    if device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def batch_first(batch_size: int, in_dims: Sequence[int | None], *tensors: Tensor) -> list[Tensor]:
    """Move each tensor's vmapped dimension to the front; repeat those that have none."""
    return [
        t.expand(batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, in_dims, strict=False)
    ]


def by_tokens(
    function: Callable[..., tuple[Tensor, ...]], tokens: int, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """`function` on slices of `tokens` entries of every tensor's first dimension, joined again.

    Bounds the memory of a per-token computation that holds many intermediates.
    """
    if tensors[0].shape[0] <= tokens:
        return function(*tensors)
    slices = zip(*(t.split(tokens) for t in tensors), strict=True)
    parts = zip(*(function(*part) for part in slices), strict=True)
    return tuple(torch.cat(part) for part in parts)


def zero_if_none(tangent: Tensor | None, like: Tensor) -> Tensor:
    """The tangent, or zeros where forward mode passed none."""
    return torch.zeros_like(like) if tangent is None else tangent


@contextmanager
def forward_mode(*saved: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The saved tensors' primal values, with forward mode on, for use inside `Function.jvp`.

    torch switches forward mode off inside `jvp`, for every nested level and not only the one
    being computed, so jacfwd(jacfwd(f)) would silently lose the outer tangents (torch 2.13).
    With the level's own tangents stripped, switching it on again is safe.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        yield tuple(forward_ad.unpack_dual(t).primal for t in saved)


def pushforward(
    function: Callable[..., Any], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> Any:
    """The derivative of `function` along `tangents`, as two reverse passes.

    torch.func.jvp cannot be called inside `Function.jvp`: dual levels do not nest.
    """
    outputs, pull = torch.func.vjp(function, *primals)
    zeros = torch.utils._pytree.tree_map(torch.zeros_like, outputs)
    _, push = torch.func.vjp(pull, zeros)
    return push(tangents)[0]


def in_legacy_vmap(*tensors: Tensor) -> bool:
    """Whether a tensor is batched by `torch.autograd.grad(..., is_grads_batched=True)`.

    That older vmap knows neither `Function.vmap` nor operations with `out=`.
    """
    return any(torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors)
