"""RMSProp: the update divided by a running root mean square along depth."""

from __future__ import annotations

from math import log

from torch import Tensor

from polyak.ops import axpy, ema_square, rms_scale
from polyak.rules import Oracle, State, Stream, UpdateRule, Work, positive, register, update_norm
from polyak.rules import unit_interval as unit


@register("rmsprop", architecture="RMSPropFormer", paper="arXiv:2605.24425")
class RMSProp(UpdateRule):
    r"""g = O(x); s ← β₂s + (1−β₂)g²; x ← x + γ LN_u(g/(√s + 10⁻⁸)).

    Reduction: β₂ → 1 keeps s = 1, which is gradient_descent with `update_norm="layer"`.
    """

    equation = "s ← β₂s + (1−β₂)g²; x ← x + γLN(g/(√s + ε))"
    work = Work(passes=9)
    streams = (Stream("s", start="ones"),)
    beta2, gamma = unit(0.5), positive(log(2))
    norm = update_norm()

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        """One step; x and s are (B, T, d)."""
        g = oracle(x)
        s = ema_square(self.beta2, state.s, g)
        return axpy(self.gamma, self.norm(rms_scale(g, s, 1e-8)), x), state.replace(s=s)
