r"""Sharpness-aware minimisation (SAM, Foret et al., arXiv:2010.01412).

The gradient that the optimizer gets is taken not at the weights w but at w + ρ·g/‖g‖, where g is
the gradient at w and ‖g‖ one L2 norm over all parameters. A step of the loop is

    backward of every micro-batch               # g, averaged over processes
    with perturbed(parameters, rho):
        backward of the same micro-batches      # the gradient at w + ρ·g/‖g‖
    clip; optimizer step                        # at w again

Both gradients must be means over the whole global batch: under DDP and FSDP2 the first backward
must be synchronised too, and then every process moves its weights alike. `perturbed` draws no
random numbers; dropout in the second pass goes on drawing where the first one stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from polyak.training.config.training import TrainingConfig
from polyak.training.dtensors import is_sharded
from polyak.training.schedules import in_decay


def uses_sam(step: int, config: TrainingConfig) -> bool:
    """Whether `step` (from 0) takes the second gradient.

    `sam="off"`: never; `"always"`: every step; `"decay"`: in the decay of `wsd` only (SAWD).
    """
    return config.sam == "always" or (config.sam == "decay" and in_decay(step, config))


@contextmanager
def perturbed(parameters: Iterable[nn.Parameter], rho: float) -> Iterator[float]:
    r"""Weights at w + ρ·g/‖g‖ inside the context and at w, bit for bit, after it.

    On entry the parameters' gradients are g; they are cleared, so that inside the context new ones
    are accumulated. On exit, also by an exception, the weights are restored from copies; the
    gradients are left as they are. Tied weights count once; parameters without a gradient stay.
    A zero gradient has no direction: the weights are then not moved and the second gradient is
    taken at w itself. Nor has one whose norm is not finite: then weights are not moved and
    gradients not cleared, so that they stay non-finite, whatever is added, and clipping sees it.

    Weights are changed in place, so optimizer state, DDP buckets and FSDP2 shards stay attached.
    Costs one copy of the weights (of the local shards, under FSDP2).

    Args:
        parameters: all trained parameters, plain or DTensor.
        rho: ρ, the length of the step over all parameters together.

    Yields:
        ‖g‖ over all parameters and processes.
    """
    moving = [p for p in {id(p): p for p in parameters}.values() if p.grad is not None]
    norm = gradient_norm(moving)
    if not math.isfinite(norm):
        yield norm
        return
    with torch.no_grad():
        kept = [parameter.detach().clone() for parameter in moving]
    try:
        with torch.no_grad():
            for parameter in moving:
                gradient, parameter.grad = parameter.grad, None
                if norm > 0:
                    assert gradient is not None
                    parameter.add_(gradient, alpha=rho / norm)
        yield norm
    finally:
        with torch.no_grad():
            for parameter, weight in zip(moving, kept, strict=True):
                parameter.copy_(weight)


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """L2 norm of all gradients together, plain and DTensor; 0 where there are none.

    With DTensors every process must call it, and all get the same number.
    """
    plain: list[Tensor] = []
    sharded: dict[Any, list[Tensor]] = {}
    for parameter in {id(p): p for p in parameters}.values():
        gradient = parameter.grad
        if gradient is None:
            continue
        if is_sharded(gradient):
            # one operation takes tensors of one mesh only
            sharded.setdefault(gradient.device_mesh, []).append(gradient)
        else:
            plain.append(gradient)
    total = float(torch.nn.utils.get_total_norm(plain)) if plain else 0.0
    for gradients in sharded.values():
        norm = torch.nn.utils.get_total_norm(gradients)
        assert is_sharded(norm)
        total = math.hypot(total, float(norm.full_tensor()))
    return total
