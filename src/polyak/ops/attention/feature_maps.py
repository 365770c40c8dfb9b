"""Feature maps φ of linear attention, elementwise on queries and keys, each with its slope.

The slope is a function of φ's own value, so that nothing else has to be kept for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from polyak.errors import unknown
from polyak.ops.autograd import apply


class FeatureMap(NamedTuple):
    """φ, and φ' as a function of y = φ(x)."""

    apply: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def _elu1(x: Tensor) -> Tensor:
    # not elu(x) + 1, which loses what is small beside 1: far below 0 this is eˣ
    return x.clamp(max=0).exp() + x.relu()


FEATURE_MAPS: dict[str, FeatureMap] = {
    "elu1": FeatureMap(_elu1, lambda y: y.clamp(max=1)),
    "relu": FeatureMap(F.relu, lambda y: (y > 0).to(y.dtype)),
    "identity": FeatureMap(lambda x: x, torch.ones_like),
    "softplus": FeatureMap(
        lambda x: torch.logaddexp(x, torch.zeros_like(x)), lambda y: -torch.expm1(-y)
    ),
}
"""elu1: elu(x) + 1 (the Momentum Transformer's); softplus: ln(1 + eˣ)."""


def feature_map_named(name: str) -> FeatureMap:
    """The feature map of that name.

    Raises:
        UnknownNameError: there is none; the message names the nearest.
    """
    if name not in FEATURE_MAPS:
        raise unknown("feature_map", name, FEATURE_MAPS)
    return FEATURE_MAPS[name]


def mapped(x: Tensor, name: str) -> Tensor:
    """φ(x), with nothing but itself kept for the gradient."""
    result: Tensor = apply(_Map, x, name)
    return result


class _Map(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        y = FEATURE_MAPS[name].apply(x)
        y = y.view_as(y) if y is x else y
        ctx.save_for_backward(y)
        ctx.name = name
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors  # its own graph serves a gradient of this gradient
        return grad * FEATURE_MAPS[ctx.name].slope(y), None
