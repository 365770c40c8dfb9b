r"""Effects and interactions in a full grid of factors, with intervals that hold for all together.

Every cell c of the grid is trained with every seed j, and its loss is, as in `paired`,

    loss_cj = cell_c + seed_j + noise_cj.

An effect is a contrast Σ_c w_c cell_c with Σ_c w_c = 0, estimated by the cells' means over n seeds:

- of level a of factor A: the mean over all cells at a, less that over all cells at A's first level;
- of a and b of A and B together, their interaction: by how much the difference that a makes changes
  from B's first level to b, averaged over the other factors; and so on for more factors.

Its interval is ± min(c_p s_p, c_u s_u) √(Σ w_c² / n), with the two estimates of one run's noise
that `paired` has, the residuals of cells and seeds ((k−1)(n−1) degrees of freedom) and of cells
alone (k(n−1)), and critical values for the shorter of the two. For m contrasts they are those of m
independent ones: by Šidák's inequality (1967) correlations between them only add coverage. As in
`paired`, with more than one contrast neither variance is below n/(n−1) times what the contrast's
own cells show, since cells may differ in noise.

The analysis of variance splits what lies between cells, Σ_c n (mean_c − mean)², into one sum of
squares for each set of factors, and tests each against s_p².
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations, product

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from polyak.statistics.dunnett import Array, critical_values


@dataclass(frozen=True, slots=True)
class Contrast:
    """What one effect compares: of which factors, at which of their levels, with which weights.

    `weights` has one number a cell, in the order of the grid, the last factor's levels fastest.
    """

    factors: tuple[int, ...]
    levels: tuple[int, ...]
    weights: Array


@dataclass(frozen=True, slots=True)
class Term:
    """A line of the analysis of variance; `f` and `p` are None where there is no residual."""

    factors: tuple[int, ...]
    df: int
    squares: float
    share: float
    f: float | None
    p: float | None


@dataclass(frozen=True, slots=True)
class Intervals:
    """Estimates of contrasts, half-widths of their intervals (NaN for one seed), and the noise.

    Arrays end in the axis of contrasts; `noise_sd` is the s.d. of one run that each interval stands
    on.
    """

    mean: Array
    half_width: Array
    noise_sd: Array
    df_paired: int
    df_unpaired: int
    critical_paired: float | None
    critical_unpaired: float | None


def sets_of(factors: int, order: int | None = None) -> list[tuple[int, ...]]:
    """Every set of factors, smaller ones first; of at most `order` factors, if that is given."""
    most = factors if order is None else min(order, factors)
    return [chosen for size in range(1, most + 1) for chosen in combinations(range(factors), size)]


def contrasts(shape: Sequence[int], order: int | None = None) -> list[Contrast]:
    """The contrasts of a grid with so many levels of each factor, see the module's docstring."""
    found = []
    for chosen in sets_of(len(shape), order):
        for levels in product(*(range(1, shape[factor]) for factor in chosen)):
            at = dict(zip(chosen, levels, strict=True))
            parts = [_part(count, at.get(factor)) for factor, count in enumerate(shape)]
            found.append(Contrast(chosen, levels, reduce(np.multiply.outer, parts).ravel()))
    return found


def _part(count: int, level: int | None) -> Array:
    """A factor's part of a contrast: the mean over its levels, or one level less the first."""
    if level is None:
        return np.full(count, 1 / count)
    difference: Array = np.eye(count)[level] - np.eye(count)[0]
    return difference


def intervals(losses: ArrayLike, weights: ArrayLike) -> Intervals:
    """Simultaneous 95% intervals for contrasts.

    Args:
        losses: (..., cells, seeds), no number missing. Leading axes are independent tables.
        weights: (contrasts, cells); each row sums to 0.
    """
    y, w = np.asarray(losses, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    *_, cells, seeds = y.shape
    per_seed = w @ y  # (..., contrasts, seeds)
    mean, size = per_seed.mean(-1), (w**2).sum(-1)
    df_paired, df_unpaired = (cells - 1) * (seeds - 1), cells * (seeds - 1)
    if seeds < 2:
        nothing = np.full_like(mean, np.nan)
        return Intervals(mean, nothing, nothing, 0, 0, None, None)
    paired, unpaired = (variance[..., None] for variance in _noise(y))
    if len(w) > 1:
        often = seeds / (seeds - 1)
        own = per_seed.var(-1, ddof=1) / size
        own_unpaired = y.var(-1, ddof=1) @ (w**2).T / size
        paired, unpaired = (
            np.maximum(paired, often * own),
            np.maximum(unpaired, often * own_unpaired),
        )
    c_paired, c_unpaired = critical_values(
        "control", len(w) + 1, df_paired, df_unpaired - df_paired, correlation=0.0
    )
    routes = c_paired * np.sqrt(paired), c_unpaired * np.sqrt(unpaired)
    half = np.broadcast_to(np.minimum(*routes), mean.shape) * np.sqrt(size / seeds)
    noise = np.broadcast_to(np.sqrt(np.where(routes[0] <= routes[1], paired, unpaired)), mean.shape)
    return Intervals(mean, half, noise, df_paired, df_unpaired, c_paired, c_unpaired)


def _noise(y: Array) -> tuple[Array, Array]:
    """Variance of one run: beside cells and seeds, and beside cells alone."""
    cells, seeds = y.shape[-2:]
    within = y - y.mean(-1, keepdims=True)
    rest = within - within.mean(-2, keepdims=True)
    paired = (rest**2).sum((-2, -1)) / ((cells - 1) * (seeds - 1))
    return paired, (within**2).sum((-2, -1)) / (cells * (seeds - 1))


def analysis_of_variance(losses: ArrayLike, shape: Sequence[int]) -> list[Term]:
    """The sums of squares between cells, by set of factors, each tested against the noise.

    Args:
        losses: (cells, seeds), cells in the order of the grid, no number missing.
        shape: how many levels each factor has.
    """
    y = np.asarray(losses, dtype=np.float64)
    cells, seeds = y.shape
    means = y.mean(-1).reshape(tuple(shape))
    parts = {chosen: _part_of_means(means, chosen) for chosen in sets_of(len(shape))}
    squares = {chosen: seeds * float((part**2).sum()) for chosen, part in parts.items()}
    total, df = sum(squares.values()), (cells - 1) * (seeds - 1)
    noise = float(_noise(y)[0]) if df else 0.0
    found = []
    for chosen, sum_of_squares in squares.items():
        own = math.prod(shape[factor] - 1 for factor in chosen)
        f = sum_of_squares / own / noise if noise > 0 else None
        p = None if f is None else float(stats.f.sf(f, own, df))
        share = sum_of_squares / total if total > 0 else 0.0
        found.append(Term(chosen, own, sum_of_squares, share, f, p))
    return found


def _part_of_means(means: Array, chosen: Sequence[int]) -> Array:
    """What a set of factors adds to the cells' means beyond its subsets."""
    part = means
    for factor in range(means.ndim):
        average = part.mean(factor, keepdims=True)
        part = part - average if factor in chosen else np.broadcast_to(average, part.shape)
    return part
