r"""Paired differences from a baseline, with intervals that hold for all comparisons together.

The model is the randomised complete block design. Entry i trained with seed j ends at

    loss_ij = entry_i + seed_j + noise_ij,

where runs of one seed see the same batches in the same order. The estimate of entry_i - entry_0
is the mean of the paired differences loss_ij - loss_0j over the seeds both have. Its interval is

    mean +- min(c_p s_p, c_u s_u) sqrt(2 / n),

- s_p, *paired* noise: the residual of entry + seed effects, (k-1)(n-1) degrees of freedom;
- s_u, *unpaired* noise: the residual of entry effects alone, k(n-1) degrees of freedom, which is
  the better estimate when seeds share little and the worse one when they share much.

The critical values are Dunnett's (Dunnett 1955: comparisons with one control, correlation 1/2)
for the two routes together. c_p alone would cover 96%; c_u is set so that taking the shorter of
the two covers exactly 95% when seeds share nothing. Seed effects only lengthen the unpaired route,
so coverage can only grow with them: at least 95% whatever the seeds share.

With three seeds and one comparison this finds a difference of 5 s.d. (of one entry's loss over
seeds) 96% of the time; the paired t, which has two degrees of freedom there, 85%.

Pooling the noise assumes that entries are about equally noisy, which published seeds contradict
(gradient descent's s.d. twice that of triple momentum), so with more than one comparison s_p^2 and
s_u^2 are never below n/(n-1) times the same quantity computed from the pair alone, nor below
n/(n-1) times its average over the baseline's pairs. Simulated in `tests/statistics/test_verdict.py`
with 3 seeds: at most 5% false winners for equal noise (2% with eight entries) and t5 tails, 4.9%
when the baseline's s.d. is twice the others', 6.4% when it is three times.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from polyak.statistics.dunnett import LEVEL, Array, Kind, critical_value, critical_values

POWER = 0.8


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean and sample s.d. (n - 1) of one entry over seeds; `sd` is None for n < 2."""

    mean: float
    sd: float | None
    n: int


def summary(values: Iterable[float]) -> Summary | None:
    """Mean, s.d. and count of the values; None if there are none."""
    data = np.asarray(list(values), dtype=np.float64)
    if data.size == 0:
        return None
    return Summary(
        float(data.mean()), float(data.std(ddof=1)) if data.size > 1 else None, int(data.size)
    )


@dataclass(frozen=True, slots=True)
class Differences:
    """Differences of every entry from the baseline (entry - baseline; negative is better).

    Arrays end in the axis of entries; NaN where there is no number (the baseline itself, an entry
    without a seed in common, an interval that needs a second seed). `noise_sd` is the s.d. of one
    run that the interval was built on; `seeds` counts the seeds in common.
    """

    mean: Array
    half_width: Array
    noise_sd: Array
    seeds: NDArray[np.int_]
    comparisons: int
    df_paired: int | None = None
    df_unpaired: int | None = None
    critical_paired: float | None = None
    critical_unpaired: float | None = None


@dataclass(frozen=True, slots=True)
class _Noise:
    """Pooled and per-pair variances of one run; pair arrays are (..., k, k)."""

    paired: Array
    unpaired: Array
    df_paired: int
    df_unpaired: int
    pair_paired: Array
    pair_unpaired: Array
    shared: NDArray[np.int_]


def _residual(design: Array, y: Array) -> tuple[Array, int]:
    """Residual sum of squares of the last axis of y on the design, and degrees of freedom."""
    left, singular, _ = np.linalg.svd(design, full_matrices=False)
    basis = left[:, singular > 1e-9 * singular[0]]
    rest = y - (y @ basis) @ basis.T
    return np.asarray((rest**2).sum(-1)), y.shape[-1] - basis.shape[1]


def _noise(losses: Array, present: NDArray[np.bool_]) -> _Noise:
    groups, seeds = present.shape
    rows, columns = np.nonzero(present)
    y = losses[..., present]
    y = y - y.mean(-1, keepdims=True)
    entries = np.eye(groups)[rows]
    paired, df_paired = _residual(np.hstack([entries, np.eye(seeds)[columns]]), y)
    unpaired, df_unpaired = _residual(entries, y)

    both = present[:, None] & present[None, :]  # (k, k, n)
    shared = both.sum(-1)
    count = np.maximum(shared, 1)
    filled = np.where(present, losses, 0.0)
    df = np.maximum(shared - 1, 1)

    def squares(values: Array) -> Array:
        centre = np.where(both, values, 0.0).sum(-1) / count
        rest = np.where(both, values - centre[..., None], 0.0)
        return np.asarray((rest**2).sum(-1) / df)

    rows_ij = np.broadcast_to(filled[..., :, None, :], (*filled.shape[:-2], *both.shape))
    own = squares(rows_ij)
    gap = squares(filled[..., :, None, :] - filled[..., None, :, :])
    return _Noise(
        paired=paired / max(df_paired, 1),
        unpaired=unpaired / max(df_unpaired, 1),
        df_paired=df_paired,
        df_unpaired=df_unpaired,
        pair_paired=gap / 2,
        pair_unpaired=(own + np.swapaxes(own, -1, -2)) / 2,
        shared=shared,
    )


def _guard(pooled: Array, pair: Array, shared: NDArray[np.int_]) -> Array:
    """The pooled variance, or more where a pair, or one entry's pairs on average, show more."""
    groups = shared.shape[0]
    if groups == 2:  # the only pair's variance *is* the pooled one
        return np.asarray(np.broadcast_to(pooled[..., None, None], pair.shape))
    usable = (shared >= 2) & ~np.eye(groups, dtype=bool)
    inflated = np.where(usable, pair * shared / np.maximum(shared - 1, 1), 0.0)
    average = inflated.sum(-1) / np.maximum(usable.sum(-1), 1)
    # Only the row's entry: with the baseline as the row this is the average over all comparisons.
    return np.asarray(np.maximum(np.maximum(pooled[..., None, None], inflated), average[..., None]))


def _reach(
    noise: _Noise, kind: Kind, correlation: float
) -> tuple[Array, Array, tuple[float, float]]:
    """Half-widths (..., k, k), the noise s.d. each stands on, and the two critical values."""
    groups = noise.shared.shape[0]
    c_paired, c_unpaired = critical_values(
        kind, groups, noise.df_paired, noise.df_unpaired - noise.df_paired, LEVEL, correlation
    )
    paired = np.sqrt(_guard(noise.paired, noise.pair_paired, noise.shared))
    unpaired = np.sqrt(_guard(noise.unpaired, noise.pair_unpaired, noise.shared))
    scale = np.sqrt(2 / np.maximum(noise.shared, 1))
    half = np.minimum(c_paired * paired, c_unpaired * unpaired) * scale
    half = np.where(noise.shared >= 2, half, np.nan)
    sd = np.where(c_paired * paired <= c_unpaired * unpaired, paired, unpaired)
    return half, sd, (c_paired, c_unpaired)


def _mean_differences(losses: Array, present: NDArray[np.bool_], baseline: int) -> Array:
    both = present & present[baseline]
    gap = np.where(both, losses - losses[..., baseline : baseline + 1, :], 0.0).sum(-1)
    count = both.sum(-1)
    return np.where(count > 0, gap / np.maximum(count, 1), np.nan)


def _present(losses: Array) -> NDArray[np.bool_]:
    finite = np.isfinite(losses)
    present: NDArray[np.bool_] = finite.reshape(-1, *losses.shape[-2:])[0]
    if not (finite == present).all():
        raise ValueError("losses: every table of one batch must have the same cells missing")
    return present


def differences(losses: ArrayLike, baseline: int = 0) -> Differences:
    """Simultaneous 95% intervals for entry - baseline, as the module's docstring defines them.

    Args:
        losses: (..., entries, seeds), lower is better, NaN where a run is missing. Leading axes
            are independent tables with the same cells missing (used by simulations).
        baseline: row of the baseline.

    With missing cells each difference uses the seeds that entry shares with the baseline, both
    residuals are least squares over the cells that exist, and the critical values use the smallest
    correlation between two differences, which errs on the long side. An entry that shares one seed
    gets a mean without an interval and does not count as a comparison.
    """
    table = np.asarray(losses, dtype=np.float64)
    present = _present(table)
    mean = _mean_differences(table, present, baseline)
    shared = (present & present[baseline]).sum(-1)
    half, sd = np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    mean[..., baseline] = np.nan
    compared = np.flatnonzero(shared >= 2)
    if len(compared) < 2:  # the baseline itself is always among them when it has two runs
        return Differences(mean, half, sd, shared, comparisons=0)

    rows = np.asarray([baseline, *(i for i in compared if i != baseline)])
    noise = _noise(table[..., rows, :], present[rows])
    with_baseline = present[rows[1:]] & present[baseline]
    overlap = (with_baseline[:, None] & with_baseline[None, :]).sum(-1)
    count = with_baseline.sum(-1)
    correlation = float((0.5 * overlap / np.sqrt(np.outer(count, count))).min())
    reach, noise_sd, critical = _reach(noise, "control", correlation)
    half[..., rows[1:]] = reach[..., 0, 1:]
    sd[..., rows[1:]] = noise_sd[..., 0, 1:]
    return Differences(
        mean, half, sd, shared, len(rows) - 1, noise.df_paired, noise.df_unpaired, *critical
    )


def separated(losses: ArrayLike) -> NDArray[np.bool_]:
    """Whether row i is below row j by more than noise, over *all* pairs together at 95%.

    (..., entries, seeds) to (..., entries, entries); Tukey's critical values instead of Dunnett's,
    otherwise as `differences`. Pairs with fewer than two seeds in common are not separated.
    """
    table = np.asarray(losses, dtype=np.float64)
    present = _present(table)
    groups = table.shape[-2]
    result = np.zeros((*table.shape[:-1], groups), dtype=bool)
    rows = np.flatnonzero(present.sum(-1) >= 2)
    if len(rows) < 2:
        return result
    noise = _noise(table[..., rows, :], present[rows])
    if noise.df_paired < 1 or noise.df_unpaired <= noise.df_paired:
        return result
    reach, _, _ = _reach(noise, "pairs", 0.5)
    reach = np.maximum(reach, np.swapaxes(reach, -1, -2))
    for position, i in enumerate(rows):
        # entry i minus every other, so a negative gap beyond the reach separates i from below
        gap = -_mean_differences(table, present, int(i))[..., rows]
        result[..., i, rows] = gap < -reach[..., position, :]
    return result


def seeds_needed(
    difference: float, noise_sd: float, comparisons: int, power: float = POWER, limit: int = 1000
) -> int | None:
    """Fewest seeds at which a 95% interval would exclude zero with probability `power`.

    Supposes that the true difference and the s.d. of one run are those given, and Dunnett's
    interval on paired differences with (k-1)(n-1) degrees of freedom. None beyond `limit` seeds.
    """
    if noise_sd <= 0:
        return 2 if difference else None

    def enough(n: int) -> bool:
        df = comparisons * (n - 1)
        # beyond a few hundred degrees of freedom the critical value no longer moves
        c = critical_value("control", comparisons + 1, min(df, 1000))
        shift = abs(difference) / (noise_sd * math.sqrt(2 / n))
        if shift > c + 8:
            return True
        return float(stats.nct.sf(c, df, shift)) >= power

    # with known noise the count is this, and Student's tails only add to it
    z = critical_value("control", comparisons + 1, 1000) + float(stats.norm.ppf(power))
    start = 2 * (z * noise_sd / difference) ** 2 if difference else math.inf
    if start > 1.1 * limit:
        return None
    # one seed has no interval, so 1 is never enough
    found = 2 + bisect_left(range(2, limit + 1), True, key=enough)
    return found if found <= limit else None


def as_dict(value: Summary | None) -> dict[str, Any] | None:
    """The summary as results.json holds it."""
    return None if value is None else {"mean": value.mean, "sd": value.sd, "n": value.n}
