"""Adaptive residual momentum: a coefficient for each token, as in conjugate gradients."""

from __future__ import annotations

from torch import Tensor

from polyak.ops import axpy
from polyak.rules import Oracle, State, Stream, UpdateRule, choice, positive, register
from polyak.rules._conjugate import KINDS, coefficient


@register(
    "adaptive_residual_momentum",
    architecture="Adaptive Momentum Transformer",
    paper="arXiv:2208.00579",
)
class AdaptiveResidualMomentum(UpdateRule):
    r"""g = O(x); v ← μv − g; x ← x − sv, with μ of each token from g, the g before and v.

    How μ follows is the option `kind` (`polyak.rules._conjugate`): `nc`, the paper's, or those of
    conjugate gradients, `fr`, `pr`, `hs`, `dy`. Gradients flow through it. v starts at zeros, so
    that the first step is x + sg. s is fixed as in the paper; `frozen="none"` learns it.
    """

    equation = "g = O(x); μ = (1 − √(‖g − g₋‖/‖v‖))², or by kind; v ← μv − g; x ← x − sv"
    streams = (Stream("v", start="zeros"), Stream("g_prev", start="zeros"))
    s = positive(0.99)
    fixed = ("s",)
    gain = "s"
    kind = choice(*KINDS)

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        """One step; x, v and g_prev are (B, T, d)."""
        g = oracle(x).to(x.dtype)  # under autocast, the stream stays what it is
        v = coefficient(self.kind, g, state.g_prev, state.v) * state.v - g
        return axpy(-self.s, v, x), state.replace(v=v, g_prev=g)
