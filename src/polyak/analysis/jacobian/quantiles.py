r"""Quantiles of singular values too many to be all computed, with intervals.

F(t) = #{σ_i ≤ t}/N is the mean, over random unit vectors z, of the spectral measure of z, and k
Lanczos steps from z give its Gauss quadrature: nodes θ_1 < … < θ_k and weights w. By the
Chebyshev–Markov–Stieltjes inequalities the measure μ itself obeys

    w_1 + … + w_{i−1} ≤ μ{θ < θ_i},   μ{θ ≤ θ_i} ≤ w_1 + … + w_i,

so each run bounds μ from both sides, with no assumption. Over z uniform on the sphere μ{σ ≤ t} is
Beta(NF/2, N(1 − F)/2), so the mean of p runs has variance 2F(1 − F)/(p(N + 2)). Both go into
the interval: steps that are too few make it wide, not wrong. The lower half comes from Lanczos on
the inverse where there is one, which tells small singular values apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polyak.analysis.lanczos import quadrature

Array = npt.NDArray[np.float64]
NORMAL = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class Quantile:
    """The smallest σ with at least a part q of all singular values at or below it."""

    q: float
    value: float
    low: float
    high: float


def exact(values: Array, wanted: Sequence[float]) -> list[Quantile]:
    """Of all singular values."""
    ordered = np.sort(values)
    found = []
    for q in wanted:
        place = min(max(math.ceil(q * len(ordered)) - 1, 0), len(ordered) - 1)
        value = float(ordered[place])
        found.append(Quantile(q=q, value=value, low=value, high=value))
    return found


def estimated(
    gram: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor] | None,
    size: int,
    wanted: Sequence[float],
    *,
    ends: tuple[float, float],
    probes: int,
    steps: int,
    seed: int,
) -> list[Quantile]:
    """By Lanczos quadrature.

    Args:
        gram: G of singular values σ = √eigenvalue, on vectors of length `size`.
        inverse: of G; None if there is none.
        size: number of singular values.
        wanted: the q.
        ends: bounds of σ_min from below and of σ_max from above, which intervals stay within.
        probes: random vectors.
        steps: of Lanczos.
        seed: of the vectors.
    """
    found: list[Quantile] = []
    lower = [q for q in wanted if q < 0.5 and inverse is not None]
    upper = [q for q in wanted if q not in lower]
    for chosen, operator, power in ((lower, inverse, -0.5), (upper, gram, 0.5)):
        if not chosen:
            continue
        assert operator is not None
        runs = []
        generator = torch.Generator().manual_seed(seed)
        for _ in range(probes):
            start = torch.randn(size, generator=generator, dtype=torch.float64)
            nodes, weights = quadrature(operator, start, steps)
            sigmas = np.maximum(nodes, 1e-300) ** power
            order = np.argsort(sigmas)
            runs.append((sigmas[order], weights[order]))
        found += [_quantile(q, runs, size, ends) for q in chosen]
    return sorted(found, key=lambda quantile: quantile.q)


def _quantile(
    q: float, runs: Sequence[tuple[Array, Array]], size: int, ends: tuple[float, float]
) -> Quantile:
    grid = np.unique(np.concatenate([sigmas for sigmas, _ in runs]))
    least = np.mean([_least(grid, *run) for run in runs], axis=0)
    most = np.mean([_most(grid, *run) for run in runs], axis=0)
    spread = NORMAL * math.sqrt(2 * q * (1 - q) / (len(runs) * (size + 2)))
    # `most` bounds F on everything below the next grid point, `least` at the point itself
    below = grid[most + spread < q]
    above = grid[least - spread >= q]
    following = grid[grid > below[-1]] if len(below) else grid[:0]
    low = float(following[0]) if len(following) else ends[0]
    high = float(above[0]) if len(above) else ends[1]
    middle = np.interp(q, (least + most) / 2, np.log(grid))
    low, high = max(low, ends[0]), min(high, ends[1])
    value = min(max(float(np.exp(middle)), low), high)
    return Quantile(q=q, value=value, low=low, high=high)


def _least(t: Array, sigmas: Array, weights: Array) -> Array:
    """A bound from below of μ{σ ≤ t}: the weights before the last node at or below t."""
    count = np.searchsorted(sigmas, t, side="right")
    sums = np.concatenate([[0.0], np.cumsum(weights)])
    found: Array = sums[np.maximum(count - 1, 0)]
    return found


def _most(t: Array, sigmas: Array, weights: Array) -> Array:
    """A bound from above of μ{σ ≤ t}, up to the next grid point: up to the first node above t."""
    count = np.searchsorted(sigmas, t, side="right")
    sums = np.concatenate([[0.0], np.cumsum(weights)])
    found: Array = sums[np.minimum(count + 1, len(weights))]
    return found
