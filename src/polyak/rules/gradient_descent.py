"""Gradient descent: the ordinary pre-norm Transformer."""

from __future__ import annotations

from math import log

from torch import Tensor

from polyak.ops import axpy
from polyak.rules import Oracle, State, UpdateRule, Work, positive, register, update_norm


@register("gradient_descent", architecture="Vanilla", paper="arXiv:2605.24425")
class GradientDescent(UpdateRule):
    r"""x ← x + O(x), the residual connection as it is.

    With `update_norm="layer"`: x ← x + γ LN_u(O(x)), the wrapper that the preconditioned rules
    put around their update, without a preconditioner. It is the control that tells how much of
    their effect the wrapper alone explains.
    """

    equation = "x ← x + O(x)"
    work = Work(passes=1)
    norm = update_norm(default="none")
    gamma = positive(log(2), requires="update_norm")

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        """One step; x is (B, T, d), there is no state."""
        if self.options["update_norm"] == "none":
            return x + oracle(x), state
        return axpy(self.gamma, self.norm(oracle(x)), x), state
