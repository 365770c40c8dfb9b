"""Confidence intervals of means of independent samples, and how many samples they need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
FEWEST = 8
"""Samples below which Student's t is too wide: at 8 it is 1.21 times the normal's width."""
CAUTION = 0.8
"""A pilot's spread is taken at the upper end of an interval of this confidence (one-sided)."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% Student interval."""

    value: float
    low: float
    high: float
    half_width: float
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def scaled(self, factor: float) -> Interval:
        """The interval of `factor` times the mean; factor > 0."""
        return Interval(
            self.value * factor,
            self.low * factor,
            self.high * factor,
            self.half_width * factor,
            self.samples,
        )


def student(samples: Sequence[float], offset: float = 0.0) -> Interval:
    """offset + mean ± t·s/√n of independent samples; n ≥ 2."""
    values = np.asarray(samples, dtype=np.float64)
    n = len(values)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n))
    mean = offset + float(values.mean())
    return Interval(mean, mean - half, mean + half, half, n)


def needed(spread: float, pilot: int, half_width: float, most: int) -> int:
    """How many fresh samples give an interval of at most `half_width`.

    Args:
        spread: standard deviation of `pilot` samples; its upper limit is used, so that the target
            is met more often than not.
        pilot: how many.
        half_width: the target.
        most: the answer's upper limit.
    """
    cautious = spread * math.sqrt((pilot - 1) / float(stats.chi2.ppf(1 - CAUTION, pilot - 1)))
    for n in range(FEWEST, most):
        if stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * cautious / math.sqrt(n) <= half_width:
            return n
    return most
