"""Numbers of the path against closed forms: straight lines, rotations, filters, norms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import jacrev

from polyak import Transformer
from polyak.analysis.dynamics.path import _walk, cosine, gain, kept, motion
from polyak.analysis.dynamics.summaries import Tally, summary
from polyak.analysis.dynamics.trajectory import Trajectory, Watched
from polyak.statistics.clusters import jackknife

Build = Callable[..., Transformer]


def walk(xs: list[Tensor]) -> Any:
    tally = Tally()
    _walk(tally, Trajectory(xs))
    return tally.summaries()


def test_a_straight_path_has_no_turn_and_no_detour() -> None:
    u = torch.randn(2, 3, 5, dtype=torch.float64)
    found = walk([1.0 + t * u for t in range(4)])
    assert found["2/turn"].mean.value == pytest.approx(1)
    assert found["2/damping"].mean.value == pytest.approx(0, abs=1e-12)
    assert found["whole/detour"].quantiles == pytest.approx((1, 1, 1))


@pytest.mark.parametrize("angle", [0.1, 1.0, 2.0])
def test_a_circle_turns_by_its_angle(angle: float) -> None:
    xs = [
        torch.tensor([math.cos(t * angle), math.sin(t * angle)], dtype=torch.float64).expand(
            2, 3, 2
        )
        for t in range(4)
    ]
    found = walk(xs)
    assert found["3/turn"].mean.value == pytest.approx(math.cos(angle))
    assert found["3/damping"].mean.value == pytest.approx(1 - math.cos(angle))
    side = 2 * math.sin(angle / 2)
    assert found["1/update"].mean.value == pytest.approx(side / math.sqrt(2))
    whole = 2 * abs(math.sin(1.5 * angle))
    assert found["whole/detour"].mean.value == pytest.approx(3 * side / whole)


def test_increments_of_a_filter_show_its_damping() -> None:
    a, v = 0.7, torch.randn(2, 3, 5, dtype=torch.float64)
    x, xs = torch.zeros_like(v), []
    for _ in range(4):
        xs.append(x)
        x, v = x + v, a * v
    assert walk(xs)["3/damping"].mean.value == pytest.approx(1 - a)


def test_without_a_norm_a_stream_s_gain_is_beta(ids: Tensor, tiny: Build) -> None:
    model = tiny(rule="heavy_ball", rule_options={"state_norm": "none", "beta": 0.83})
    for block in model.blocks:
        for rule in block.rules.values():  # type: ignore[union-attr, operator]
            rule.beta_raw.data.fill_(math.log(0.83 / 0.17))
    found = motion(Watched(model), ids).numbers
    for place in range(1, 5):
        one = found[f"{place}/v/gain"]
        assert one.mean is not None
        assert one.mean.value == pytest.approx(0.83, abs=1e-12)


def test_behind_a_norm_the_gain_is_beta_times_the_norm_s_derivative(
    ids: Tensor, tiny: Build
) -> None:
    watched = Watched(tiny(rule="triple_momentum"))
    step = watched.run(ids[:1, :3]).substeps[1]
    rule, generator = step.rule, torch.Generator().manual_seed(0)
    z = torch.randn(
        step.state.v.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    w = rule.beta * step.state.v + rule.gamma * step.values[0]
    dense = jacrev(rule.norm)(w)  # (1, T, d, 1, T, d)
    expected = rule.beta * torch.einsum("btiauj,auj->bti", dense, z)
    torch.testing.assert_close(
        gain(step, "v", generator), expected.norm(dim=-1) / z.norm(dim=-1), rtol=0, atol=1e-8
    )
    sigma = w.std(-1, correction=0)
    rough = rule.beta * rule.norm.weight.square().mean().sqrt() / sigma
    assert float((gain(step, "v", generator) / rough).log().abs().max()) < 1.5


def test_numbers_of_tokens_that_have_none_are_left_out_and_counted() -> None:
    zero, v = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    v[0, 0] = 0
    found = summary(cosine(v, v))
    assert found.missing == pytest.approx(1 / 6)
    assert found.mean is not None
    assert found.mean.value == pytest.approx(1)
    nothing = summary(kept(zero, zero))
    assert (nothing.mean, nothing.quantiles, nothing.missing) == (None, None, 1.0)


def test_jackknife_intervals_of_ratios_cover() -> None:
    draw = np.random.default_rng(0)
    covered, repeats = 0, 1000
    for _ in range(repeats):
        size = draw.gamma(8.0, 1.0, 8)
        rows = np.stack([0.3 * size + draw.normal(0, 0.5, 8), size], axis=1)
        found = jackknife(rows, lambda sums: float(sums[0] / sums[1]))
        assert found is not None
        covered += found.low <= 0.3 <= found.high
    assert 0.925 < covered / repeats < 0.975
    assert jackknife(np.zeros((3, 2)), lambda sums: float(sums[0] / sums[1])) is None


def test_intervals_over_sequences_cover_where_tokens_depend() -> None:
    draw, covered, repeats = torch.Generator().manual_seed(0), 0, 600
    for _ in range(repeats):
        own = torch.randn(6, 1, generator=draw, dtype=torch.float64)
        values = own + 0.3 * torch.randn(6, 20, generator=draw, dtype=torch.float64)
        found = summary(values).mean
        assert found is not None
        covered += found.low <= 0 <= found.high
    assert 0.92 < covered / repeats < 0.98
