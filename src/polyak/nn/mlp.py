"""The MLP as an oracle: with the pre-norm in front of it."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from polyak.nn.config import Activation, ModelConfig
from polyak.nn.norms import norm

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


class MLP(nn.Module):
    """down(act(up(LN x))), or down(act(gate(LN x)) · up(LN x)) where the MLP is gated."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, width = config.d_model, config.hidden_width
        self.dropout = config.dropout
        self.activation = ACTIVATIONS[config.activation]
        self.norm = norm(config)
        self.gate = nn.Linear(d, width, bias=config.bias) if config.mlp == "gated" else None
        self.up = nn.Linear(d, width, bias=config.bias)
        self.down = nn.Linear(width, d, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) → (B, T, d)."""
        x = self.norm(x)
        if self.gate is None:
            y = self.activation(self.up(x))
        else:
            y = self.activation(self.gate(x)) * self.up(x)
        return F.dropout(self.down(y), self.dropout, self.training)
