r"""The trace of a symmetric operator with a 95% confidence interval.

*Hutchinson* (1989): for z with independent signs, E zᵀHz = tr H; its variance is
2(‖H‖_F² − Σ H_ii²).

*Deflated*: with orthonormal rows U, here the eigenvectors of both ends, and P = I − UᵀU,

    tr H = tr(U H Uᵀ) + tr(PHP),

exactly, whether or not U has converged. The first term is known; only the second is sampled,
without the outliers that make the variance (the idea of Hutch++, arXiv:2010.09649, with the space
that the ends have paid for already). Both use the same products: with w = Pz,
Hw = Hz − (HUᵀ)(Uz).

The interval is in two stages, after Stein (1945): a pilot's standard deviation gives the number n
of fresh probes for the wanted half-width. The estimate is the mean of the fresh probes alone, which
does not depend on n, so stopping early does not spoil the coverage (`intervals.two_stage`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyak.analysis.hessian import Operator
from polyak.checks import check_whole
from polyak.errors import ConfigError
from polyak.statistics.intervals import FEWEST, Interval, needed, two_stage

PILOT = 20
"""Probes that choose how many follow."""
MARGIN = 0.8
"""Of the target, for the pilot's errors about the trace and the spread."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """tr H by both estimators, on the same probes."""

    deflated: Interval
    hutchinson: Interval
    deflated_directions: int
    size: int
    precision: float
    reached: bool
    """Whether the deflated interval's half-width is within `precision` of its value."""
    products: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the trace and trace/N."""
        return {
            "deflated": self.deflated.to_dict(),
            "deflated_mean": self.deflated.scaled(1 / self.size).to_dict(),
            "hutchinson": self.hutchinson.to_dict(),
            "hutchinson_mean": self.hutchinson.scaled(1 / self.size).to_dict(),
            "deflated_directions": self.deflated_directions,
            "precision": self.precision,
            "reached": self.reached,
            "exact": False,
            "products": self.products,
        }


def signs(size: int, seed: int, probe: int, device: torch.device | None = None) -> Tensor:
    """The `probe`-th vector of independent ±1, a function of the seed and its number alone."""
    generator = torch.Generator().manual_seed(_mixed(seed, probe))
    drawn = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8)
    return (2 * drawn - 1).double().to(device)


def _mixed(seed: int, probe: int) -> int:
    return int(np.random.SeedSequence([seed, probe]).generate_state(1, np.uint64)[0] >> 1)


def trace(
    operator: Operator,
    size: int,
    *,
    seed: int,
    vectors: Tensor | None = None,
    images: Tensor | None = None,
    precision: float = 0.05,
    max_probes: int = 200,
    device: torch.device | None = None,
) -> Trace:
    """Estimate tr H to a relative half-width.

    Args:
        operator: symmetric, on float64 vectors of length `size`.
        size: N.
        seed: of the probes.
        vectors: (k, N) orthonormal rows to deflate by.
        images: (k, N), the operator on each.
        precision: wanted half-width of the interval, relative to the value.
        max_probes: at most this many after the pilot; the target may then be missed, which
            `reached` tells.
        device: of the vectors.

    Raises:
        ConfigError: `precision` not above 0, or fewer than 8 probes.
    """
    if not precision > 0:
        raise ConfigError(f"trace_precision={precision} must be above 0")
    check_whole("max_probes", max_probes, FEWEST)
    known = 0.0 if vectors is None or images is None else float((vectors * images).sum())

    def sample(probe: int) -> tuple[float, float]:
        z = signs(size, seed, probe, device)
        image = operator(z)
        plain = float(z @ image)
        if vectors is None or images is None:
            return plain, plain
        inside = vectors @ z
        w = z - vectors.T @ inside
        return plain, float(w @ (image - images.T @ inside))

    pilot = [sample(probe) for probe in range(PILOT)]
    rest = [deflated for _, deflated in pilot]
    target = MARGIN * precision * abs(known + float(np.mean(rest)))
    count = needed(float(np.std(rest, ddof=1)), PILOT, target, max_probes)
    fresh = [sample(probe) for probe in range(PILOT, PILOT + count)]
    plain, deflated = (
        two_stage([s[place] for s in pilot], [s[place] for s in fresh], offset)
        for place, offset in ((0, 0.0), (1, known))
    )
    return Trace(
        deflated=deflated,
        hutchinson=plain,
        deflated_directions=0 if vectors is None else len(vectors),
        size=size,
        precision=precision,
        reached=deflated.half_width <= precision * abs(deflated.value),
        products=PILOT + count,
    )
