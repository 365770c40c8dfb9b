r"""Singular values of a model's blocks and of their products: exact, with stated residuals.

A value that has not converged is given as the bound it is (a Rayleigh quotient), never as a value.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from polyak.analysis import estimates
from polyak.analysis.estimates import Estimate
from polyak.analysis.jacobian import quantiles
from polyak.analysis.jacobian.chain import Chain
from polyak.analysis.jacobian.inverse import Inverse
from polyak.analysis.jacobian.linear import Linear
from polyak.analysis.jacobian.maps import Map
from polyak.analysis.jacobian.quantiles import Quantile
from polyak.analysis.lanczos import Ends, extremes
from polyak.checks import check_whole
from polyak.errors import ConfigError
from polyak.statistics.intervals import student

PUBLISHED = (74, 11)
"""The release sketches with 74 random vectors and takes the 11th largest for σ_min."""
SINGULAR = {torch.float64: 1e-14, torch.float32: 1e-6}
"""A σ_min below this part of a random direction's gain cannot be told from 0."""
TELLING = 1e-10
"""A bound this far below a random direction's gain needs no improving."""
CONFIRMED = 1e-6
"""How closely a product must confirm a σ_min found by solves, relative."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How hard to try.

    Raises:
        ConfigError: a value that cannot work.
    """

    quantiles: tuple[float, ...] = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
    tolerance: float = 1e-8
    max_products: int = 1000
    dense_below: int = 2048
    probes: int = 2
    steps: int = 96
    norm_probes: int = 32
    published_draws: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for q in self.quantiles:
            if not 0 < q <= 1:
                raise ConfigError(f"quantiles: {q} must be above 0 and at most 1")
        if not 0 < self.tolerance < 1e-2:
            raise ConfigError(f"tolerance={self.tolerance} must be between 0 and 0.01")
        for name, least in (("max_products", 10), ("probes", 1), ("steps", 4), ("norm_probes", 2)):
            check_whole(name, getattr(self, name), least)


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Singular values of one map. Where it loses directions by structure, they are left out of
    `sigma_min`, `kappa` and `quantiles`, and counted.
    """

    name: str
    method: Literal["dense", "pieces", "matrix-free"]
    shape: tuple[int, int]
    restricted: tuple[int, int]
    exact_zeros: int
    near_zeros: int
    exact_gain: float
    near_gain: float
    streams: tuple[str, ...]
    sigma_max: Estimate
    sigma_min: Estimate
    restricted_max: Estimate
    kappa: Estimate
    frobenius: Estimate
    stable_rank: Estimate
    quantiles: tuple[Quantile, ...]
    published: tuple[float, ...]
    log_sigma_min: Estimate
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def spectrum(map_: Map, options: Options | None = None) -> Spectrum:
    """The spectrum of one map.

    Args:
        map_: of `block_maps`, or a `product`.
        options: how hard to try.
    """
    options = options or Options()
    began = time.perf_counter()
    with torch.no_grad():
        whole, restricted, zeros = map_.whole, map_.restricted, map_.zeros
        same = restricted.enter is None and restricted.leave is None
        generator = torch.Generator().manual_seed(options.seed)
        dense = max(*whole.shape, *restricted.shape) <= options.dense_below
        if dense:
            values = torch.linalg.svdvals(whole.dense()).double()
            inner = values if same else torch.linalg.svdvals(restricted.dense()).double()
            top, inner_top = estimates.exact(values[0]), estimates.exact(inner[0])
            bottom = estimates.smallest(inner)
            frobenius = estimates.exact(values.norm())
            found = quantiles.exact(inner.cpu().numpy(), options.quantiles)
        else:
            top = _largest(whole, options)
            inner_top = top if same else _largest(restricted, options)
            frobenius = _frobenius(whole, options, generator)
            inverse, scale, bound = _inverse(restricted)
            bottom = _bottom(restricted, inverse, scale, bound, options)
            sound = bottom.kind == "value"
            found = _quantiles(
                restricted,
                inverse if sound else None,
                bottom.low or 0.0,
                frobenius.high if inner_top.high is None else inner_top.high,
                options,
            )
        published = [published_statistic(whole, generator) for _ in range(options.published_draws)]
    return Spectrum(
        name=map_.name,
        method="dense" if dense else "pieces" if isinstance(whole, Chain) else "matrix-free",
        shape=whole.shape,
        restricted=restricted.shape,
        exact_zeros=zeros.exact,
        near_zeros=zeros.near,
        exact_gain=zeros.exact_gain,
        near_gain=zeros.near_gain,
        streams=zeros.streams,
        sigma_max=top,
        sigma_min=bottom,
        restricted_max=inner_top,
        kappa=estimates.ratio(inner_top, bottom),
        frobenius=frobenius,
        stable_rank=estimates.stable_rank(frobenius, top),
        quantiles=tuple(found),
        published=tuple(published),
        log_sigma_min=estimates.log(bottom),
        seconds=time.perf_counter() - began,
    )


def published_statistic(linear: Linear, generator: torch.Generator) -> float:
    """What the release calls σ_min: a value near the top, by a range finder of 74 vectors.

    Y = JΩ with 74 normal vectors Ω, Q its orthonormal basis; the singular values of QᵀJ in
    ascending order, the last of the first 64, which is the 11th largest of the 74.
    """
    count, place = PUBLISHED
    count = min(count, *linear.shape)
    sketch = linear.times(linear.random(linear.inputs, count, generator))
    basis = torch.linalg.qr(sketch.flatten(0, 1)).Q
    image = linear.transposed(basis.reshape(sketch.shape))
    values = torch.linalg.svdvals(image.flatten(0, 1))
    return float(values[min(place, count) - 1])


def _inverse(linear: Linear) -> tuple[Inverse | None, float, float]:
    """The inverse of G, the scale of what it returns, and a gain that bounds σ_min.

    None where there is no inverse, or σ_min is below what the arithmetic can tell from 0.
    """
    if not isinstance(linear, Chain) or not Inverse.possible(linear):
        return None, 1.0, math.inf
    inverse = Inverse(linear)
    probe = _probe(linear)
    # half of G⁻¹ overflows later than all of it, and leads to the smallest direction as well
    half = inverse.core.solve if linear.tall else inverse.core.solve_transposed
    gains = []
    for image in (inverse(probe), half(probe)):
        size = float(image.abs().max())
        if math.isfinite(size) and size > 0:
            gains.append(linear.gain(image / size))
    scale = float(inverse(probe).abs().max())
    bound = min(gains, default=math.inf)
    floor = SINGULAR[linear.like.dtype] * linear.gain(probe)
    if not math.isfinite(scale) or scale <= 0 or scale**-0.5 < floor:
        return None, 1.0, bound
    return inverse, scale, bound


def _ends(
    linear: Linear, operator: Callable[[Tensor], Tensor], options: Options, *, bottom: bool = False
) -> Ends:
    most = min(options.max_products, 200) if bottom else options.max_products
    return extremes(
        linear.flat(operator),
        linear.tokens * linear.side,
        count=1,
        bottom=bottom,
        tolerance=options.tolerance,
        max_products=most,
        seed=options.seed,
        device=linear.like.device,
    )


def _largest(linear: Linear, options: Options) -> Estimate:
    """σ_max from the largest eigenvalue of G."""
    pair = _ends(linear, linear.gram, options).top[0]
    square = max(pair.value, 0.0)
    value, residual = math.sqrt(square), estimates.relative(pair.residual, square)
    if not pair.converged:
        return Estimate(value=value, low=value, residual=residual, kind="lower bound")
    low, high = (math.sqrt(max(square + s * pair.residual, 0.0)) for s in (-1, 1))
    return Estimate(value=value, low=low, high=high, residual=residual)


def _bottom(
    linear: Linear, inverse: Inverse | None, scale: float, bound: float, options: Options
) -> Estimate:
    """σ_min by Lanczos on G⁻¹, confirmed by a product with J itself."""
    if inverse is None:
        return _bound(linear, bound, None, options)
    # G⁻¹/scale: where J is all but singular, squares of G⁻¹ alone would overflow
    ends = _ends(linear, lambda u: inverse(u) / scale, options)
    pair = ends.top[0]
    vector = ends.vectors[0].to(linear.like).reshape(linear.tokens, linear.side, 1)
    direct = linear.gain(vector)  # bounds σ_min whatever the solves were worth
    if not (pair.value > 0 and direct > 0):
        return _bound(linear, direct, None, options)
    value = (pair.value * scale) ** -0.5
    off = abs(value / direct - 1)
    residual = max(estimates.relative(pair.residual, pair.value), off)
    if not pair.converged or not off <= max(CONFIRMED, options.tolerance):
        return _bound(linear, direct, residual, options)
    return Estimate(
        value=value, low=value / (1 + residual), high=value / (1 - residual), residual=residual
    )


def _bound(linear: Linear, direct: float, residual: float | None, options: Options) -> Estimate:
    """A gain that was found; if it says little, the least that Lanczos on G finds."""
    if not direct < TELLING * linear.gain(_probe(linear)):
        ends = _ends(linear, linear.gram, options, bottom=True)
        vector = ends.vectors[-1].to(linear.like).reshape(linear.tokens, linear.side, 1)
        found = linear.gain(vector)
        direct = min(direct, found) if math.isfinite(direct) else found
    return Estimate(value=direct, high=direct, residual=residual, kind="upper bound")


def _probe(linear: Linear) -> Tensor:
    return linear.random(linear.side, 1, torch.Generator().manual_seed(0))


def _frobenius(linear: Linear, options: Options, generator: torch.Generator) -> Estimate:
    """‖J‖_F from E‖Jz‖² = ‖J‖_F², z of random signs, with a Student interval."""
    signs = linear.random(linear.inputs, options.norm_probes, generator).sign()
    samples = linear.times(signs).double().square().sum((0, 1))
    found = student(samples.tolist())
    low, high = (math.sqrt(max(x, 0.0)) for x in (found.low, found.high))
    return Estimate(value=math.sqrt(found.value), low=low, high=high, kind="interval")


def _quantiles(
    linear: Linear, inverse: Inverse | None, least: float, most: float | None, options: Options
) -> list[Quantile]:
    assert most is not None, "‖J‖_F has an interval"
    return quantiles.estimated(
        linear.flat(linear.gram),
        None if inverse is None else linear.flat(inverse),
        linear.tokens * linear.side,
        options.quantiles,
        ends=(least, most),
        probes=options.probes,
        steps=options.steps,
        seed=options.seed,
    )
