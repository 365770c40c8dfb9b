r"""Momentum attention: linear attention whose state has heavy-ball momentum (arXiv:2208.00579)."""

from __future__ import annotations

from typing import Any

from polyak.errors import ConfigError
from polyak.nn.attention import choice, flag, positive, register, unit
from polyak.nn.attention._flops import bidirectional_flops, read_flops, walk_flops
from polyak.nn.attention._matrix import MatrixAttention
from polyak.nn.config import ModelConfig
from polyak.nn.context import Context
from polyak.ops import momentum_attention, momentum_attention_step, momentum_attention_with_state


@register("momentum")
class MomentumAttention(MatrixAttention):
    r"""P ← μP − γφ(k)vᵀ, S ← S − P, Z ← Z + φ(k); o = φ(q)ᵀS/(φ(q)·Z + eps).

    S is γ Σ w(i−j+1) φ(k_j)v_jᵀ with w(n) = 1 + μ + … + μⁿ⁻¹: the newest key weighs γ, old ones up
    to γ/(1−μ). Reduction: μ = 0, γ = 1 is linear.

    form=released is what the paper's code trains with: key j weighs γw(T−j+1) for every query, T
    the length of the batch. Its price: up to the last few keys it is linear attention times
    γ/(1−μ), what a token reads depends on how many follow, and tokens cannot be decoded one by one.
    """

    equation = "P ← μP − γkvᵀ, S ← S − P, Z ← Z + k; o = qᵀS/(q·Z + eps)"
    paper = "arXiv:2208.00579"
    mu = unit(0.6, about="μ, momentum along the sequence")
    gamma = positive(1.0, about="γ, step size")
    weighted_normalizer = flag(
        False,
        about="Z weighs keys as S does, so that outputs are averages of values (and γ cancels)",
        needs={
            "normalize": (True,),
            "form": ("exact",),
            "bidirectional": ("two_sided", "read_after_write"),
        },
    )
    form = choice(
        "exact",
        "released",
        about="the recurrence, or what the paper's code trains with, for its price (see below)",
        causal=True,
    )
    bidirectional = choice(
        "two_sided",
        "read_after_write",
        "lra",
        about="what queries read where they see all keys: momentum away from the query on both "
        "sides, the state after the last real key, or as released for the Long Range Arena",
        causal=False,
    )
    whole_sequence = staticmethod(momentum_attention)
    continued = staticmethod(momentum_attention_with_state)
    one_token = staticmethod(momentum_attention_step)

    @property
    def sees_length(self) -> bool:
        """See `Attention.sees_length`."""
        return self.options.get("form") == "released"

    def given(self, context: Context | None) -> dict[str, Any]:
        """See `MatrixAttention.given`.

        Raises:
            ConfigError: there is a cache, and form is `released`.
        """
        form = {"form": self.form} if self.causal else {"bidirectional": self.bidirectional}
        if context is not None and context.cache is not None:
            if self.sees_length:
                raise ConfigError(
                    "attention option form='released' cannot decode token by token: it weighs keys "
                    "by the length of the whole sequence; use form=exact, as the release decodes, "
                    "or passes without a cache"
                )
            form = {}
        return {
            **super().given(context),
            **form,
            "mu": self.coefficient("mu", context),
            "gamma": self.coefficient("gamma", context),
            "weighted_normalizer": self.weighted_normalizer,
        }

    @classmethod
    def flops(cls, config: ModelConfig, tokens: int) -> tuple[int, int] | None:
        """See `Attention.flops`."""
        options = cls.resolve(config.attention_options, causal=config.causal)
        if not config.causal:
            return bidirectional_flops(config, options, tokens)
        return walk_flops(config, options, tokens, momentum=options["form"] == "exact")

    @classmethod
    def decoding_flops(cls, config: ModelConfig, tokens: int) -> int | None:
        """See `Attention.decoding_flops`."""
        return read_flops(config, cls.resolve(config.attention_options, causal=config.causal))
