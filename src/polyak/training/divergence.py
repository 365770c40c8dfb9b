"""Noticing that training goes wrong: numbers that are not finite, and spikes of the loss."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

import torch
from torch import nn

SPIKE_WINDOW = 64
SPIKE_LEAST = 16
SPIKE_DEVIATIONS = 8.0
SPIKE_RISE = 0.1


class SpikeDetector:
    """Tells a spike: a loss far above the recent ones.

    A loss is a spike when it exceeds the median of the last 64 by more than 8 of their robust
    standard deviations (1.4826 × the median absolute deviation) and by more than 0.1 nats.
    Fewer than 16 losses tell nothing yet.

    Attributes:
        recent: the last losses, oldest first; all there is to save.
    """

    def __init__(self, recent: Iterable[float] = ()) -> None:
        self.recent = deque(recent, maxlen=SPIKE_WINDOW)

    def see(self, loss: float) -> float | None:
        """Take in a finite loss; returns the median it towers over if it is a spike, else None."""
        assert math.isfinite(loss)
        usual = None
        if len(self.recent) >= SPIKE_LEAST:
            median = statistics.median(self.recent)
            spread = 1.4826 * statistics.median(abs(value - median) for value in self.recent)
            if loss - median > max(SPIKE_DEVIATIONS * spread, SPIKE_RISE):
                usual = median
        self.recent.append(loss)
        return usual


def first_bad_parameter(model: nn.Module) -> str | None:
    """What is not finite first, in the model's order: a weight, else a gradient; None if nothing.

    With sharded parameters each process looks at its own part.
    """
    parameters = list(model.named_parameters())
    for name, parameter in parameters:
        if not _finite(parameter):
            return f"weight {name}"
    for name, parameter in parameters:
        if parameter.grad is not None and not _finite(parameter.grad):
            return f"gradient of {name}"
    return None


def _finite(tensor: torch.Tensor) -> bool:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return bool(torch.isfinite(local).all())
