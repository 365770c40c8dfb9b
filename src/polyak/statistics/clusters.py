"""Errors of means and ratios over clusters: sequences, each of many dependent tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import stats

from polyak.statistics.intervals import CONFIDENCE, Interval

Array = npt.NDArray[np.float64]


def jackknife(rows: Array, statistic: Callable[[Array], float]) -> Interval | None:
    """A smooth function of column sums, with its delete-one 95% interval.

    With θ = f(Σᵢ rowᵢ) and θ₋ᵢ the same without row i,
    s.e.² = (n − 1)/n · Σᵢ (θ₋ᵢ − mean θ₋)², and θ ± t·s.e. with n − 1 degrees of freedom
    (Tukey 1958; Efron and Stein 1981).

    Args:
        rows: (n, k), one row of sums for each cluster; n ≥ 2.
        statistic: of k sums; scale-free, such as a ratio of two of them.

    Returns:
        None where the statistic is not finite, such as 0/0.
    """
    n, total = len(rows), rows.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = statistic(total)
        without = np.array([statistic(total - row) for row in rows])
    if not (math.isfinite(value) and np.isfinite(without).all()):
        return None
    error = math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    return Interval(value, value - half, value + half, half, n)
