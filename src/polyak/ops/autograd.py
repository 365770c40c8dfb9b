"""Small helpers shared by the custom autograd Functions of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_map

from polyak.ops.reference import using_reference_forms

# About the longest run that one dot product sums: bounds the rounding error in fp32, and the copy
# made of operands that are not contiguous.
_DOT_RUN = 1 << 20


def apply(function: Any, *inputs: Any) -> Any:
    """`function.apply(*inputs)`: torch leaves it without types.

    Where nothing can be differentiated, its forward alone: `apply` itself costs more than a
    kernel on one token. Functions without `setup_context` need a context and get one.
    """
    if not differentiable() and function.setup_context is not _NO_SETUP:
        return function.forward(*inputs)
    return function.apply(*inputs)


_NO_SETUP = torch.autograd.Function.setup_context


def differentiable() -> bool:
    """Whether anything computed here may be differentiated or transformed."""
    return (
        torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


# torch's own lazy form of torch.compiler.disable, which would import the compiler (a second or
# more) as soon as it decorates something.
_outside_graphs = _disable_dynamo(apply)


def apply_uncompiled(function: Any, *inputs: Any) -> Any:
    """`apply`, never traced by torch.compile: for loops over cache-sized chunks.

    A compiled model runs such a Function as it is, between two graphs.
    """
    if torch.compiler.is_compiling():
        return _outside_graphs(function, *inputs)
    return function.apply(*inputs)


def vjp(function: Callable[..., Any], *primals: Tensor) -> tuple[Any, Callable[..., Any]]:
    """`torch.func.vjp` without auxiliary outputs: (outputs, cotangents → gradients)."""
    outputs, pull = torch.func.vjp(function, *primals)[:2]
    return outputs, pull


def with_batch(tensor: Tensor, *like: Tensor) -> Tensor:
    """`tensor` (..., m, n) expanded to the leading dimensions it shares with `like`."""
    shapes: Any = torch.broadcast_shapes  # torch leaves it without types
    batch = shapes(*(t.shape[:-2] for t in (tensor, *like)))
    return tensor.expand(*batch, -1, -1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ a·b over all entries of two tensors of one shape, without a temporary of their size."""
    if a.dtype != b.dtype or a.dim() == 0:
        return (a * b).sum()
    rows = max(1, _DOT_RUN * a.shape[0] // max(1, a.numel()))
    if a.shape[0] <= rows:
        return torch.dot(a.reshape(-1), b.reshape(-1))
    parts = zip(torch.split(a, rows), torch.split(b, rows), strict=True)
    return torch.stack([torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in parts]).sum()


def trace(a: Tensor) -> Tensor:
    """tr A of (..., m, m) as (..., 1, 1)."""
    return a.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def symmetric(a: Tensor) -> Tensor:
    """(A + Aᵀ)/2."""
    return 0.5 * (a + a.transpose(-2, -1))


def add_to_diagonal(a: Tensor, value: Tensor | float) -> Tensor:
    """A + value·I, without a full identity."""
    diagonal = a.diagonal(dim1=-2, dim2=-1) + value
    return torch.diagonal_scatter(a, diagonal, dim1=-2, dim2=-1)


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
    slices = zip(*(torch.split(t, tokens) for t in tensors), strict=True)
    parts = zip(*(function(*part) for part in slices), strict=True)
    return tuple(torch.cat(part) for part in parts)


def zero_if_none(tangent: Tensor | None, like: Tensor) -> Tensor:
    """The tangent, or zeros where forward mode passed none."""
    return torch.zeros_like(like) if tangent is None else tangent


def _unpack(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """A tensor's (primal, tangent) at the current forward-mode level."""
    unpack: Any = forward_ad.unpack_dual
    primal, tangent = unpack(tensor)
    return primal, tangent


@contextmanager
def forward_mode(*saved: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The saved tensors' primal values, with forward mode on, for use inside `Function.jvp`.

    torch switches forward mode off inside `jvp`, for every nested level and not only the one
    being computed, so jacfwd(jacfwd(f)) would silently lose the outer tangents (pytorch issue
    197867).  With the level's own tangents stripped, switching it on again is safe.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        yield tuple(_unpack(t)[0] for t in saved)


def pushforward(
    function: Callable[..., Any], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> Any:
    """The derivative of `function` along `tangents`, as two reverse passes.

    torch.func.jvp cannot be called inside `Function.jvp`: dual levels do not nest.
    """
    outputs, pull = vjp(function, *primals)
    _, push = vjp(pull, tree_map(torch.zeros_like, outputs))
    return push(tangents)[0]


def plain_form_needed() -> bool:
    """Whether an elementwise op should be plain torch code here.

    So under `reference_forms()`; under torch.compile, which fuses plain code by itself; and in
    forward mode, which then needs no rule of ours.
    """
    return (
        using_reference_forms() or torch.compiler.is_compiling() or forward_ad._current_level >= 0
    )


def to_differentiate(*tensors: Tensor) -> bool:
    """Whether a backward pass is itself to be differentiated, in reverse or forward mode."""
    return torch.is_grad_enabled() or any(_unpack(t)[1] is not None for t in tensors)


def gradients_again(
    function: Callable[..., tuple[Tensor | None, ...]],
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of plain code, inside a backward pass that is differentiated or batched.

    Args:
        function: plain torch code of the same value, from all of `tensors`.
        tensors: the saved inputs.
        needed: which of them need a gradient.
        grads: of each result; None where a result has none.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # views, because one input may have been computed from another
        tensors = [None if t is None else t.view_as(t) for t in tensors]
        results = zip(function(*tensors), grads, strict=True)
        used = [(r, g) for r, g in results if r is not None and g is not None and r.requires_grad]
        found = iter(
            torch.autograd.grad(
                [r for r, _ in used],
                [t for t, n in zip(tensors, needed, strict=True) if n and t is not None],
                [g for _, g in used],
                create_graph=again,
                allow_unused=True,
            )
        )
    return [next(found) if n else None for n in needed]


def in_legacy_vmap(*tensors: Tensor) -> bool:
    """Whether a tensor is batched by `torch.autograd.grad(..., is_grads_batched=True)`.

    That older vmap knows neither `Function.vmap` nor operations with `out=`.
    """
    return any(torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors)


def readable(scalars: Sequence[Tensor], *tensors: Tensor) -> bool:
    """Whether scalars can be read as numbers: plain CPU tensors of one type, no transform.

    Coefficients that are vectors cannot.
    """
    every = (*scalars, *tensors)
    dtype = every[0].dtype
    if dtype not in (torch.float32, torch.float64):
        return False
    for t in every:  # a loop: decoding comes here several times a layer for every token
        if type(t) is not Tensor and type(t) is not torch.nn.Parameter:
            return False
        if not t.is_cpu or t.dtype != dtype:
            return False
    for scalar in scalars:
        if scalar.numel() != 1:
            return False
    return torch._C._functorch.peek_interpreter_stack() is None and not in_legacy_vmap(*every)


def number(scalar: Tensor) -> float:
    """The value of a tensor with one entry."""
    return float(scalar.detach())
