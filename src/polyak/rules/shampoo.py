"""Shampoo: the update preconditioned by a running second-moment matrix over head dimensions."""

from __future__ import annotations

from math import log

from torch import Tensor

from polyak.ops import axpy, gram_ema, inverse_sqrt_apply
from polyak.rules import Oracle, State, Stream, UpdateRule, Work, positive, register, update_norm
from polyak.rules import unit_interval as unit
from polyak.rules._cost import shampoo_cost
from polyak.rules._heads import merge_heads, split_heads


@register("shampoo", architecture="ShampooFormer", paper="arXiv:2605.24425")
class Shampoo(UpdateRule):
    r"""G = O(x) as (H, D); R ← β_R R + (1−β_R) GᵀG; x ← x + γ LN_u(G R^{−1/2}).

    R^{−1/2} is the released ten-iteration polynomial, not the converged inverse root.
    Reduction: β_R → 1 keeps R = I, which is gradient_descent with `update_norm="layer"`.
    """

    equation = "R ← βR + (1−β)GᵀG; x ← x + γLN(G R^(−½))"
    work = Work(passes=2, matrices=shampoo_cost)
    streams = (Stream("R", start="identity"),)
    betaR, gamma = unit(0.5), positive(log(2))
    norm = update_norm()

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        """One step; x is (B, T, d), R is (B, T, D, D)."""
        g = split_heads(oracle(x), self.num_heads)
        r = gram_ema(self.betaR, state.R, g)
        u = merge_heads(inverse_sqrt_apply(g, r))
        return axpy(self.gamma, self.norm(u), x), state.replace(R=r)
