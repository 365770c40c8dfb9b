"""The norms in front of the oracles and before the head: of the kind that the rules use."""

from __future__ import annotations

from torch import Tensor, nn

from polyak import ops
from polyak.nn.config import ModelConfig
from polyak.rules._norms import LayerNorm, RMSNorm, norm_of


def norm(config: ModelConfig) -> LayerNorm | RMSNorm:
    """A norm of the residual stream's width, of the model's kind, eps and bias."""
    return norm_of(config.norm, config.stream_width, config.norm_eps, config.bias)


def head_norm(config: ModelConfig) -> LayerNorm | RMSNorm:
    """A norm of one head's queries or keys; a bias of keys would not change the softmax."""
    return norm_of(config.norm, config.head_width, config.norm_eps, bias=False)


def gain_norm(config: ModelConfig) -> LayerNorm | RMSNorm:
    """κ ∘ LN(x₀), where a stream starts from x: the norm without its bias, κ at 0.5."""
    made = norm_of(config.norm, config.stream_width, config.norm_eps, bias=False)
    nn.init.constant_(made.weight, 0.5)
    return made


def plain_norm(kind: str, x: Tensor, eps: float) -> Tensor:
    """A norm without parameters, `layer` or `rms`, or with `none` x itself; x is (..., d)."""
    if kind == "layer":
        return ops.layer_norm(x, None, None, eps)
    return ops.rms_norm(x, None, eps) if kind == "rms" else x
