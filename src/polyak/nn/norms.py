"""The norms in front of the oracles and before the head: of the kind that the rules use."""

from __future__ import annotations

from polyak.nn.config import ModelConfig
from polyak.rules._declarations import LayerNorm, RMSNorm, norm_of


def norm(config: ModelConfig, width: int | None = None) -> LayerNorm | RMSNorm:
    """A norm of the model's kind, eps and bias; its width is d unless given."""
    width = config.d_model if width is None else width
    return norm_of(config.norm, width, config.norm_eps, config.bias)
