r"""How far a map is from a gradient, by products with its Jacobian J alone.

A field O is −∇E near a point for some E iff J = ∂O/∂x is symmetric there. With random signs z,
u = Jz and w = Jᵀz,

    E⟨u, w⟩ = tr J²,   E(‖u‖² + ‖w‖²)/2 = ‖J‖²_F,   E⟨z, u⟩ = tr J,

    κ = tr J²/‖J‖²_F ∈ [−1, 1]: 1 symmetric, −1 antisymmetric, 0 like a random matrix;
    R = ‖J − Jᵀ‖/‖J + Jᵀ‖ = √((1 − κ)/(1 + κ)).

Ratios are of sums over probes and sequences. The own-token part is of the diagonal blocks J_ii,
that is, of what a token's output owes to the same token's input: z on one token, read there. Of a
causal J, tr J² = Σ_i tr J_ii², so that κ = κ_token · (own-token share of ‖J‖²).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp, vjp

from polyak.analysis._common import math_attention
from polyak.analysis.jacobian.linear import Free
from polyak.analysis.lanczos import extremes, quadrature
from polyak.statistics.clusters import Array, jackknife
from polyak.statistics.intervals import Interval, student

Field = Callable[[Tensor], Tensor]
"""(B, T, d) → (B, T, d), sequence by sequence."""
SQUARE, NORM, TRACE, OWN_SQUARE, OWN_NORM = range(5)
"""Columns of a table of sums: tr J², ‖J‖²_F, tr J, and the first two of the diagonal blocks."""
STEPS = 24
"""Lanczos steps for the share of the symmetric part's spectrum that is above 0."""
ENDS = {"tolerance": 1e-2, "max_products": 60}


class Products(Protocol):
    """A square J by its products, vectors (T, d, m)."""

    def times(self, z: Tensor) -> Tensor:
        """J z."""

    def transposed(self, u: Tensor) -> Tensor:
        """Jᵀ u."""


@dataclass(frozen=True)
class Metric:
    """NᵀJ: of O = f ∘ n, N = ∂n/∂x, it is NᵀFN, symmetric where f is a gradient.

    Attributes:
        outer: J.
        inner: N.
    """

    outer: Products
    inner: Products

    def times(self, z: Tensor) -> Tensor:
        """Nᵀ J z."""
        return self.inner.transposed(self.outer.times(z))

    def transposed(self, u: Tensor) -> Tensor:
        """Jᵀ N u."""
        return self.outer.transposed(self.inner.times(u))


def derivative(function: Field, point: Tensor) -> Free:
    """J of a field at one sequence's point (1, T, d)."""
    return Free(lambda z: function(z[None])[0], point[0])


def signs(tokens: int, width: int, generator: torch.Generator) -> Tensor:
    """Random signs (T, d), in float64 on the CPU."""
    drawn = torch.randint(2, (tokens, width), generator=generator)
    return (2 * drawn - 1).double()


def full_sums(products: Products, z: Tensor) -> list[float]:
    """One probe's tr J², ‖J‖² and tr J."""
    u, w = (product(z[..., None])[..., 0] for product in (products.times, products.transposed))
    return [
        float((u * w).sum()),
        float(u.square().sum() + w.square().sum()) / 2,
        float((z * u).sum()),
    ]


def own_sums(function: Field, point: Tensor, z: Tensor, tokens: Tensor) -> list[float]:
    """One probe's Σ tr J_ii² and Σ ‖J_ii‖², from some tokens i, scaled to all of them.

    Args:
        function: the field.
        point: (1, T, d).
        z: signs (T, d).
        tokens: (m,), those that are tried: one copy of the sequence each.
    """
    copies = point.repeat(len(tokens), 1, 1)
    place = torch.arange(len(tokens))
    tangent = torch.zeros_like(copies)
    tangent[place, tokens] = z[tokens]
    with torch.no_grad(), math_attention():
        u = jvp(function, (copies,), (tangent,))[1][place, tokens]
        w = vjp(function, copies)[1](tangent)[0][place, tokens]
    scale = point.shape[1] / len(tokens)
    norm = float(u.square().sum() + w.square().sum()) / 2
    return [scale * float((u * w).sum()), scale * norm]


def spaced(tokens: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` of `tokens` places, evenly spaced from a random start; all where there are fewer."""
    if count >= tokens:
        return torch.arange(tokens)
    start = torch.rand((), generator=generator, dtype=torch.float64)
    return ((torch.arange(count) + start) * (tokens / count)).long()


def sums(
    function: Field,
    point: Tensor,
    *,
    probes: int,
    own_tokens: int | None,
    generator: torch.Generator,
    products: Products | None = None,
) -> Array:
    """(probes, 5): every probe's row of sums at one point.

    Args:
        function: the field.
        point: (1, T, d).
        probes: vectors of random signs.
        own_tokens: tokens tried for the diagonal blocks by each probe; None where tokens do not
            see each other: all of J is in its diagonal blocks.
        generator: of the signs.
        products: of another J than the field's own, whose diagonal blocks are not looked at.
    """
    tokens, width = point.shape[1:]
    rows = []
    j = derivative(function, point) if products is None else products
    for _ in range(probes):
        z = signs(tokens, width, generator).to(point)
        row = full_sums(j, z)
        if products is not None:
            own = [math.nan, math.nan]
        elif own_tokens is None:
            own = row[: NORM + 1]
        else:
            own = own_sums(function, point, z, spaced(tokens, own_tokens, generator))
        rows.append(row + own)
    return np.array(rows)


@dataclass(frozen=True, kw_only=True)
class Asymmetry:
    """κ and what belongs to it, each with a 95% interval over sequences.

    Attributes:
        kappa: tr J²/‖J‖²_F.
        kappa_probes: the same with the interval over probes, these sequences held fixed.
        r: ‖J − Jᵀ‖/‖J + Jᵀ‖; its interval is κ's, mapped.
        kappa_token: of the diagonal blocks.
        own_share: of the diagonal blocks in ‖J‖²_F.
        trace: tr J/√(n‖J‖²_F) ∈ [−1, 1]: below 0, J contracts on average.
    """

    kappa: Interval | None
    kappa_probes: Interval | None
    r: tuple[float, float, float] | None
    kappa_token: Interval | None
    own_share: Interval | None
    trace: Interval | None


def asymmetry(rows: Array, size: int) -> Asymmetry:
    """From the sums of several sequences.

    Args:
        rows: (sequences, probes, 5), at least two of each.
        size: n, rows of J.
    """
    by_sequence, by_probe = rows.sum(1), rows.sum(0)
    counted = np.column_stack([by_sequence, np.full(len(rows), rows.shape[1])])

    def ratio(top: int, bottom: int, table: Array = by_sequence) -> Interval | None:
        return jackknife(table, lambda sums: float(sums[top] / sums[bottom]))

    def trace(table: Array) -> float:
        return float(table[TRACE] / np.sqrt(size * table[NORM] * table[-1]))

    kappa = ratio(SQUARE, NORM)
    return Asymmetry(
        kappa=kappa,
        kappa_probes=ratio(SQUARE, NORM, by_probe),
        r=None if kappa is None else (_r(kappa.value), _r(kappa.high), _r(kappa.low)),
        kappa_token=ratio(OWN_SQUARE, OWN_NORM),
        own_share=ratio(OWN_NORM, NORM),
        trace=jackknife(counted, trace),
    )


def _r(kappa: float) -> float:
    kappa = min(max(kappa, -1.0), 1.0)
    return math.sqrt((1 - kappa) / (1 + kappa)) if kappa > -1 else math.inf


@dataclass(frozen=True, kw_only=True)
class SymmetricPart:
    """Of S = (J + Jᵀ)/2.

    Attributes:
        top: largest eigenvalue, mean over sequences.
        bottom: smallest.
        positive: share of Σλ² with λ > 0, by Lanczos quadrature; 0 for a field that descends a
            convex energy, 1 for one that ascends it.
        bounds: how many ends have not converged; they are nearer to 0 than the truth.
    """

    top: Interval
    bottom: Interval
    positive: Interval | None
    bounds: int


def symmetric_part(functions: list[tuple[Field, Tensor]], seed: int) -> SymmetricPart:
    """From (field, point (1, T, d)) of at least two sequences."""
    tops, bottoms, rows, bounds = [], [], [], 0
    generator = torch.Generator().manual_seed(seed)
    for function, point in functions:
        linear = derivative(function, point)

        def halves(z: Tensor, linear: Free = linear) -> Tensor:
            return (linear.times(z) + linear.transposed(z)) / 2

        operator, size = linear.flat(halves), point[0].numel()
        ends = extremes(operator, size, count=1, seed=seed, device=point.device, **ENDS)  # type: ignore[arg-type]
        tops.append(ends.top[0].value)
        bottoms.append(ends.bottom[0].value)
        bounds += sum(not one.converged for one in (ends.top[0], ends.bottom[0]))
        start = signs(point.shape[1], point.shape[2], generator).flatten().to(point.device)
        nodes, weights = quadrature(operator, start, STEPS)
        rows.append([float(weights @ (nodes**2 * (nodes > 0))), float(weights @ nodes**2)])
    return SymmetricPart(
        top=student(tops),
        bottom=student(bottoms),
        positive=jackknife(np.array(rows), lambda s: float(s[0] / s[1])),
        bounds=bounds,
    )
