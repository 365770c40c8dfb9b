"""The MLP as an oracle: with the norm in front of it, in pre-norm models."""

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
    """down(act(up(LN x))), or down(act(gate(LN x)) · up(LN x)) where the MLP is gated.

    In a post-norm model it sees x itself, and `norm` is applied after the step.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, width = config.stream_width, config.hidden_width
        self.dropout, self.activation_dropout = config.dropout, config.activation_dropout
        self.pre_norm = config.norm_position == "pre"
        self.activation = ACTIVATIONS[config.activation]
        self.norm = norm(config)
        self.gate = nn.Linear(d, width, bias=config.bias) if config.mlp == "gated" else None
        self.up = nn.Linear(d, width, bias=config.bias)
        self.down = nn.Linear(width, d, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) → (B, T, d)."""
        if self.pre_norm:
            x = self.norm(x)
        if self.gate is None:
            y = self.activation(self.up(x))
        else:
            y = self.activation(self.gate(x)) * self.up(x)
        y = F.dropout(y, self.activation_dropout, self.training)
        return F.dropout(self.down(y), self.dropout, self.training)
