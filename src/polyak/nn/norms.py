"""The norms in front of the oracles and before the head: of the kind that the rules use."""

from __future__ import annotations

from polyak.nn.config import ModelConfig
from polyak.rules._norms import LayerNorm, RMSNorm, norm_of


def norm(config: ModelConfig) -> LayerNorm | RMSNorm:
    """A norm of the model's width, kind, eps and bias."""
    return norm_of(config.norm, config.d_model, config.norm_eps, config.bias)


def head_norm(config: ModelConfig) -> LayerNorm | RMSNorm:
    """A norm of one head's queries or keys; a bias of keys would not change the softmax."""
    return norm_of(config.norm, config.head_width, config.norm_eps, bias=False)
