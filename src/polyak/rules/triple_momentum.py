"""Triple momentum: Nesterov with a learned step along the velocity."""

from __future__ import annotations

from math import log

from torch import Tensor

from polyak.ops import axpy_through
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


@register("triple_momentum", architecture="TMMFormer", paper="arXiv:2605.24425")
class TripleMomentum(UpdateRule):
    r"""v ← LN(βv + γ O(x + μv)); x ← x + νv.

    Reduction: ν = 1 is nesterov. At LayerNorm eps 0 it is nesterov with μ allowed past 1.
    """

    equation = "v ← LN(βv + γO(x + μv)); x ← x + νv"
    work = Work(passes=7)
    streams = (Stream("v", start="embedding"),)
    mu, beta, gamma, nu = unit(0.5), unit(0.5), positive(log(2)), positive(1.0)
    norm = state_norm()
    descent = descends_at(state_norm="none", mu=0.0, beta=0.0, gamma=1.0, nu=1.0)

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        """One step; x and v are (B, T, d)."""
        ahead, v = axpy_through(self.mu, state.v, x)  # (x + μv, v)
        v = self.norm.combine(self.beta, v, self.gamma, oracle(ahead))
        x, v = axpy_through(self.nu, v, x)
        return x, state.replace(v=v)
