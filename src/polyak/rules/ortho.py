"""Ortho: the update orthogonalised over heads by Newton–Schulz."""

from __future__ import annotations

from math import log

from torch import Tensor

from polyak.ops import axpy, newton_schulz
from polyak.rules import Oracle, State, UpdateRule, Work, positive, register, update_norm
from polyak.rules._cost import newton_schulz_cost
from polyak.rules._heads import merge_heads, split_heads


@register("ortho", architecture="OrthoFormer", paper="arXiv:2605.24425")
class Ortho(UpdateRule):
    r"""x ← x + γ LN_u(NS(O(x))), NS on each token's (heads, head_dim) matrix.

    Reduction: with one head a token's matrix has rank one, NS only rescales it, and (up to
    LayerNorm's eps) this is gradient_descent with `update_norm="layer"`.
    """

    equation = "x ← x + γLN(NS(O(x)))"
    work = Work(passes=2, matrices=newton_schulz_cost)
    gamma = positive(log(2))
    norm = update_norm()

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        """One step; x is (B, T, d), seen by NS as (B, T, H, D)."""
        u = merge_heads(newton_schulz(split_heads(oracle(x), self.num_heads)))
        return axpy(self.gamma, self.norm(u), x), state
