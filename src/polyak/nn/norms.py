"""The norm in front of the oracles and before the head: the same LayerNorm the rules use."""

from __future__ import annotations

from polyak.nn.config import ModelConfig
from polyak.rules._declarations import LayerNorm


def norm(config: ModelConfig) -> LayerNorm:
    """A LayerNorm of the model's width, eps and bias."""
    return LayerNorm(config.d_model, config.norm_eps, config.bias)
