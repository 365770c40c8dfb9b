"""Symmetry of Jacobians: closed forms, dense matrices, gradients, rotations, every model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from polyak import Transformer, rules
from polyak.analysis.dynamics.asymmetry import (
    Metric,
    asymmetry,
    derivative,
    full_sums,
    own_sums,
    spaced,
    sums,
    symmetric_part,
)
from polyak.analysis.dynamics.field import _core, field_of, random_matrices, untrained
from polyak.analysis.dynamics.loops import circulation, sides
from polyak.analysis.dynamics.trajectory import Watched
from polyak.errors import ConfigError
from polyak.nn import attention
from polyak.nn.presets import preset_fields

Build = Callable[..., Transformer]
T, D = 3, 4
N = T * D


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """x ↦ Ax on all of a sequence's numbers."""
    return lambda x: (x.flatten(1) @ matrix.T).reshape(x.shape)


def measured(function: Callable[[Tensor], Tensor], points: Tensor, probes: int = 3) -> Any:
    generator = torch.Generator().manual_seed(0)
    rows = [
        sums(function, one, probes=probes, own_tokens=points.shape[1], generator=generator)
        for one in torch.split(points, 1)
    ]
    return asymmetry(np.stack(rows), points[0].numel())


@pytest.mark.parametrize(("sign", "r"), [(1.0, 0.0), (-1.0, float("inf"))])
def test_symmetric_and_antisymmetric_maps_are_told_exactly(sign: float, r: float) -> None:
    a = drawn(N, N)
    found = measured(linear(a + sign * a.T), drawn(2, T, D))
    assert found.kappa.value == pytest.approx(sign, abs=1e-12)
    assert found.kappa_token.value == pytest.approx(sign, abs=1e-12)
    assert found.r[0] == pytest.approx(r, abs=1e-5)


def test_a_rotation_s_kappa_is_the_cosine_of_twice_its_angle() -> None:
    angle = 0.4
    turn = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    found = measured(linear(torch.block_diag(*[turn] * 6)), drawn(2, T, D))
    assert found.kappa.value == pytest.approx(np.cos(2 * angle), abs=1e-12)
    assert found.own_share.value == pytest.approx(1)


def test_minus_the_identity_contracts() -> None:
    found = measured(linear(-torch.eye(N, dtype=torch.float64)), drawn(2, T, D))
    assert found.trace.value == pytest.approx(-1)
    points = [(linear(-torch.eye(N, dtype=torch.float64)), drawn(1, T, D))] * 2
    part = symmetric_part(points, seed=0)
    assert (part.top.value, part.bottom.value, part.bounds) == (-1, -1, 0)
    assert part.positive is not None
    assert part.positive.value == 0


def small_field(causal: bool = True) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A non-linear field on 2 tokens of 3 numbers, and a point."""
    a, b = drawn(3, 3, seed=1), drawn(3, 3, seed=2)

    def function(x: Tensor) -> Tensor:
        mixed = x.cumsum(1) if causal else x.flip(1)
        return torch.tanh(mixed @ a) + x.square() @ b

    return function, drawn(1, 2, 3, seed=3)


def test_over_all_signs_the_sums_are_those_of_the_dense_jacobian() -> None:
    function, point = small_field()
    j = jacrev(function)(point).reshape(6, 6)
    blocks = [j[3 * i : 3 * i + 3, 3 * i : 3 * i + 3] for i in range(2)]
    products, every = derivative(function, point), torch.arange(2)
    rows = []
    for z in itertools.product((-1.0, 1.0), repeat=6):
        probe = torch.tensor(z, dtype=torch.float64).reshape(2, 3)
        rows.append(full_sums(products, probe) + own_sums(function, point, probe, every))
    expected = [
        (j @ j).trace(),
        j.square().sum(),
        j.trace(),
        sum((block @ block).trace() for block in blocks),
        sum(block.square().sum() for block in blocks),
    ]
    assert np.mean(rows, axis=0) == pytest.approx([float(x) for x in expected], abs=1e-8)
    # of a causal field, tr J² is that of the diagonal blocks
    assert float(expected[0]) == pytest.approx(float(expected[3]), abs=1e-12)


def test_products_and_the_symmetric_part_are_the_dense_ones() -> None:
    function, point = small_field(causal=False)
    j = jacrev(function)(point).reshape(6, 6)
    norm = torch.nn.LayerNorm(3, dtype=torch.float64).requires_grad_(False)
    n = jacrev(norm)(point).reshape(6, 6)
    metric = Metric(derivative(function, point), derivative(norm, point))
    z = drawn(2, 3, 1)
    assert torch.allclose(metric.times(z).flatten(), n.T @ j @ z.flatten(), atol=1e-8)
    assert torch.allclose(metric.transposed(z).flatten(), j.T @ n @ z.flatten(), atol=1e-8)
    values = torch.linalg.eigvalsh((j + j.T) / 2)
    part = symmetric_part([(function, point)] * 2, seed=0)
    assert part.top.value == pytest.approx(float(values[-1]), abs=1e-8)
    assert part.bottom.value == pytest.approx(float(values[0]), abs=1e-8)


def energy(x: Tensor) -> Tensor:
    """½ Σ_ij exp⟨x_i, x_j⟩ of one sequence: attention with tied weights ascends it."""
    return 0.5 * torch.exp(x @ x.T / D).sum()


def test_tied_attention_without_a_softmax_is_a_gradient() -> None:
    tied = vmap(grad(energy))
    point = 0.5 * drawn(2, T, D)
    scores = torch.exp(point @ point.mT / D)
    torch.testing.assert_close(tied(point), scores @ point / D)
    found = measured(tied, point)
    assert found.kappa.value == pytest.approx(1, abs=1e-8)
    loop = circulation(tied, point, 0.1 * drawn(2, T, D, seed=4), 0.1 * drawn(2, T, D, seed=5))
    assert loop.share.value < 1e-6
    softmax = measured(lambda x: torch.softmax(x @ x.mT / D, -1) @ x, point)
    assert 0.5 < softmax.kappa.value < 1 - 1e-6


def test_the_circulation_of_a_linear_field_is_its_antisymmetry() -> None:
    j, a, b = drawn(N, N), drawn(2, T, D, seed=1), drawn(2, T, D, seed=2)
    x = drawn(2, T, D, seed=3)
    whole = sides(linear(j), x, a, b, 1).sum(0)
    expected = torch.einsum("bi,ij,bj->b", a.flatten(1), j.T - j, b.flatten(1))
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-10)
    found = circulation(linear(j), x, a, b)
    assert found.floor < 1e-12
    area = a.flatten(1).norm(dim=1) * b.flatten(1).norm(dim=1)
    assert found.per_area.value == pytest.approx(float((expected / area).mean()))
    assert circulation(linear(j + j.T), x, a, b).share.value < 1e-12


def test_random_matrices_have_the_kappa_of_random_matrices() -> None:
    found = random_matrices(6, 8, sequences=6, probes=8, seed=0)
    for name, kappa, own in (
        ("random", 1 / 48, 1 / 6),
        ("triangular", 2 / (8 * 7), 2 / 7),  # 6 diagonal blocks of 21
    ):
        one = found[name]
        assert one.kappa is not None
        assert one.own_share is not None
        assert abs(one.kappa.value - kappa) < 2 * one.kappa.half_width
        assert abs(one.own_share.value - own) < 2 * one.own_share.half_width


def test_tokens_are_spread_evenly_and_each_is_as_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(10)
    for _ in range(3000):
        places = spaced(10, 4, generator)
        assert len(places.unique()) == 4
        counts[places] += 1
    assert counts / 3000 == pytest.approx(torch.full((10,), 0.4), abs=0.05)
    assert spaced(3, 4, generator).tolist() == [0, 1, 2]


FORMS = ("gradient_descent", "triple_momentum", "soap")
"""One rule for each way to ask an oracle: at x, ahead of it, beside a matrix stream."""
EVERY: list[Any] = [
    *(
        pytest.param({"rule": name}, marks=() if name in FORMS else pytest.mark.slow)
        for name in rules.names()
    ),
    *({"attention": name} for name in attention.names()),
    *(preset_fields(name, num_heads=2) for name in ("gpt2", "llama", "momentum_transformer")),
    {"splitting": "simultaneous"},
    {"embedding_norm": "rms", "embedding_reinjection": True},
]


@pytest.mark.parametrize("fields", EVERY, ids=str)
def test_every_model_has_a_field(fields: dict[str, Any], ids: Tensor, tiny: Build) -> None:
    model = tiny(**{"d_model": 4, "num_layers": 2, **fields})
    watched, inputs = Watched(model), ids[:2, :3]
    found = field_of(watched, inputs, 0, probes=2, own_tokens=3)
    substep = watched.run(inputs).substeps[0]
    with torch.no_grad():
        dense = [
            jacrev(substep.oracle)(x).reshape(12, 12) for x in torch.split(substep.points[0], 1)
        ]
    for one in dense:  # causal, so that κ could be read off the diagonal blocks
        later = one.reshape(3, 4, 3, 4)[0, :, 1:]
        assert float(later.abs().max()) < 1e-12 * float(one.abs().max())
    exact = np.mean([float(torch.linalg.eigvalsh((j + j.T) / 2)[-1]) for j in dense])
    assert found.symmetric.top.value == pytest.approx(exact, rel=1e-6)
    taken_apart = fields.get("norm_position") != "post" and "splitting" not in fields
    assert (found.core is not None) == (found.metric is not None) == taken_apart
    assert found.oracle.kappa is not None
    assert -1 <= found.oracle.kappa.value <= 1
    assert set(found.loops) == {f"{a}/{b}" for a in ("updates", "random") for b in ("0.01", "1")}


def test_the_core_is_the_oracle_without_its_norm(ids: Tensor, tiny: Build) -> None:
    watched = Watched(tiny())
    for substep in watched.run(ids[:2, :-1]).substeps:
        module = getattr(substep.block, substep.kind)
        (point,), (value,) = substep.points, substep.values
        core = _core(substep, module)
        torch.testing.assert_close(core(module.norm(point)), value)
        assert not torch.allclose(core(point), value)
        torch.testing.assert_close(substep.oracle(point), value)  # the norm is back


def test_an_untrained_twin_has_the_configuration_and_other_weights(tiny: Build) -> None:
    model = tiny(rule="heavy_ball")
    before = torch.get_rng_state()
    twin = untrained(model, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert twin.config == model.config
    assert not torch.equal(twin.head.weight.double(), model.head.weight)
    assert torch.equal(twin.head.weight, untrained(model, 3).head.weight)


def test_plain_models_have_no_field(ids: Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    with pytest.raises(ConfigError, match="curve and path are for it, too"):
        field_of(Watched(transformers.GPT2LMHeadModel(config).eval()), ids, 0)
