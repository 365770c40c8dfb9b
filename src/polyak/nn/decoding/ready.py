"""Rules and norms made ready to be used once for every token: values instead of modules."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from polyak import ops
from polyak.nn.attention import Attention
from polyak.nn.mlp import MLP
from polyak.rules import UpdateRule
from polyak.rules._norms import LayerNorm, RMSNorm


def ready_rule(rule: UpdateRule) -> UpdateRule:
    """A rule that computes the same, its scalars and norms being values (see `Scalar.__get__`)."""
    ready: UpdateRule = object.__new__(type(rule))
    ready.__dict__.update(rule.__dict__)
    for name in type(rule).present_scalars(rule.options):
        ready.__dict__[name] = getattr(rule, name)
    for name in type(rule).norms:
        module = getattr(rule, name)
        known = type(module) in (LayerNorm, RMSNorm)
        ready.__dict__[name] = ready_norm(module) if known else module
    return ready


class _ReadyNorm:
    """A LayerNorm's two methods without a module around them."""

    def __init__(self, module: LayerNorm | RMSNorm) -> None:
        self._module, self._shape = module, module.weight.shape
        self.weight, self.bias, self.eps = module.weight, getattr(module, "bias", None), module.eps
        self._beta: Tensor | None = None
        self._gamma: Tensor | None = None
        self._ratio, self._eps = 0.0, 0.0

    def __call__(self, u: Tensor) -> Tensor:
        return torch.layer_norm(u, self._shape, self.weight, self.bias, self.eps)

    def combine(self, beta: Tensor, v: Tensor, gamma: Tensor, g: Tensor) -> Tensor:
        """As `ops.momentum_norm` does where β and γ are numbers; they are read once."""
        if beta is not self._beta or gamma is not self._gamma:
            if not ops.numbers_serve(beta, v, gamma, g):
                return self._module.combine(beta, v, gamma, g)
            self._beta, self._gamma = beta, gamma
            self._ratio, self._eps = float(beta) / float(gamma), self.eps / float(gamma) ** 2
        return self._of_sum(torch.add(g, v, alpha=self._ratio))

    def _of_sum(self, u: Tensor) -> Tensor:
        return torch.layer_norm(u, self._shape, self.weight, self.bias, self._eps)


class _ReadyRMSNorm(_ReadyNorm):
    def __call__(self, u: Tensor) -> Tensor:
        return torch.rms_norm(u, self._shape, self.weight, self.eps)

    def _of_sum(self, u: Tensor) -> Tensor:
        return torch.rms_norm(u, self._shape, self.weight, self._eps)


def pre_norm(module: Attention | MLP) -> Callable[[Tensor], Tensor]:
    """What an oracle does to its input first."""
    return ready_norm(module.norm) if module.pre_norm else lambda x: x


def ready_norm(module: nn.Module) -> _ReadyNorm:
    """A LayerNorm or RMSNorm without a module around it."""
    assert isinstance(module, LayerNorm | RMSNorm), "see OneToken.supports"
    return _ReadyRMSNorm(module) if isinstance(module, RMSNorm) else _ReadyNorm(module)
