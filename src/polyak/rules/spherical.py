"""Spherical: the velocity turns towards the normalised oracle by a learned angle."""

from __future__ import annotations

from math import log, pi

from torch import Tensor

from polyak.ops import axpby, axpy_through
from polyak.rules import (
    Oracle,
    State,
    Stream,
    UpdateRule,
    Work,
    angle,
    positive,
    register,
    update_norm,
)


@register("spherical", architecture="Spherical")
class Spherical(UpdateRule):
    r"""u = LN(O(x)); v ← cos φ·v + sin φ·u; x ← x + νv, with φ in (0, π/2).

    What is normalised is the oracle, not the velocity: each token keeps cos φ of its velocity,
    however large its oracle is. Where v and u are orthogonal and of one length, so is the next v.
    LN_v(βv + γO(x)) of heavy_ball depends on β/γ alone instead, and keeps less of v where the
    oracle is large.

    Reduction: φ = π/2 is gradient_descent with `update_norm="layer"` and γ = ν, whatever v starts
    from. `spherical[phi=1.5707963,frozen=phi]` is within 3e-8 of it; with
    `coefficients="unconstrained"`, φ is any number.
    """

    equation = "u = LN(O(x)); v ← cos φ·v + sin φ·u; x ← x + νv"
    work = Work(passes=5)
    gain = "nu"
    streams = (Stream("v", start="embedding"),)
    phi, nu = angle(pi / 4), positive(log(2))
    norm = update_norm()

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        """One step; x and v are (B, T, d)."""
        phi = self.phi
        v = axpby(phi.cos(), state.v, phi.sin(), self.norm(oracle(x)))
        x, v = axpy_through(self.nu, v, x)
        return x, state.replace(v=v)
