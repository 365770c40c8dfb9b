"""SOAP: momentum preconditioned by a running second-moment matrix over head dimensions."""

from __future__ import annotations

from math import log

from torch import Tensor

from polyak.ops import axpy, ema, gram_ema, inverse_sqrt_apply
from polyak.rules import Oracle, State, Stream, UpdateRule, Work, positive, register, update_norm
from polyak.rules import unit_interval as unit
from polyak.rules._cost import shampoo_cost
from polyak.rules._heads import merge_heads, split_heads


@register("soap", architecture="SOAPFormer", paper="arXiv:2605.24425")
class SOAP(UpdateRule):
    r"""R as shampoo; m ← β₁m + (1−β₁)g; x ← x + γ LN_u(M R^{−1/2}), M = m as (H, D).

    Reduction: β₁ → 0 is shampoo.
    """

    equation = "R as shampoo; m ← β₁m + (1−β₁)g; x ← x + γLN(M R^(−½))"
    work = Work(passes=5, matrices=shampoo_cost)
    streams = (Stream("m", start="embedding"), Stream("R", start="identity"))
    beta1, betaR, gamma = unit(0.5), unit(0.5), positive(log(2))
    norm = update_norm()

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        """One step; x and m are (B, T, d), R is (B, T, D, D)."""
        g = oracle(x)
        r = gram_ema(self.betaR, state.R, split_heads(g, self.num_heads))
        m = ema(self.beta1, state.m, g)
        u = merge_heads(inverse_sqrt_apply(split_heads(m, self.num_heads), r))
        return axpy(self.gamma, self.norm(u), x), state.replace(m=m, R=r)
