r"""The spectral density of a symmetric operator, by stochastic Lanczos quadrature.

For z with independent signs, u = z/√N, E uᵀf(H)u = tr f(H)/N. Lanczos from u gives nodes θ_j and
weights w_j with Σ w_j f(θ_j) = uᵀf(H)u for every polynomial of degree below twice the steps
(Ubaru, Chen and Saad 2017). The mean over probes estimates the density φ(λ) = (1/N) Σ_i δ(λ − λ_i),
drawn here smoothed by a Gaussian; moments and shares come with Student intervals over the probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from polyak.analysis.hessian import Operator
from polyak.analysis.lanczos import Array, quadrature
from polyak.analysis.trace import signs
from polyak.checks import check_whole
from polyak.statistics.intervals import student

MOMENTS = 4
POINTS = 401
"""Points of a drawn curve."""
WIDTH = 0.01
"""Standard deviation of the smoothing Gaussian, relative to the range shown."""


@dataclass(frozen=True)
class Density:
    """Nodes and weights of every probe."""

    nodes: tuple[Array, ...]
    weights: tuple[Array, ...]
    steps: int

    @property
    def products(self) -> int:
        """Operator products used."""
        return sum(len(nodes) for nodes in self.nodes)

    def means(self, function: Any) -> list[float]:
        """uᵀ f(H) u of each probe."""
        pairs = zip(self.nodes, self.weights, strict=True)
        return [float((weights * function(nodes)).sum()) for nodes, weights in pairs]

    def curve(self, low: float, high: float) -> tuple[Array, Array]:
        """Grid and smoothed density from `low` to `high`."""
        grid = np.linspace(low, high, POINTS)
        width = WIDTH * (high - low)
        total = np.zeros(POINTS)
        for nodes, weights in zip(self.nodes, self.weights, strict=True):
            bumps = np.exp(-0.5 * ((grid[:, None] - nodes) / width) ** 2)
            total += bumps @ weights / (width * np.sqrt(2 * np.pi))
        return grid, total / len(self.nodes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: nodes and weights, moments and shares with intervals, curves.

        `moments`: tr Hᵏ/N for k = 1…4. `negative`: the share of eigenvalues below zero, as far as
        quadrature tells. `whole` and `middle`: the curve over the range of all nodes, and over the
        range that holds the middle 98% of the weight.
        """
        every = np.concatenate(self.nodes)
        weight = np.concatenate(self.weights)
        order = np.argsort(every)
        share = np.cumsum(weight[order]) / weight.sum()
        inner = every[order][(share >= 0.01) & (share <= 0.99)]
        low, high = float(every.min()), float(every.max())
        margin = 3 * WIDTH * (high - low) or 1.0
        curves = {"whole": (low - margin, high + margin)}
        if len(inner) > 1 and inner[-1] > inner[0]:
            reach = 0.5 * float(inner[-1] - inner[0])
            curves["middle"] = (float(inner[0]) - reach, float(inner[-1]) + reach)
        many = len(self.nodes) > 1
        return {
            "nodes": [nodes.tolist() for nodes in self.nodes],
            "weights": [weights.tolist() for weights in self.weights],
            "steps": self.steps,
            "probes": len(self.nodes),
            "moments": [
                student(self.means(lambda x, k=k: x**k)).to_dict() for k in range(1, MOMENTS + 1)
            ]
            if many
            else [],
            "negative": student(self.means(lambda x: x < 0)).to_dict() if many else None,
            "curves": {
                name: {"x": x.tolist(), "density": y.tolist()}
                for name, (x, y) in ((n, self.curve(*ends)) for n, ends in curves.items())
            },
            "products": self.products,
        }


def density(
    operator: Operator,
    size: int,
    *,
    seed: int,
    probes: int = 8,
    steps: int = 40,
    device: torch.device | None = None,
    done: Sequence[tuple[Array, Array]] = (),
) -> Density:
    """The spectral density by `probes` Lanczos runs of `steps` products.

    Args:
        operator: symmetric, on float64 vectors of length `size`.
        size: N.
        seed: of the probes.
        probes: independent starts; two or more for intervals.
        steps: Lanczos steps of each.
        device: of the vectors.
        done: nodes and weights of the first probes, found earlier with the same seed.

    Raises:
        ConfigError: a number below 1.
    """
    for name, value in (("density_probes", probes), ("density_steps", steps)):
        check_whole(name, value)
    found = list(done)
    for probe in range(len(found), probes):
        found.append(quadrature(operator, signs(size, seed, probe, device), steps))
    nodes, weights = zip(*found, strict=True)
    return Density(tuple(nodes), tuple(weights), steps)
