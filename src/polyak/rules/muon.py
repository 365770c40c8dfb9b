"""Muon: momentum orthogonalised over heads by Newton–Schulz."""

from __future__ import annotations

from math import log

from torch import Tensor

from polyak.ops import axpy, ema, newton_schulz
from polyak.rules import Oracle, State, Stream, UpdateRule, Work, positive, register, update_norm
from polyak.rules import unit_interval as unit
from polyak.rules._cost import newton_schulz_cost
from polyak.rules._heads import merge_heads, split_heads


@register("muon", architecture="MuonFormer", paper="arXiv:2605.24425")
class Muon(UpdateRule):
    r"""m ← βm + (1−β)O(x); x ← x + γ LN_u(NS(m)), NS on each token's (heads, head_dim) matrix.

    Reduction: β → 0 is ortho.
    """

    equation = "m ← βm + (1−β)O(x); x ← x + γLN(NS(m))"
    work = Work(passes=5, matrices=newton_schulz_cost)
    streams = (Stream("m", start="embedding"),)
    beta, gamma = unit(0.5), positive(log(2))
    norm = update_norm()

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        """One step; x and m are (B, T, d), m seen by NS as (B, T, H, D)."""
        m = ema(self.beta, state.m, oracle(x))
        u = merge_heads(newton_schulz(split_heads(m, self.num_heads)))
        return axpy(self.gamma, self.norm(u), x), state.replace(m=m)
