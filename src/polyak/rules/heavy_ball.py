"""Heavy ball: Polyak's momentum along depth."""

from __future__ import annotations

from math import log

from torch import Tensor

from polyak.rules import (
    Oracle,
    State,
    Stream,
    UpdateRule,
    Work,
    descends_at,
    positive,
    register,
    state_norm,
)
from polyak.rules import unit_interval as unit


@register("heavy_ball", architecture="HBFormer", paper="arXiv:2605.24425")
class HeavyBall(UpdateRule):
    r"""v ← LN(βv + γ O(x)); x ← x + v.

    Reduction: with `state_norm="none"`, β → 0 and γ = 1 it is gradient_descent.
    """

    equation = "v ← LN(βv + γO(x)); x ← x + v"
    work = Work(passes=4)
    streams = (Stream("v", start="embedding"),)
    beta, gamma = unit(0.5), positive(log(2))
    norm = state_norm()
    descent = descends_at(state_norm="none", beta=0.0, gamma=1.0)

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        """One step; x and v are (B, T, d)."""
        v = self.norm.combine(self.beta, state.v, self.gamma, oracle(x))
        return x + v, state.replace(v=v)
