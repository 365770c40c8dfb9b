"""AdamW: Adam with decoupled weight decay of the residual stream."""

from __future__ import annotations

from torch import Tensor

from polyak.rules import Oracle, State, Work, register
from polyak.rules import unit_interval as unit
from polyak.rules.adam import Adam


@register("adamw", architecture="AdamWFormer", paper="arXiv:2605.24425")
class AdamW(Adam):
    r"""m and s as adam; x ← (1−λ)x + γ LN_u(m/(√s + 10⁻⁸)).

    Reduction: λ → 0 is adam.
    """

    equation = "m, s as adam; x ← (1−λ)x + γLN(m/(√s + ε))"
    work = Work(passes=13)
    lambda_ = unit(raw=-5.0, shape=())

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        """One step; x, m and s are (B, T, d)."""
        # the oracle sees x before it decays
        return super().step((1 - self.lambda_) * x, state, lambda _: oracle(x))
