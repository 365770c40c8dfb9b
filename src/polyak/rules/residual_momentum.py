"""Residual momentum: the Momentum Transformer's heavy ball, from rest and without a norm."""

from __future__ import annotations

from torch import Tensor

from polyak.ops import axpy
from polyak.rules import (
    Oracle,
    State,
    Stream,
    UpdateRule,
    Work,
    descends_at,
    positive,
    register,
)
from polyak.rules import unit_interval as unit


@register("residual_momentum", architecture="Momentum Transformer", paper="arXiv:2208.00579")
class ResidualMomentum(UpdateRule):
    r"""v ← μv − O(x); x ← x − sv, v₀ = 0.

    μ and s are fixed as in the paper's copy task, where both are 0.99 (its images have μ = 0.1 and
    s = 0.99 or 0.9); `frozen="none"` learns them. The paper steps so on attention alone, as in
    `residual_momentum@attention+gradient_descent@mlp`.

    Reduction: μ → 0 and s = 1 is gradient_descent.
    """

    equation = "v ← μv − O(x); x ← x − sv"
    work = Work(passes=4)
    streams = (Stream("v", start="zeros"),)
    mu, s = unit(0.99), positive(0.99)
    fixed = ("mu", "s")
    gain = "s"
    descent = descends_at(mu=0.0, s=1.0, frozen="none")

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        """One step; x and v are (B, T, d)."""
        v = self.mu * state.v - oracle(x)
        return axpy(-self.s, v, x), state.replace(v=v)
