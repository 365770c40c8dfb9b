"""Nesterov: the oracle looks ahead along the velocity."""

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


@register("nesterov", architecture="YuriiFormer", paper="arXiv:2601.23236")
class Nesterov(UpdateRule):
    r"""v ← LN(βv + γ O(x + μv)); x ← x + v.

    Reduction: μ → 0 is heavy_ball.
    """

    equation = "v ← LN(βv + γO(x + μv)); x ← x + v"
    work = Work(passes=6)
    streams = (Stream("v", start="embedding"),)
    mu, beta, gamma = unit(0.5), unit(0.5), positive(log(2))
    norm = state_norm()
    descent = descends_at(state_norm="none", mu=0.0, beta=0.0, gamma=1.0)

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        """One step; x and v are (B, T, d)."""
        ahead, v = axpy_through(self.mu, state.v, x)  # (x + μv, v)
        v = self.norm.combine(self.beta, v, self.gamma, oracle(ahead))
        return x + v, state.replace(v=v)
