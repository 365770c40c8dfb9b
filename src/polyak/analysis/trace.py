r"""The trace of a symmetric operator with a 95% confidence interval.

*Hutchinson* (1989): for z with independent signs, E zᵀHz = tr H; its variance is
2(‖H‖_F² − Σ H_ii²).

*Deflated*: with orthonormal rows U, here the eigenvectors of both ends, and P = I − UᵀU,

    tr H = tr(U H Uᵀ) + tr(PHP),

exactly, whether or not U has converged. The first term is known; only the second is sampled,
without the outliers that make the variance (the idea of Hutch++, arXiv:2010.09649, with the space
that the ends have paid for already). Both use the same products: with w = Pz,
Hw = Hz − (HUᵀ)(Uz).

The number of probes is chosen by a pilot whose samples are then thrown away, so the interval is
Student's on a number of fresh, independent samples that does not depend on them: stopping early
does not spoil its coverage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyak.analysis.hessian import Operator
from polyak.analysis.intervals import FEWEST, Interval, needed, student
from polyak.errors import ConfigError

PILOT = 10
"""Probes that choose how many follow."""


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
    if max_probes < FEWEST:
        raise ConfigError(f"max_probes={max_probes} must be at least {FEWEST}")
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

    pilot = np.array([sample(probe)[1] for probe in range(PILOT)])
    about = known + float(pilot.mean())
    spread = float(pilot.std(ddof=1))
    target = precision * abs(about)
    count = needed(spread, PILOT, target, max_probes) if math.isfinite(target) else FEWEST
    samples = [sample(probe) for probe in range(PILOT, PILOT + count)]
    deflated = student([rest for _, rest in samples], known)
    return Trace(
        deflated=deflated,
        hutchinson=student([plain for plain, _ in samples]),
        deflated_directions=0 if vectors is None else len(vectors),
        size=size,
        precision=precision,
        reached=deflated.half_width <= precision * abs(deflated.value),
        products=PILOT + count,
    )
