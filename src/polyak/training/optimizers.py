r"""Muon for the matrices inside blocks, AdamW for the rest, in the released groups."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

from polyak.nn.transformer import Transformer
from polyak.ops import orthogonalize
from polyak.training.config import TrainingConfig


class Muon(torch.optim.Optimizer):
    r"""Momentum orthogonalised by Newton–Schulz, for 2-D weights.

    M ← μM + (1−μ)G; U = μM + (1−μ)G (Nesterov); W ← W − η √max(1, rows/cols) NS₅(U),

    as `torch.optim.Muon` with its default adjustment and no weight decay, but with NS₅ in the
    weights' own precision instead of bfloat16 and one batched call for each shape.

    Args:
        params: 2-D parameters.
        lr: η.
        momentum: μ.

    Raises:
        ValueError: a parameter is not 2-D.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 0.02, momentum: float = 0.95
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
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, weights in by_shape.items():
                updates = torch.stack([self._nesterov(weight, momentum) for weight in weights])
                rate = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for weight, update in zip(weights, orthogonalize(updates), strict=True):
                    weight.sub_(update, alpha=rate)
        return loss

    def _nesterov(self, weight: nn.Parameter, momentum: float) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        gradient = weight.grad
        assert gradient is not None
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum)


def parameter_groups(model: Transformer) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters by kind, each exactly once.

    `matrices`: 2-D weights inside blocks (Muon). `embeddings`: token, position and stream tables
    and an untied output (AdamW with decay). `norms`: LayerNorms, biases, and whatever else a
    user's rule learns that is no matrix. `scalars`: the rules'.
    """
    groups: dict[str, list[nn.Parameter]] = {
        "matrices": [],
        "embeddings": [],
        "norms": [],
        "scalars": [],
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("_raw"):
            groups["scalars"].append(parameter)
        elif not name.startswith("blocks.") and parameter.ndim == 2:
            groups["embeddings"].append(parameter)
        elif parameter.ndim == 2:
            groups["matrices"].append(parameter)
        else:
            groups["norms"].append(parameter)
    return groups


class Optimizers:
    """Muon and AdamW stepped as one, with the schedule's factor applied to every rate.

    Args:
        model: the model to train.
        config: rates, momenta and decay.
    """

    def __init__(self, model: Transformer, config: TrainingConfig) -> None:
        groups = parameter_groups(model)
        adam_groups: list[dict[str, Any]] = [
            {
                "params": groups["embeddings"],
                "lr": config.adam_lr,
                "weight_decay": config.weight_decay,
            },
            {"params": groups["norms"], "lr": config.adam_lr, "weight_decay": 0.0},
            {"params": groups["scalars"], "lr": config.scalar_lr, "weight_decay": 0.0},
        ]
        self.muon = Muon(groups["matrices"], lr=config.muon_lr, momentum=config.muon_momentum)
        self.adam = torch.optim.AdamW(
            [group for group in adam_groups if group["params"]], betas=config.adam_betas, fused=True
        )
        self.all: tuple[torch.optim.Optimizer, ...] = (self.muon, self.adam)
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["peak"] = group["lr"]

    def step(self, factor: float) -> None:
        """Update every weight with rates at `factor` times their peak, and clear gradients."""
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def cosine_with_warmup(step: int, config: TrainingConfig) -> float:
    r"""Factor on every peak rate at `step` (0-based).

    step/w during the w = warmup·steps first steps (0 at step 0), then
    f + (1−f)·½(1 + cos(π (step−w)/(steps−w))) with f = `final_rate`.
    """
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    floor = config.final_rate
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
