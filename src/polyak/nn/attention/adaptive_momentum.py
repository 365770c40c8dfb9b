r"""Adaptive momentum attention: momentum set by how much tokens change (arXiv:2208.00579)."""

from __future__ import annotations

from typing import Any

from polyak.nn.attention import choice, positive, register
from polyak.nn.attention._flops import adaptation_flops, read_flops, walk_flops
from polyak.nn.attention._matrix import MatrixAttention
from polyak.nn.config import ModelConfig
from polyak.nn.context import Context
from polyak.ops import (
    adaptive_momentum_attention,
    adaptive_momentum_attention_step,
    adaptive_momentum_attention_with_state,
)


@register("adaptive_momentum")
class AdaptiveMomentumAttention(MatrixAttention):
    r"""Momentum attention with μ = min((1 − √(γ|U − U before|/|P|))², 0.9999), U = φ(k)vᵀ.

    There is one μ for each token and head. The first step is P = −U, as released
    (first_step=unit), or −γU (gamma), with which γ only scales the numerator. Causal only.
    """

    equation = "μ = (1 − √(γ‖U − U⁻‖/‖P‖))², P ← μP − γU, S ← S − P, Z ← Z + k; o = qᵀS/(q·Z + eps)"
    paper = "arXiv:2208.00579"
    causal_only = True
    gamma = positive(1.0, about="γ, step size")
    first_step = choice("unit", "gamma", about="the first step's size: 1, as released, or γ")
    whole_sequence = staticmethod(adaptive_momentum_attention)
    continued = staticmethod(adaptive_momentum_attention_with_state)
    one_token = staticmethod(adaptive_momentum_attention_step)

    def given(self, context: Context | None) -> dict[str, Any]:
        """See `MatrixAttention.given`."""
        return {
            **super().given(context),
            "gamma": self.coefficient("gamma", context),
            "first_step": self.first_step,
        }

    @classmethod
    def flops(cls, config: ModelConfig, tokens: int) -> tuple[int, int] | None:
        """See `Attention.flops`."""
        options = cls.resolve(config.attention_options, causal=True)
        walk = walk_flops(config, options, tokens, momentum=True)
        adaptation = adaptation_flops(config, options, tokens)
        return walk[0] + adaptation[0], walk[1] + adaptation[1]

    @classmethod
    def decoding_flops(cls, config: ModelConfig, tokens: int) -> int | None:
        """See `Attention.decoding_flops`."""
        return read_flops(config, cls.resolve(config.attention_options, causal=config.causal))
