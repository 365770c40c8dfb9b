"""Trace, density, ends, ascent and slices: closed forms, dense matrices, and coverage."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.func import functional_call

from polyak import Transformer, rules
from polyak.analysis.ascent import rises
from polyak.analysis.density import density
from polyak.analysis.hessian import Surface, dense
from polyak.analysis.lanczos import extremes, quadrature
from polyak.analysis.landscape import direction, slice_1d, slice_2d
from polyak.analysis.scale import scaled, scales
from polyak.analysis.trace import signs, trace
from polyak.errors import ConfigError
from polyak.statistics.intervals import needed, two_stage

Build = Callable[..., Transformer]
Surfaces = Callable[..., Surface]


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    """A dense matrix with these eigenvalues in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q @ (values.double()[:, None] * q.T)


def outliers(n: int = 300) -> Tensor:
    """A spectrum like a network's: a bulk about zero, few large values, some negative."""
    generator = torch.Generator().manual_seed(1)
    bulk = 0.2 * torch.randn(n - 6, generator=generator, dtype=torch.float64) + 0.1
    return torch.cat([bulk, torch.tensor([30.0, 12.0, 7.0, 5.0, -2.0, -3.0], dtype=torch.float64)])


# Ends


@pytest.mark.parametrize("n", [1, 3, 70, 300])
def test_known_spectra_are_found_at_both_ends(n: int) -> None:
    values = outliers(300)[-n:].sort().values
    matrix = symmetric(values)
    found = extremes(lambda v: matrix @ v, n, count=3, tolerance=1e-10, basis=40)
    k = min(3, n)
    top = [pair.value for pair in found.top]
    bottom = [pair.value for pair in found.bottom]
    assert top == pytest.approx(values.flip(0)[:k].tolist(), abs=1e-8 * 30)
    assert bottom == pytest.approx(values[:k].tolist(), abs=1e-8 * 30)
    assert all(pair.converged for pair in (*found.top, *found.bottom))
    gram = found.vectors[:k] @ found.vectors[:k].T
    assert (gram - torch.eye(k, dtype=torch.float64)).abs().max() < 1e-10


def test_what_has_not_converged_is_a_bound() -> None:
    values = torch.linspace(-1, 1, 400, dtype=torch.float64)  # no gaps: slow
    matrix = symmetric(values)
    found = extremes(lambda v: matrix @ v, 400, count=2, tolerance=1e-8, max_products=40)
    assert found.products <= 40
    assert not any(pair.converged for pair in (*found.top, *found.bottom))
    for index in range(2):
        assert found.top[index].value < float(values[-1 - index])
        assert found.bottom[index].value > float(values[index])
        for pair in (found.top[index], found.bottom[index]):
            assert float((values - pair.value).abs().min()) <= pair.residual


def test_an_operator_with_few_distinct_values_does_not_break_down() -> None:
    values = torch.zeros(200, dtype=torch.float64)
    values[0], values[1] = 3.0, -1.0
    matrix = symmetric(values)
    found = extremes(lambda v: matrix @ v, 200, count=2, tolerance=1e-9)
    assert [pair.value for pair in found.top] == pytest.approx([3, 0], abs=1e-10)
    assert [pair.value for pair in found.bottom] == pytest.approx([-1, 0], abs=1e-10)
    nodes, weights = quadrature(lambda v: matrix @ v, signs(200, 0, 0), 50)
    assert len(nodes) <= 4
    assert float(weights.sum()) == pytest.approx(1)


# Trace


def test_intervals_cover_the_truth_at_their_rate_and_are_not_wide() -> None:
    values = outliers()
    matrix = symmetric(values)
    truth, n = float(values.sum()), len(values)
    ends = extremes(lambda v: matrix @ v, n, count=3, tolerance=1e-2)
    # exact standard deviations of one probe: 2(‖A‖² − Σ A_ii²) with signs
    projector = torch.eye(n, dtype=torch.float64) - ends.vectors.T @ ends.vectors
    inner = projector @ matrix @ projector
    spread = {
        name: math.sqrt(2 * float(a.square().sum() - a.diagonal().square().sum()))
        for name, a in (("deflated", inner), ("hutchinson", matrix))
    }
    repeats = 1000
    covered = {"deflated": 0, "hutchinson": 0}
    widths: dict[str, list[float]] = {"deflated": [], "hutchinson": []}
    for seed in range(repeats):
        found = trace(
            lambda v: matrix @ v,
            n,
            seed=seed,
            vectors=ends.vectors,
            images=ends.images,
            precision=0.05,
            max_probes=60,
        )
        for name in covered:
            interval = getattr(found, name)
            covered[name] += interval.low <= truth <= interval.high
            ideal = 1.96 * spread[name] / math.sqrt(interval.samples)
            widths[name].append(interval.half_width / ideal)
        assert found.products == 20 + found.deflated.samples
    for name, count in covered.items():
        assert count >= stats.binom.ppf(0.001, repeats, 0.95), (name, count / repeats)
        assert count <= 0.985 * repeats, (name, count / repeats)
        assert np.mean(widths[name]) <= 1.2
        assert np.quantile(widths[name], 0.9) <= 1.5
    assert spread["deflated"] < 0.2 * spread["hutchinson"]


def test_deflation_is_exact_for_directions_that_have_not_converged() -> None:
    matrix = symmetric(outliers())
    basis, _ = torch.linalg.qr(torch.randn(300, 290, dtype=torch.float64))
    rows = basis.T.contiguous()
    found = trace(lambda v: matrix @ v, 300, seed=3, vectors=rows, images=rows @ matrix)
    assert found.deflated.low <= float(matrix.trace()) <= found.deflated.high


def test_a_precision_that_is_not_reached_is_said() -> None:
    values = outliers()
    values -= values.mean()  # the trace is zero: no relative precision exists
    matrix = symmetric(values)
    found = trace(lambda v: matrix @ v, 300, seed=0, max_probes=20)
    assert not found.reached
    assert found.deflated.samples == 20
    assert found.deflated.low <= 0 <= found.deflated.high


def test_the_trace_of_a_diagonal_is_exact() -> None:
    values = outliers(50)
    found = trace(lambda v: values * v, 50, seed=0)
    assert found.deflated.value == pytest.approx(float(values.sum()))
    assert found.deflated.half_width == pytest.approx(0, abs=1e-9)
    assert found.reached


def test_a_two_stage_interval_covers_and_is_about_as_wide_as_asked_for() -> None:
    generator = np.random.default_rng(0)
    covered, wide = 0, 0
    for _ in range(2000):
        pilot = generator.normal(size=20)
        n = needed(float(pilot.std(ddof=1)), 20, 0.3, 1000)
        found = two_stage(list(pilot), list(generator.normal(size=n)))
        wide += found.half_width > 0.3
        covered += found.low <= 0 <= found.high
    assert covered >= stats.binom.ppf(0.001, 2000, 0.95)
    assert covered <= 0.98 * 2000
    assert wide <= 0.5 * 2000  # where the fresh samples spread wider than the pilot


# Density


@pytest.mark.parametrize("rule", ["gradient_descent", "triple_momentum"])
def test_moments_are_those_of_the_dense_hessian(rule: str, small_surface: Surfaces) -> None:
    surface = small_surface(rule)
    matrix = dense(surface.hessian, surface.size)
    n = surface.size
    found = density(lambda v: matrix @ v, n, seed=0, probes=40, steps=12)
    for k, moment in enumerate(found.to_dict()["moments"], start=1):
        truth = float(torch.linalg.matrix_power(matrix, k).trace()) / n
        spread = moment["half_width"] / stats.t.ppf(0.975, 39)
        assert abs(moment["value"] - truth) <= 4 * spread  # four standard errors
    # of one probe, moments are exact: uᵀHᵏu
    u = signs(n, 0, 0) / math.sqrt(n)
    for k in range(1, 12):
        exact = float(u @ torch.linalg.matrix_power(matrix, k) @ u)
        got = float((found.weights[0] * found.nodes[0] ** k).sum())
        assert got == pytest.approx(exact, rel=1e-9, abs=1e-9 * float(matrix.norm()) ** k / n)


def test_full_lanczos_gives_the_exact_spectral_measure() -> None:
    values = torch.linspace(-2, 5, 40, dtype=torch.float64)
    matrix = symmetric(values)
    start = signs(40, 1, 0)
    nodes, weights = quadrature(lambda v: matrix @ v, start, 40)
    assert nodes == pytest.approx(values.numpy(), abs=1e-10)
    vectors = torch.linalg.eigh(matrix).eigenvectors
    exact = (vectors.T @ start / math.sqrt(40)).square()
    assert weights == pytest.approx(exact.numpy(), abs=1e-8)


def test_curves_hold_all_the_weight_and_probes_found_earlier_are_used() -> None:
    values = outliers()
    matrix = symmetric(values)
    found = density(lambda v: matrix @ v, 300, seed=2, probes=4, steps=30)
    content = found.to_dict()
    curve = content["curves"]["whole"]
    mass = np.trapezoid(curve["density"], curve["x"])
    assert mass == pytest.approx(1, abs=0.01)
    share = float((values < 0).double().mean())
    assert content["negative"]["low"] - 0.05 <= share <= content["negative"]["high"] + 0.05
    done = list(zip(found.nodes[:3], found.weights[:3], strict=True))
    again = density(lambda v: matrix @ v, 300, seed=2, probes=4, steps=30, done=done)
    assert again.to_dict() == content


# Sharpness within a radius


class Bowl(nn.Module):
    """Logits of two classes whose loss depends on one weight vector, convex in it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, ids: Tensor) -> Tensor:
        inputs = torch.nn.functional.one_hot(ids, 4).to(self.weight.dtype)
        z = inputs @ self.weight
        return torch.stack([z, -z], dim=-1)


def test_the_rise_found_is_the_largest_of_a_fine_search() -> None:
    ids = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 1, 1, 1]])
    model = Bowl(torch.tensor([0.3, -0.2, 0.0, 0.0], dtype=torch.float64))
    surface = Surface(model, ids, dtype=torch.float64)
    base = surface.loss()
    for rho in (0.1, 1.0):
        angles = torch.linspace(0, 2 * math.pi, 2000, dtype=torch.float64)
        circle = [torch.stack([a.cos(), a.sin(), 0 * a, 0 * a]) * rho for a in angles]
        best = max(surface.loss(shift) for shift in circle) - base
        (found,) = rises(surface, [rho], directions=torch.eye(4).double()[:2], steps=30)
        assert found.at_least == pytest.approx(best, rel=1e-5)
        assert found.at_least >= found.sam
        assert found.first_order == pytest.approx(rho * float(surface.gradient().norm()))


def test_starts_along_eigenvectors_beat_the_gradient_at_a_saddle(small_surface: Surfaces) -> None:
    surface = small_surface("heavy_ball")
    ends = extremes(surface.hessian, surface.size, count=1)
    plain, more = (
        rises(surface, [0.3], directions=directions, steps=4)[0]
        for directions in (None, ends.vectors[:1])
    )
    assert set(more.by_start) == {"gradient", "+eigenvector 1", "−eigenvector 1", "random 1"}
    assert more.at_least >= plain.at_least >= plain.sam > 0
    assert max(more.by_start.values()) == more.at_least


# Slices


@pytest.mark.parametrize("rule", rules.names())
def test_slices_are_direct_evaluations_at_moved_weights(
    rule: str, small_model: Build, tokens: Tensor
) -> None:
    model = small_model(rule)
    surface = Surface(model, tokens, dtype=torch.float64)
    found = slice_2d(surface, seed=3, points=3, radius=0.7)
    one, two = direction(surface, 3), direction(surface, 4)
    weights = dict(model.named_parameters())
    for i, a in enumerate(found["at"]):
        for j, b in enumerate(found["at"]):
            moved = surface.view.split(surface.weights + a * one + b * two)
            logits = functional_call(model, {**weights, **moved}, (tokens[:, :-1],))
            loss = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean()
            assert found["losses"][i][j] == pytest.approx(float(loss), abs=1e-12)
    line = slice_1d(surface, seed=3, points=3, radius=0.7, directions=2)
    assert line["losses"][0] == [row[1] for row in found["losses"]]
    assert line["losses"][1] == found["losses"][1]


def test_directions_have_the_norm_of_every_filter(small_surface: Surfaces) -> None:
    surface = small_surface("adamw")
    drawn = surface.view.split(direction(surface, 0))
    for name, weight in surface.view.split(surface.weights).items():
        if weight.dim() < 2:  # gains and scalars are held fixed
            assert not drawn[name].any()
        else:
            assert (drawn[name].norm(dim=1) - weight.norm(dim=1)).abs().max() < 1e-12
    assert torch.equal(direction(surface, 0), direction(surface, 0))
    assert not torch.equal(direction(surface, 0), direction(surface, 1))


def test_filters_of_a_transposed_matrix_are_its_columns(tokens: Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=6, n_layer=1, n_head=2)
    surface = Surface(transformers.GPT2LMHeadModel(config).eval(), tokens)
    name = "transformer.h.0.mlp.c_fc.weight"
    drawn = surface.view.split(direction(surface, 0))[name]
    weight = surface.view.split(surface.weights)[name]
    assert (drawn.norm(dim=0) - weight.norm(dim=0)).abs().max() < 1e-6
    assert (drawn.norm(dim=1) - weight.norm(dim=1)).abs().max() > 1e-3


# Scale


def test_reparametrisation_changes_the_raw_spectrum_and_not_the_scaled_one(
    small_model: Build, tokens: Tensor
) -> None:
    model = small_model("triple_momentum")
    plain = Surface(model, tokens, dtype=torch.float64)
    with torch.no_grad():  # same function: the gain times c, the matrix behind it by c
        for block in model.blocks:
            block.attention.norm.weight.mul_(10)
            block.attention.qkv.weight.div_(10)
    other = Surface(model, tokens, dtype=torch.float64)
    assert other.loss() == pytest.approx(plain.loss(), abs=1e-12)

    def ends(surface: Surface, kind: str | None) -> list[float]:
        operator = surface.hessian
        if kind is not None:
            operator = scaled(operator, scales(surface, kind))  # type: ignore[arg-type]
        found = extremes(operator, surface.size, count=2, tolerance=1e-10)
        return [pair.value for pair in (*found.top, *found.bottom)]

    raw, moved = ends(plain, None), ends(other, None)
    assert abs(moved[0] / raw[0] - 1) > 1
    for kind in ("elements", "filters", "tensors"):
        assert ends(other, kind) == pytest.approx(ends(plain, kind), rel=1e-8)


def test_the_scaled_operator_is_d_h_d(small_surface: Surfaces) -> None:
    surface = small_surface("gradient_descent")
    d = scales(surface)
    exact = d[:, None] * dense(surface.hessian, surface.size) * d
    assert (dense(scaled(surface.hessian, d), surface.size) - exact).abs().max() < 1e-12


# What is refused


def test_numbers_that_cannot_work_are_refused(small_surface: Surfaces) -> None:
    surface = small_surface("gradient_descent")
    h, n = surface.hessian, surface.size
    for call, says in (
        (lambda: extremes(h, n, count=0), "top_k=0 must be a whole number of at least 1"),
        (lambda: trace(h, n, seed=0, precision=0), "trace_precision=0 must be above 0"),
        (
            lambda: trace(h, n, seed=0, max_probes=3),
            "max_probes=3 must be a whole number of at least 8",
        ),
        (
            lambda: density(h, n, seed=0, probes=0),
            "density_probes=0 must be a whole number of at least 1",
        ),
        (lambda: rises(surface, [0.0]), "rho=0.0 must be above 0"),
        (lambda: slice_1d(surface, seed=0, points=4), "points=4 must be odd"),
        (lambda: slice_2d(surface, seed=0, radius=-1), "slice_radius=-1 must be above 0"),
        (lambda: scales(surface, "weights"), "unknown scale 'weights'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match=says):
            call()
