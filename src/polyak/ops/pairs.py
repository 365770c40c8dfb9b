"""Every op beside its reference, with inputs to try both on: for the tests and the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from polyak.ops import moments, momentum, reference
from polyak.ops.gram import gram_ema
from polyak.ops.inverse_sqrt import inverse_sqrt_apply
from polyak.ops.momentum_norm import momentum_norm
from polyak.ops.newton_schulz import newton_schulz
from polyak.ops.norms import layer_norm
from polyak.ops.orthogonal import orthogonalize
from polyak.ops.rms_norm import momentum_rms_norm, rms_norm

_EPS = 1e-5


class Pair(NamedTuple):
    """A fast op, its reference, and `make_inputs(n, heads, head_dim, dtype)` for n tokens.

    Both functions take the tensors of `make_inputs` and nothing else, and return one tensor.
    Inputs are drawn from torch's default generator.  `differentiable` says whether the op has
    a gradient with respect to all of them.
    """

    name: str
    fast: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    make_inputs: Callable[[int, int, int, torch.dtype], tuple[Tensor, ...]]
    differentiable: bool = True


def _stream(n: int, heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, heads * head_dim, dtype=dtype)


def _matrices(n: int, heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, heads, head_dim, dtype=dtype)


def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    return torch.full((1,), value, dtype=dtype)


def _gain(heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    return 1 + 0.1 * torch.randn(heads * head_dim, dtype=dtype)


def _gram(n: int, heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """A symmetric positive definite R as one shampoo step makes it: ½I + ½GᵀG."""
    g = _matrices(n, heads, head_dim, dtype)
    return 0.5 * torch.eye(head_dim, dtype=dtype) + 0.5 * g.transpose(-2, -1) @ g


def _for_axpy(n: int, h: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return _scalar(0.3, dtype), _stream(n, h, d, dtype), _stream(n, h, d, dtype)


def _for_axpby(n: int, h: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    beta, v, g = _for_axpy(n, h, d, dtype)
    return beta, v, _scalar(0.7, dtype), g


def _for_layer_norm(n: int, h: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return _stream(n, h, d, dtype), _gain(h, d, dtype), 0.1 * _gain(h, d, dtype)


def _for_rms_norm(n: int, h: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return _stream(n, h, d, dtype), _gain(h, d, dtype)


def _for_momentum_rms_norm(n: int, h: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return *_for_axpby(n, h, d, dtype), _gain(h, d, dtype)


def _for_momentum_norm(n: int, h: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return *_for_axpby(n, h, d, dtype), _gain(h, d, dtype), 0.1 * _gain(h, d, dtype)


def _for_scaled_norm_add(n: int, h: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x = _stream(n, h, d, dtype)
    return x, _scalar(0.7, dtype), *_for_layer_norm(n, h, d, dtype)


def _for_ema_square(n: int, h: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    beta, s, g = _for_axpy(n, h, d, dtype)
    return beta, s.square() + 0.1, g


def _for_rms_scale(n: int, h: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return _stream(n, h, d, dtype), _stream(n, h, d, dtype).square() + 0.1


def _for_gram_ema(n: int, h: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return _scalar(0.3, dtype), _gram(n, h, d, dtype), _matrices(n, h, d, dtype)


def _for_newton_schulz(n: int, h: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (_matrices(n, h, d, dtype),)


def _for_inverse_sqrt(n: int, h: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return _matrices(n, h, d, dtype), _gram(n, h, d, dtype)


def _for_orthogonalize(n: int, h: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(4 * h * d, h * d, dtype=dtype),)


def _with_eps(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return partial(op, eps=_EPS)


def _through(scale: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return torch.cat(momentum.axpy_through(scale, v, x), dim=-1)


def _through_reference(scale: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return torch.cat((reference.axpy_reference(scale, v, x), v), dim=-1)


PAIRS: tuple[Pair, ...] = (
    Pair("axpy", momentum.axpy, reference.axpy_reference, _for_axpy),
    Pair("axpy_through", _through, _through_reference, _for_axpy),
    Pair("axpby", momentum.axpby, reference.axpby_reference, _for_axpby),
    Pair(
        "layer_norm",
        _with_eps(layer_norm),
        _with_eps(reference.layer_norm_reference),
        _for_layer_norm,
    ),
    Pair(
        "momentum_norm",
        _with_eps(momentum_norm),
        _with_eps(reference.momentum_norm_reference),
        _for_momentum_norm,
    ),
    Pair(
        "rms_norm",
        _with_eps(rms_norm),
        _with_eps(reference.rms_norm_reference),
        _for_rms_norm,
    ),
    Pair(
        "momentum_rms_norm",
        _with_eps(momentum_rms_norm),
        _with_eps(reference.momentum_rms_norm_reference),
        _for_momentum_rms_norm,
    ),
    Pair(
        "scaled_norm_add",
        _with_eps(momentum.scaled_norm_add),
        _with_eps(reference.scaled_norm_add_reference),
        _for_scaled_norm_add,
    ),
    Pair("ema", moments.ema, reference.ema_reference, _for_axpy),
    Pair("ema_square", moments.ema_square, reference.ema_square_reference, _for_ema_square),
    Pair("rms_scale", moments.rms_scale, reference.rms_scale_reference, _for_rms_scale),
    Pair("gram_ema", gram_ema, reference.gram_ema_reference, _for_gram_ema),
    Pair(
        "newton_schulz",
        newton_schulz,
        reference.newton_schulz_reference,
        _for_newton_schulz,
    ),
    Pair(
        "inverse_sqrt_apply",
        inverse_sqrt_apply,
        reference.inverse_sqrt_apply_reference,
        _for_inverse_sqrt,
    ),
    Pair(
        "orthogonalize",
        orthogonalize,
        reference.orthogonalize_reference,
        _for_orthogonalize,
        differentiable=False,
    ),
)
"""The ops of this package, cheapest first."""
