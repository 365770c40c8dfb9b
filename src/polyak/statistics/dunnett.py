"""Critical values for simultaneous intervals, by quadrature: deterministic, about six digits."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

Array = NDArray[np.float64]

LEVEL = 0.95
PAIRED_SHARE = 0.8  # of the 5% risk is what the paired route alone may spend


@lru_cache
def _normal_nodes() -> tuple[Array, Array]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(160)
    return nodes, weights / weights.sum()


@lru_cache
def _chi2_over_df(df: int, count: int) -> tuple[Array, Array]:
    """Nodes and weights that integrate over chi-square(df)/df."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return stats.chi2.ppf((nodes + 1) / 2, df) / df, weights / 2


Kind = Literal["control", "pairs"]


@lru_cache
def _within(kind: Kind, groups: int, correlation: float) -> tuple[Array, Array]:
    """h and P(every comparison is within h) for known variance.

    control: groups - 1 standard normals with equal correlation, in the one-factor form
    Z_i = sqrt(rho) A + sqrt(1 - rho) E_i, so that given A they are independent.
    pairs: all differences of `groups` normals, that is, their range divided by sqrt(2).
    """
    h = np.linspace(0.0, 14.0, 4001)
    z, weights = _normal_nodes()
    if kind == "pairs":
        inside = special.ndtr(z) - special.ndtr(z - math.sqrt(2) * h[:, None])
        return h, np.asarray(groups * inside ** (groups - 1) @ weights)
    shared, own = math.sqrt(correlation) * z, math.sqrt(1 - correlation)
    inside = special.ndtr((h[:, None] - shared) / own) - special.ndtr((-h[:, None] - shared) / own)
    return h, np.asarray(inside ** (groups - 1) @ weights)


@lru_cache
def critical_value(
    kind: Kind, groups: int, df: int, level: float = LEVEL, correlation: float = 0.5
) -> float:
    """Two-sided simultaneous critical value for one pooled variance with `df` degrees of freedom.

    kind "control" is Dunnett's (groups - 1 comparisons with one baseline; the t quantile for two
    groups), "pairs" is Tukey's studentized range over sqrt(2).
    """
    grid, probability = _within(kind, groups, correlation)
    ratio, weights = _chi2_over_df(df, 800)

    def excess(c: float) -> float:
        return float(weights @ np.interp(c * np.sqrt(ratio), grid, probability)) - level

    return float(optimize.brentq(excess, 0.01, 1e4))


@lru_cache
def critical_values(
    kind: Kind,
    groups: int,
    df_paired: int,
    df_seeds: int,
    level: float = LEVEL,
    correlation: float = 0.5,
) -> tuple[float, float]:
    """(c_p, c_u) of the module's formula: the shorter of the two intervals covers `level`.

    `df_seeds` is what the unpaired route gains: its degrees of freedom are df_paired + df_seeds.
    """
    paired = critical_value(kind, groups, df_paired, 1 - PAIRED_SHARE * (1 - level), correlation)
    grid, probability = _within(kind, groups, correlation)
    ratio, weights = _chi2_over_df(df_paired, 400)
    seed_ratio, seed_weights = _chi2_over_df(df_seeds, 80)
    pooled = (df_paired * ratio[:, None] + df_seeds * seed_ratio) / (df_paired + df_seeds)

    def excess(c: float) -> float:
        reach = np.minimum(paired * np.sqrt(ratio)[:, None], c * np.sqrt(pooled))
        return float(weights @ np.interp(reach, grid, probability) @ seed_weights) - level

    return paired, float(optimize.brentq(excess, 0.01, 1e4))
