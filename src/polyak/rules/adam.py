"""Adam: momentum divided by a running root mean square along depth."""

from __future__ import annotations

from math import log

from torch import Tensor

from polyak.ops import axpy, ema, ema_square, rms_scale
from polyak.rules import Oracle, State, Stream, UpdateRule, Work, positive, register, update_norm
from polyak.rules import unit_interval as unit


@register("adam", architecture="AdamFormer", paper="arXiv:2605.24425")
class Adam(UpdateRule):
    r"""g = O(x); m ← β₁m + (1−β₁)g; s ← β₂s + (1−β₂)g²; x ← x + γ LN_u(m/(√s + 10⁻⁸)).

    No bias correction, as released. Reduction: β₁ → 0 is rmsprop.
    """

    equation = "m ← β₁m + (1−β₁)g; s ← β₂s + (1−β₂)g²; x ← x + γLN(m/(√s + ε))"
    work = Work(passes=12)
    streams = (Stream("m", start="embedding"), Stream("s", start="ones"))
    beta1, beta2, gamma = unit(0.5), unit(0.5), positive(log(2))
    norm = update_norm()

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        """One step; x, m and s are (B, T, d)."""
        g = oracle(x)
        m, s = ema(self.beta1, state.m, g), ema_square(self.beta2, state.s, g)
        return axpy(self.gamma, self.norm(rms_scale(m, s, 1e-8)), x), state.replace(m=m, s=s)
