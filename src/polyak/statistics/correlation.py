r"""Rank correlations of what was measured on several trained models, with permutation p-values.

Spearman's ρ is Pearson's correlation of ranks, ties sharing their mean rank. Its p-value is the
share of all pairings of the two lists whose |ρ| is at least the one observed (two-sided): every
pairing is counted for up to 8 values, otherwise 99,999 random ones and the observed one
(Phipson and Smyth 2010, so that a p-value is never 0).

Which models count as independent decides what the p-value means. Runs of one entry differ in
their seed only: they are repetitions, not further evidence on how a property goes with the update
rule. So the means over seeds are correlated, one value per entry; ρ over all runs is given beside
it without a p-value. Several correlations of one page are adjusted together (Holm 1979).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

EXACT = 8
"""Up to so many values, every pairing is counted: 8! = 40,320."""
DRAWS = 99_999


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's ρ of two properties of trained models.

    Attributes:
        rho: over the entries' means; None where fewer than 3 entries have both, or one is constant.
        p: two-sided permutation p-value of `rho`.
        models: how many independent models (entries) it is computed from.
        exact: whether every pairing was counted.
        rho_runs: ρ over all runs, seeds of one entry counted each.
        runs: how many runs that is.
    """

    rho: float | None
    p: float | None
    models: int
    exact: bool
    rho_runs: float | None
    runs: int


def rank_correlation(
    first: Mapping[str, Sequence[float | None]],
    second: Mapping[str, Sequence[float | None]],
    *,
    seed: int = 0,
) -> RankCorrelation:
    """Correlate two properties given per entry as one value a run, in the same order of runs.

    Args:
        first: entry → values, None where a run lacks one.
        second: the other property, for the same runs.
        seed: of the random pairings.
    """
    pairs = {
        entry: [
            (a, b)
            for a, b in zip(first[entry], second[entry], strict=True)
            if a is not None and b is not None and math.isfinite(a) and math.isfinite(b)
        ]
        for entry in first
        if entry in second
    }
    kept = {entry: found for entry, found in pairs.items() if found}
    means = [np.mean(found, axis=0) for found in kept.values()]
    every = [pair for found in kept.values() for pair in found]
    rho, p, exact = None, None, len(means) <= EXACT
    if len(means) >= 3:
        x, y = np.array(means).T
        rho = spearman(x, y)
        p = None if rho is None else permutation_p(x, y, seed=seed)
    rho_runs = spearman(*np.array(every).T) if len(every) >= 3 else None
    return RankCorrelation(rho, p, len(means), exact, rho_runs, len(every))


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float | None:
    """ρ of two lists of equal length, or None where one of them is constant."""
    a, b = _centred(x), _centred(y)
    return None if a is None or b is None else float(a @ b)


def permutation_p(
    x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, *, seed: int = 0
) -> float:
    """Two-sided p-value of ρ under all pairings of `x` with `y`; neither may be constant."""
    a, b = _centred(x), _centred(y)
    assert a is not None, "x is constant"
    assert b is not None, "y is constant"
    least = abs(float(a @ b)) - 1e-12  # equal pairings differ by rounding
    if len(a) <= EXACT:
        orders = np.array(list(itertools.permutations(range(len(b)))))
        return float(np.mean(np.abs(b[orders] @ a) >= least))
    draw = np.random.default_rng(seed)
    found = sum(abs(float(draw.permutation(b) @ a)) >= least for _ in range(DRAWS))
    return (1 + found) / (1 + DRAWS)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values tested together: at most α of families have a false one below α."""
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[place] = largest
    return adjusted


def _centred(values: Sequence[float] | np.ndarray) -> np.ndarray | None:
    """Ranks, centred and of length 1; None if all are equal."""
    ranks = rankdata(values) - (len(values) + 1) / 2
    length = float(np.linalg.norm(ranks))
    return None if length == 0 else ranks / length
