r"""Linear attention: a sum over keys instead of a softmax (arXiv:2006.16236)."""

from __future__ import annotations

from typing import Any

from polyak.nn.attention import choice, register
from polyak.nn.attention._flops import bidirectional_flops, read_flops, walk_flops
from polyak.nn.attention._matrix import MatrixAttention
from polyak.nn.config import ModelConfig
from polyak.nn.context import Context
from polyak.ops import linear_attention, linear_attention_step, linear_attention_with_state


@register("linear")
class LinearAttention(MatrixAttention):
    r"""S ← S + φ(k)vᵀ, Z ← Z + φ(k); o = φ(q)ᵀS/(φ(q)·Z + eps).

    In a model that is not causal, every query reads the sums over all keys.
    """

    equation = "S ← S + kvᵀ, Z ← Z + k; o = qᵀS/(q·Z + eps)"
    paper = "arXiv:2006.16236"
    bidirectional = choice(
        "two_sided",
        "lra",
        about="what queries read where they see all keys; `lra` divides by √T instead of q·Z, T "
        "with padding, as released for the Long Range Arena",
        causal=False,
    )
    whole_sequence = staticmethod(linear_attention)
    continued = staticmethod(linear_attention_with_state)
    one_token = staticmethod(linear_attention_step)

    def given(self, context: Context | None) -> dict[str, Any]:
        """See `MatrixAttention.given`."""
        found = super().given(context)
        return found if self.causal else {**found, "bidirectional": self.bidirectional}

    @classmethod
    def flops(cls, config: ModelConfig, tokens: int) -> tuple[int, int] | None:
        """See `Attention.flops`."""
        options = cls.resolve(config.attention_options, causal=config.causal)
        if not config.causal:
            return bidirectional_flops(config, options, tokens)
        return walk_flops(config, options, tokens, momentum=False)

    @classmethod
    def decoding_flops(cls, config: ModelConfig, tokens: int) -> int | None:
        """See `Attention.decoding_flops`."""
        return read_flops(config, cls.resolve(config.attention_options, causal=config.causal))
