r"""How much of the loss's curvature is Gauss–Newton's.

With logits z(θ), H = ∂²L/∂θ² = G + E: G = E[(∂z/∂θ)ᵀ (∂²ℓ/∂z²) (∂z/∂θ)] is semi-definite, and
E = E[Σ_k (∂ℓ/∂z_k) ∂²z_k/∂θ²] is what is left; arguments that need it to be small rest on
∂ℓ/∂z = p − e_y being small. For random signs w (Hutchinson 1989),

    E⟨w, Aw⟩ = tr A,   E⟨Aw, Bw⟩ = tr(AᵀB) = ⟨A, B⟩_F.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyak.analysis._common import logits_of, math_attention
from polyak.analysis.dynamics.summaries import check_sequences, mean_of
from polyak.analysis.hessian import Surface
from polyak.analysis.lanczos import Eigenpair, extremes
from polyak.analysis.trace import signs
from polyak.statistics.clusters import jackknife
from polyak.statistics.intervals import Interval

TRACE_H, TRACE_G, NORM_H, NORM_G, INNER = range(5)
"""Columns of the probes' table: tr H, tr G, ‖H‖², ‖G‖², ⟨H, G⟩."""


@dataclass(frozen=True, kw_only=True)
class End:
    """A largest eigenvalue.

    Attributes:
        value: Rayleigh quotient.
        residual: some eigenvalue lies within it.
        converged: if not, `value` is a lower bound of the largest.
    """

    value: float
    residual: float
    converged: bool


@dataclass(frozen=True, kw_only=True)
class Share:
    """Gauss–Newton's share of the curvature, over all trained parameters.

    Attributes:
        trace: tr G/tr H; 95% interval over probes, for these tokens, as the next three.
        rest: ‖H − G‖_F/‖H‖_F.
        size: ‖G‖_F/‖H‖_F.
        cosine: ⟨H, G⟩/(‖H‖‖G‖).
        top: λ_max(G)/λ_max(H).
        top_hessian: λ_max(H).
        top_gauss_newton: λ_max(G).
        output_gradient: ‖p − e_y‖ of a token, with its interval over sequences.
        probes: random vectors.
        tokens: that define the loss.
    """

    trace: Interval | None
    rest: Interval | None
    size: Interval | None
    cosine: Interval | None
    top: float | None
    top_hessian: End
    top_gauss_newton: End
    output_gradient: Interval
    probes: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def share_of(
    surface: Surface,
    *,
    probes: int = 16,
    seed: int = 0,
    tolerance: float = 1e-2,
    max_products: int = 60,
    tick: Callable[[float], None] = lambda share: None,
) -> Share:
    """Gauss–Newton's share of a loss's curvature.

    Args:
        surface: the loss, of at least two sequences.
        probes: random vectors, at least 2; two products for each.
        seed: of the probes and Lanczos' start.
        tolerance: largest residual of an eigenvalue, relative to it.
        max_products: for each of the two.
        tick: called with the share of the work that is done.

    Raises:
        ConfigError: a second derivative is not finite.
        DataError: one sequence.
    """
    check_sequences(surface.ids)
    vectors = [signs(surface.size, seed, probe, surface.device) for probe in range(probes)]
    images: list[Tensor] = []
    for w in vectors:  # graphs are kept for one kind of product at a time
        images.append(surface.hessian(w))
        tick(len(images) / probes / 4)
    rows = []
    for w, h in zip(vectors, images, strict=True):
        g = surface.gauss_newton(w)
        rows.append([float(a @ b) for a, b in ((w, h), (w, g), (h, h), (g, g), (h, g))])
        tick(1 / 4 + len(rows) / probes / 4)
    del images
    table = np.array(rows)
    settings: dict[str, Any] = {
        "count": 1,
        "bottom": False,
        "tolerance": tolerance,
        "max_products": max_products,
        "seed": seed,
        "device": surface.device,
    }
    ends = []
    for kind in ("gauss_newton", "hessian"):
        ends.append(_end(extremes(surface.operator(kind), surface.size, **settings).top[0]))
        tick((2 + len(ends)) / 4)
    surface.forget()
    top_g, top_h = ends
    return Share(
        trace=jackknife(table, lambda s: float(s[TRACE_G] / s[TRACE_H])),
        rest=jackknife(table, lambda s: _root(s[NORM_H] + s[NORM_G] - 2 * s[INNER], s[NORM_H])),
        size=jackknife(table, lambda s: _root(s[NORM_G], s[NORM_H])),
        cosine=jackknife(table, lambda s: float(s[INNER] / np.sqrt(s[NORM_H] * s[NORM_G]))),
        top=top_g.value / top_h.value if top_h.value > 0 else None,
        top_hessian=top_h,
        top_gauss_newton=top_g,
        output_gradient=_output_gradient(surface),
        probes=probes,
        tokens=surface.tokens,
    )


def _end(pair: Eigenpair) -> End:
    return End(value=pair.value, residual=pair.residual, converged=pair.converged)


def _root(top: float, bottom: float) -> float:
    return math.sqrt(max(top, 0.0) / bottom) if bottom > 0 else math.nan


@torch.no_grad()
def _output_gradient(surface: Surface) -> Interval:
    """‖p − e_y‖, averaged over each sequence's tokens."""
    means: list[float] = []
    for batch in surface.batches:
        with math_attention():
            p = logits_of(surface.model, batch[:, :-1]).double().softmax(-1)
        right = p.gather(-1, batch[:, 1:, None])[..., 0]
        # ‖p − e_y‖² = ‖p‖² − 2p_y + 1
        length = (p.square().sum(-1) - 2 * right + 1).clamp(min=0).sqrt()
        means += length.mean(1).tolist()
    return mean_of(means)
