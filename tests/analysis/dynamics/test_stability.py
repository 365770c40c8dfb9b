"""State maps token by token: dense Jacobians, closed forms, regions known by algebra."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jacrev

from polyak import Transformer, rules
from polyak.analysis._common import math_attention
from polyak.analysis.dynamics.blocks import Some, local_maps, own_blocks, state_blocks, vectors
from polyak.analysis.dynamics.stability import _embedded, stability
from polyak.analysis.dynamics.trajectory import Trajectory, Watched
from polyak.nn.presets import preset_fields

Build = Callable[..., Transformer]
EVERY: list[dict[str, Any]] = [
    *({"rule": name} for name in rules.names()),
    *(preset_fields(name, num_heads=2) for name in ("llama", "momentum_transformer")),
    {"rule": "heavy_ball", "splitting": "simultaneous"},
    {"rule": "adam@attention+residual_momentum@mlp"},
    {"rule": "heavy_ball", "residual_width": 6, "stream_start": "x"},
]
FORMS = ("gradient_descent", "triple_momentum", "adam", "soap")
"""One rule for each kind of state: none, a velocity, two vectors, a matrix too."""
SMALL = {"d_model": 4, "num_layers": 2}


def blocks_of(made: Trajectory, some: Some) -> list[Tensor]:
    """B_i of every substep in the coordinates of all streams."""
    names = list(dict.fromkeys(name for step in made.substeps for name in vectors(step)))
    found = []
    for step in made.substeps:
        own = [own_blocks(step, call, some) for call in range(len(step.points))]
        found.append(_embedded(state_blocks(step, some, own), vectors(step), names))
    return found


@pytest.mark.parametrize("fields", EVERY, ids=str)
def test_products_of_the_blocks_are_the_diagonal_of_the_whole_map_s_jacobian(
    fields: dict[str, Any], ids: Tensor, tiny: Build
) -> None:
    model, inputs = tiny(**{**SMALL, **fields}), ids[:2, :3]
    model.requires_grad_(False)
    made, some = Watched(model).run(inputs), Some(1, torch.arange(3))
    x, state = model.start(inputs[1:])
    names = [name for name, value in state._asdict().items() if value.dim() == 3]
    if len(names) < len(state):
        pytest.skip("matrix streams are held fixed")

    def whole(z: Tensor) -> Tensor:  # (1 + k, T, d)
        x, own = z[:1], state.replace(**dict(zip(names, z[1:, None], strict=True)))
        context = model.context(inputs[1:])
        for block in model.blocks:
            x, own = block(x, own, context)
        return torch.cat([x, *(getattr(own, name) for name in names)])

    with math_attention():
        dense = jacrev(whole)(torch.cat([x, *(getattr(state, name) for name in names)]))
    blocks = blocks_of(made, some)
    for token in range(3):
        expected = dense[:, token, :, :, token].flatten(2).flatten(0, 1)
        product = torch.eye(len(expected), dtype=torch.float64)
        for block in blocks:
            product = block[token] @ product
        torch.testing.assert_close(product, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(fields, marks=() if fields.get("rule") in FORMS else pytest.mark.slow)
        for fields in EVERY
    ],
    ids=str,
)
def test_every_model_has_its_numbers_in_order(
    fields: dict[str, Any], ids: Tensor, tiny: Build
) -> None:
    found = stability(Watched(tiny(**{**SMALL, **fields})), ids[:2, :3], tokens=2)
    names = {key.split("/")[1] for key in found.numbers}
    wanted = {"radius", "norm", "departure", "log_product", "log_norms", "log_radii"}
    assert names - {"retention"} == wanted | {"inside", "ascending"}
    for place in range(1, len(found.labels)):
        values = {name: found.numbers[f"{place}/{name}"].mean for name in names - {"retention"}}
        assert all(one is not None for one in values.values())
        mean = {name: one.value for name, one in values.items() if one is not None}
        assert mean["log_product"] <= mean["log_norms"] + 1e-9
        assert 0 <= mean["inside"] <= 1
        assert 0 <= mean["departure"] <= 1


def closed_form(rule: str, scale: float, a: float, gamma: float, mu: float, nu: float) -> Tensor:
    """M(λ) of the family, p = 1."""
    s = gamma * scale
    if rule == "gradient_descent":
        return torch.tensor([[1 + scale]], dtype=torch.float64)
    mu = 0.0 if rule == "heavy_ball" else mu
    nu = nu if rule == "triple_momentum" else 1.0
    return torch.tensor([[1 + nu * s, nu * (a + s * mu)], [s, a + s * mu]], dtype=torch.float64)


@pytest.mark.parametrize("rule", ["gradient_descent", "heavy_ball", "nesterov", "triple_momentum"])
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.7])
def test_without_norms_the_maps_are_the_family_s(
    rule: str, scale: float, ids: Tensor, tiny: Build
) -> None:
    options = {"state_norm": "none"} if rule != "gradient_descent" else {"update_norm": "none"}
    model = tiny(rule=rule, rule_options=options)
    step = Watched(model).run(ids[:, :-1]).substeps[1]
    value = step.rule.scalar_values()
    expected = closed_form(
        rule,
        scale,
        value.get("beta", 0.0),
        value.get("gamma", 1.0),
        value.get("mu", 0.0),
        value.get("nu", 1.0),
    )
    found = local_maps(step, Some(0, torch.arange(2)), scale, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, expected.expand_as(found), rtol=0, atol=1e-12)


def test_spectral_radii_and_the_region_by_algebra_agree() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(2000):
        a, gamma, mu, nu = (2 * torch.rand(4, generator=draw, dtype=torch.float64)).tolist()
        scale = float(4 * torch.rand((), generator=draw) - 3.5)
        radius = float(
            torch.linalg.eigvals(closed_form("triple_momentum", scale, a, gamma, mu, nu))
            .abs()
            .max()
        )
        s = gamma * scale
        least = -2 * (1 + a) / (nu + 2 * mu)
        most = min(0.0, (1 - a) / mu)
        if abs(radius - 1) > 1e-9:
            assert (radius < 1) == (least < s < most)
        if scale > 0:
            assert radius > 1


def test_of_gradient_descent_the_region_is_the_disc_around_minus_one(
    ids: Tensor, tiny: Build
) -> None:
    watched = Watched(tiny(**SMALL))
    found = stability(watched, ids[:2, :3], tokens=3)
    made = watched.run(ids[:2, :3])
    for place, step in enumerate(made.substeps, start=1):
        values = [
            torch.linalg.eigvals(own_blocks(step, 0, Some(n, torch.arange(3)))) for n in (0, 1)
        ]
        inside = float(((1 + torch.stack(values)).abs() < 1).double().mean())
        one, radius = (found.numbers[f"{place}/{name}"].mean for name in ("inside", "radius"))
        assert one is not None
        assert radius is not None
        assert one.value == pytest.approx(inside)
        largest = (1 + torch.stack(values)).abs().amax(-1).mean()
        assert radius.value == pytest.approx(float(largest))


def test_a_silent_model_moves_nothing(ids: Tensor, tiny: Build) -> None:
    model = tiny(**SMALL)
    for block in model.blocks:
        block.attention.out.weight.data.zero_()  # type: ignore[union-attr]
        block.mlp.down.weight.data.zero_()  # type: ignore[union-attr]
    for name, one in stability(Watched(model), ids[:2, :3]).numbers.items():
        assert one.mean is not None
        expected = 1.0 if name.endswith(("radius", "norm")) else 0.0
        assert one.mean.value == pytest.approx(expected, abs=1e-7), name


def test_streams_are_as_large_as_x_whatever_their_units(ids: Tensor, tiny: Build) -> None:
    """v in other units (γ and 1/ν scaled) is the same rule, and has the same norms."""
    found = []
    for scale in (1.0, 8.0):
        model = tiny(rule="triple_momentum", rule_options={"state_norm": "none"}, **SMALL)
        with torch.no_grad():
            for table in model.streams["v"].parameters():
                table.mul_(scale)
            for block in model.blocks:
                for rule in block.rules.values():  # type: ignore[union-attr, operator]
                    gamma, nu, mu = math.log(2) * scale, 1 / scale, 0.5 / scale
                    rule.gamma_raw.fill_(math.log(math.expm1(gamma)))
                    rule.nu_raw.fill_(math.log(math.expm1(nu)))
                    rule.mu_raw.fill_(math.log(mu / (1 - mu)))
        found.append(stability(Watched(model), ids[:2, :3]).numbers)
    for name, one in found[0].items():
        other = found[1][name].mean
        assert one.mean is not None
        assert other is not None
        if not name.endswith("inside"):
            assert other.value == pytest.approx(one.mean.value, rel=1e-6, abs=1e-9), name
