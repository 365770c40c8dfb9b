r"""The Muon optimizer, on plain and on sharded weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

from polyak.ops import orthogonalize
from polyak.training.dtensors import is_sharded, shard_like


class Muon(torch.optim.Optimizer):
    r"""Momentum orthogonalised by Newton–Schulz, for 2-D weights.

    M ← μM + (1−μ)G; U = μM + (1−μ)G (Nesterov); W ← W − η √max(1, rows/cols) NS₅(U),

    as `torch.optim.Muon` with its default adjustment and no weight decay, but with NS₅ in the
    weights' own precision instead of bfloat16 and one batched call for each shape.

    Sharded weights (DTensor, FSDP2) give the same: NS₅ needs the whole matrix, so each U is
    gathered in turn, every process orthogonalises it, and keeps its own shard of the result.

    Args:
        params: 2-D parameters, or groups of them.
        lr: η.
        momentum: μ.

    Raises:
        ValueError: a parameter is not 2-D.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon takes 2-D weights, got shape {tuple(parameter.shape)}")

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            momentum = group["momentum"]
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if is_sharded(parameter):
                    # one at a time: never more than one whole matrix in memory
                    whole = orthogonalize(self._nesterov(parameter, momentum).full_tensor())
                    update = shard_like(whole, parameter)
                    parameter.sub_(update, alpha=group["lr"] * self._adjustment(parameter.shape))
                else:
                    by_shape[parameter.shape].append(parameter)
            for shape, weights in by_shape.items():
                updates = torch.stack([self._nesterov(weight, momentum) for weight in weights])
                rate = group["lr"] * self._adjustment(shape)
                for weight, update in zip(weights, orthogonalize(updates), strict=True):
                    weight.sub_(update, alpha=rate)
        return loss

    @staticmethod
    def _adjustment(shape: torch.Size) -> float:
        return math.sqrt(max(1.0, shape[0] / shape[1]))

    def _nesterov(self, weight: Tensor, momentum: float) -> Any:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        gradient = weight.grad
        assert gradient is not None
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum)
