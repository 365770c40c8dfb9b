"""Spectra of blocks against dense Jacobians by torch.func.jacrev, for every rule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jacrev

from polyak import ModelConfig, Transformer, rules
from polyak.analysis._common import math_attention
from polyak.analysis.jacobian import (
    BlockMaps,
    Map,
    Options,
    block_maps,
    persistence,
    product,
    spectrum,
)
from polyak.analysis.jacobian.chain import Chain
from polyak.nn.presets import PAPER

TOKENS = 6
ITERATIVE = Options(dense_below=0, tolerance=1e-10, steps=30)
Build = Callable[..., Transformer]


def ids(model: Transformer) -> Tensor:
    return torch.randint(model.config.vocab_size, (TOKENS,))


def reference(one: Map) -> Tensor:
    """J by reverse mode through the function itself."""
    with math_attention():
        jacobian = jacrev(one.function)(one.point)
    assert isinstance(jacobian, Tensor)
    return jacobian.flatten(2).flatten(0, 1)


def between(jacobian: Tensor, enter: Tensor | None, leave: Tensor | None) -> Tensor:
    """Q_outᵀ J Q_in with block-diagonal Q."""
    if leave is not None:
        jacobian = torch.block_diag(*leave).T @ jacobian
    return jacobian if enter is None else jacobian @ torch.block_diag(*enter)


def close(found: float | None, expected: Tensor | float, relative: float = 1e-6) -> None:
    assert found is not None
    assert abs(found / float(expected) - 1) < relative, (found, float(expected))


def parts(maps: BlockMaps) -> list[Map]:
    return [maps.frozen, maps.full, maps.oracle]


@pytest.mark.parametrize("splitting", ["lie_trotter", "simultaneous"])
@pytest.mark.parametrize("rule", rules.names())
def test_both_ends_are_those_of_a_dense_svd(rule: str, splitting: str, tiny_model: Build) -> None:
    model = tiny_model(rule, splitting=splitting)
    for maps in block_maps(model, ids(model)):
        for one in parts(maps):
            jacobian = reference(one)
            inner = between(jacobian, one.restricted.enter, one.restricted.leave)
            values, kept = torch.linalg.svdvals(jacobian), torch.linalg.svdvals(inner)
            exact, found = spectrum(one), spectrum(one, ITERATIVE)
            assert exact.method == "dense"
            assert found.method == "pieces"
            for result in (exact, found):
                close(result.sigma_max.value, values[0])
                close(result.restricted_max.value, kept[0])
            close(exact.frobenius.value, jacobian.norm())
            if kept[-1] > 1e-9 * kept[0]:
                close(exact.sigma_min.value, kept[-1])
            else:  # rounding, as of a stream that a step writes anew
                assert exact.sigma_min.value is not None
                assert exact.sigma_min.value < 1e-9 * kept[0]
            if found.sigma_min.kind == "value":
                close(found.sigma_min.value, kept[-1])
                assert found.kappa.value is not None
                close(found.kappa.value, kept[0] / kept[-1])
            else:  # a bound, never below the truth
                assert found.sigma_min.high is not None
                assert found.sigma_min.high >= kept[-1] * (1 - 1e-9)
            for quantile, truth in zip(found.quantiles, exact.quantiles, strict=True):
                assert quantile.low <= quantile.value <= quantile.high
                assert truth.low == truth.value == truth.high


@pytest.mark.parametrize("rule", rules.names())
def test_the_bottom_of_the_state_maps_converges(rule: str, tiny_model: Build) -> None:
    """(a) and (b) of these models are far from singular: a bound would hide a broken solve."""
    model = tiny_model(rule)
    for maps in block_maps(model, ids(model)):
        for one in (maps.frozen, maps.full):
            kept = torch.linalg.svdvals(one.restricted.dense())
            if kept[-1] > 1e-8 * kept[0]:
                assert spectrum(one, ITERATIVE).sigma_min.kind == "value"


@pytest.mark.parametrize("rule", ["gradient_descent", "triple_momentum", "adamw", "soap"])
def test_products_are_products_of_dense_matrices(rule: str, tiny_model: Build) -> None:
    model = tiny_model(rule, num_layers=3)
    blocks = block_maps(model, ids(model))
    for name in ("frozen", "full"):
        maps: list[Map] = [getattr(block, name) for block in blocks]
        dense = torch.eye(maps[0].whole.shape[1], dtype=torch.float64)
        for one in maps:
            dense = reference(one) @ dense
        whole = product(maps, f"product {name}")
        torch.testing.assert_close(whole.whole.dense(), dense, rtol=1e-9, atol=1e-9)
        inner = between(dense, whole.restricted.enter, whole.restricted.leave)
        kept = torch.linalg.svdvals(inner)
        found = spectrum(whole, ITERATIVE)
        close(found.sigma_max.value, torch.linalg.svdvals(dense)[0])
        if found.sigma_min.kind == "value":
            close(found.sigma_min.value, kept[-1])
        else:
            assert kept[-1] < 1e-8 * kept[0]


@pytest.mark.parametrize("rule", rules.names())
def test_later_tokens_change_nothing_and_transposes_and_solves_agree(
    rule: str, tiny_model: Build
) -> None:
    model = tiny_model(rule)
    for maps in block_maps(model, ids(model)):
        for one in parts(maps):
            chain = one.whole
            assert isinstance(chain, Chain)
            dense = chain.dense()
            blocks = dense.unflatten(0, (TOKENS, -1)).unflatten(2, (TOKENS, -1))
            for i in range(TOKENS):
                assert not blocks[i, :, i + 1 :].any()
                torch.testing.assert_close(blocks[i, :, i], chain.diagonal[i])
            unit = torch.eye(len(dense), dtype=torch.float64)
            back = chain.transposed(unit.unflatten(0, (TOKENS, -1))).flatten(0, 1)
            torch.testing.assert_close(back, dense.T, rtol=1e-9, atol=1e-9)
        b = torch.randn(TOKENS, maps.frozen.whole.inputs, 2, dtype=torch.float64)
        chain = maps.frozen.whole
        assert isinstance(chain, Chain)
        torch.testing.assert_close(chain.times(chain.solve(b)), b, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            chain.transposed(chain.solve_transposed(b)), b, rtol=1e-6, atol=1e-6
        )


MOMENTUM = ["heavy_ball", "nesterov", "triple_momentum"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rule", MOMENTUM)
def test_structural_zeros_are_where_and_as_many_as_predicted(
    rule: str, bias: bool, tiny_model: Build
) -> None:
    eps = 1e-12  # so that the nearly lost directions stand clear of everything else
    model = tiny_model(rule, norm_eps=eps, bias=bias)
    for maps in block_maps(model, ids(model)):
        zeros = maps.full.zeros
        assert (zeros.exact, zeros.near, zeros.streams) == (TOKENS, TOKENS, ("v",))
        u, values, _ = torch.linalg.svd(reference(maps.full))
        assert int((values < 1e-6 * values[0]).sum()) == 2 * TOKENS
        assert int((values < 1e-13 * values[0]).sum()) >= TOKENS
        numeric = u[:, -2 * TOKENS :]
        assert zeros.left is not None
        predicted = torch.linalg.qr(torch.block_diag(*zeros.left)).Q
        angles = torch.linalg.svdvals(numeric.T @ predicted)
        assert angles.min() > 1 - 1e-6
        assert zeros.exact_gain < 1e-12
        assert zeros.near_gain < 1e-6


def test_the_nearly_lost_direction_is_as_small_as_eps_over_the_variance(tiny_model: Build) -> None:
    gains = []
    for eps in (1e-3, 1e-5):
        torch.manual_seed(0)
        model = tiny_model("heavy_ball", norm_eps=eps)
        torch.manual_seed(1)
        gains.append(block_maps(model, ids(model))[1].full.zeros.near_gain)
    assert 50 < gains[0] / gains[1] < 200


@pytest.mark.parametrize(
    ("rule", "moved"),
    [
        ("heavy_ball@attention+gradient_descent@mlp", [True, True, True]),
        ("heavy_ball@1+gradient_descent", [True, False, False]),
        ("gradient_descent@1+heavy_ball@2+gradient_descent@3", [False, True, False]),
    ],
)
def test_a_stream_that_passes_through_leaves_where_it_could_enter(
    rule: str, moved: list[bool], tiny_model: Build
) -> None:
    model = tiny_model(rule, num_layers=3, norm_eps=1e-9)
    d, normed = model.config.d_model, False
    for maps, moves in zip(block_maps(model, ids(model)), moved, strict=True):
        full, lost = maps.full, 2 * normed
        normed = normed or moves
        # of the block's own Jacobian, two directions a token are lost where v passes a norm in it
        assert (full.zeros.exact, full.zeros.near) == (TOKENS * moves, TOKENS * moves)
        jacobian = reference(full)
        inner = between(jacobian, full.restricted.enter, full.restricted.leave)
        assert inner.shape == (TOKENS * (2 * d - 2 * normed), TOKENS * (2 * d - lost))
        kept = torch.linalg.svdvals(inner)
        assert kept[-1] > 1e-6 * kept[0]
        found = spectrum(full, ITERATIVE)
        close(found.sigma_max.value, torch.linalg.svdvals(jacobian)[0])
        if inner.shape[0] == inner.shape[1]:
            close(found.sigma_min.value, kept[-1])
        if normed and not moves:  # nothing that enters leaves outside of what is kept
            assert full.restricted.enter is not None
            image = jacobian @ torch.block_diag(*full.restricted.enter)
            torch.testing.assert_close(torch.linalg.svdvals(image), kept, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("rule", rules.names())
def test_the_oracle_loses_the_constant_vector_and_nothing_else(
    rule: str, tiny_model: Build
) -> None:
    model = tiny_model(rule)
    for maps in block_maps(model, ids(model)):
        assert maps.oracle.zeros.exact == TOKENS
        _, values, vh = torch.linalg.svd(reference(maps.oracle))
        lost = int((values < 1e-13 * values[0]).sum())
        assert lost >= TOKENS
        constant = torch.block_diag(*[torch.ones(1, model.config.d_model).double()] * TOKENS)
        constant /= math.sqrt(model.config.d_model)
        # inside the numerical null space
        assert (vh[-lost:] @ constant.T).norm(dim=0).min() > 1 - 1e-6


@pytest.mark.parametrize("rule", ["gradient_descent", "adam", "rmsprop", "muon", "shampoo"])
def test_rules_whose_streams_pass_no_norm_lose_nothing(rule: str, tiny_model: Build) -> None:
    model = tiny_model(rule)
    for maps in block_maps(model, ids(model)):
        assert maps.full.zeros.exact == 0
        assert maps.full.restricted.leave is None


def test_a_velocity_without_norm_loses_nothing(tiny_model: Build) -> None:
    model = tiny_model("heavy_ball", rule_options={"state_norm": "none"})
    assert block_maps(model, ids(model))[0].full.zeros.exact == 0


def test_the_oracle_is_looked_at_where_the_rule_looks_ahead(tiny_model: Build) -> None:
    model = tiny_model("nesterov")
    given = ids(model)
    x, state = model.start(given[None])
    mu = next(iter(model.blocks[0].rules.values())).mu
    expected = (x + mu * state.v)[0]
    torch.testing.assert_close(block_maps(model, given)[0].oracle.point, expected)


def test_the_published_statistic_is_near_the_top_not_the_bottom(tiny_model: Build) -> None:
    model = tiny_model("triple_momentum")
    one = block_maps(model, ids(model))[1].frozen
    values = torch.linalg.svdvals(reference(one))
    # 72 singular values, fewer than 74 probes: the sketch is exact, so it is the 11th largest
    for value in spectrum(one).published:
        close(value, values[10])


def test_same_seed_same_numbers_and_another_seed_agrees(tiny_model: Build) -> None:
    model = tiny_model("nesterov")
    one = block_maps(model, ids(model))[1].full
    first, second = (spectrum(one, ITERATIVE).to_dict() for _ in range(2))
    first.pop("seconds"), second.pop("seconds")
    assert first == second
    other = spectrum(one, Options(dense_below=0, tolerance=1e-10, steps=30, seed=1))
    assert other.published != spectrum(one, ITERATIVE).published
    close(other.sigma_min.value, spectrum(one, ITERATIVE).sigma_min.value or 0.0)


def test_what_has_not_converged_is_a_bound(tiny_model: Build) -> None:
    model = tiny_model("gradient_descent", d_model=24, context_length=12)
    one = block_maps(model, torch.randint(11, (12,)))[1].frozen
    values = torch.linalg.svdvals(one.whole.dense())
    found = spectrum(one, Options(dense_below=0, tolerance=1e-12, max_products=10, steps=4))
    assert found.sigma_max.kind == "lower bound"
    assert found.sigma_max.high is None
    assert (found.sigma_max.low or math.inf) <= values[0] * (1 + 1e-12)
    if found.sigma_min.kind != "value":
        assert found.log_sigma_min.kind == "upper bound"
        assert (found.sigma_min.high or 0.0) >= values[-1] * (1 - 1e-9)
        assert persistence([found.log_sigma_min]).kind == "upper bound"
    assert found.stable_rank.kind == "upper bound"
    assert found.kappa.kind == "lower bound"


@pytest.mark.slow
def test_a_map_too_large_for_pieces_gets_its_top_and_bounds(tiny_model: Build) -> None:
    model = tiny_model("soap", num_heads=4)
    given = ids(model)
    exact = spectrum(block_maps(model, given)[0].full)
    blocks = block_maps(model, given, most_bytes=1)
    free = Options(dense_below=0, max_products=100, steps=10, published_draws=1)
    for one, expected in (
        (blocks[0].full, exact),
        (product([blocks[0].frozen], "product"), spectrum(block_maps(model, given)[0].frozen)),
    ):
        found = spectrum(one, free)
        assert found.method == "matrix-free"
        close(found.sigma_max.value, expected.sigma_max.value or 0.0)
        assert found.sigma_min.kind == "upper bound"
        assert (found.sigma_min.value or 0.0) >= (expected.sigma_min.value or 0.0) * (1 - 1e-9)


def test_persistence_is_the_sum_of_logarithms(tiny_model: Build) -> None:
    model = tiny_model("triple_momentum")
    spectra = [spectrum(maps.full) for maps in block_maps(model, ids(model))]
    total = persistence([one.log_sigma_min for one in spectra])
    expected = sum(math.log(one.sigma_min.value or 0.0) for one in spectra)
    assert total.value == pytest.approx(expected)
    assert total.kind == "value"


def test_a_block_whose_inverse_grows_beyond_arithmetic_is_a_tight_bound() -> None:
    """Later tokens outweigh the diagonal, so the inverse grows exponentially with T."""
    tokens = 120

    def grows(z: Tensor) -> Tensor:
        seen = torch.nn.functional.scaled_dot_product_attention(
            z[None, None], z[None, None], z[None, None], is_causal=True
        )
        return z - 20.5 * seen[0, 0]

    torch.manual_seed(0)
    one = Map("grows", grows, 0.01 * torch.randn(tokens, 4, dtype=torch.float64))
    values = torch.linalg.svdvals(one.whole.dense())
    assert values[-1] < 1e-13 * values[0]
    found = spectrum(one, ITERATIVE)
    assert found.sigma_min.kind == "upper bound"
    assert (found.sigma_min.value or math.inf) < 1e-10 * float(values[0])
    assert found.kappa.kind == "lower bound"


@pytest.mark.parametrize(
    ("rule", "norm"),
    [
        ("gradient_descent", "layer"),
        pytest.param("gradient_descent", "rms", marks=pytest.mark.slow),
        pytest.param("triple_momentum", "layer", marks=pytest.mark.slow),
        pytest.param("triple_momentum", "rms", marks=pytest.mark.slow),
        pytest.param("adam", "layer", marks=pytest.mark.slow),
    ],
)
def test_a_post_norm_block_loses_what_the_norm_of_x_loses(
    rule: str, norm: str, tiny_model: Build
) -> None:
    fields = ModelConfig.preset("momentum_transformer").to_dict()
    backbone = {name: fields[name] for name in PAPER}
    model = tiny_model(rule, **{**backbone, "norm": norm, "norm_eps": 1e-9})
    blocks = block_maps(model, ids(model))
    streams = ("x", "v") if rule == "triple_momentum" else ("x",)
    wholes = [product([getattr(one, name) for one in blocks], name) for name in ("frozen", "full")]
    for one in [*wholes, *(part for maps in blocks for part in (maps.frozen, maps.full))]:
        jacobian = reference(one)
        zeros = one.zeros
        passed = len(streams) if one.name == "full" or one.name.endswith("(b)") else 1
        assert zeros.near == passed * TOKENS
        assert zeros.exact == (passed * TOKENS if norm == "layer" else 0)
        values = torch.linalg.svdvals(jacobian)
        assert int((values < 1e-5 * values[0]).sum()) >= zeros.exact + zeros.near
        kept = torch.linalg.svdvals(between(jacobian, one.restricted.enter, one.restricted.leave))
        exact, found = spectrum(one), spectrum(one, ITERATIVE)
        for result in (exact, found):
            close(result.sigma_max.value, values[0])
            close(result.restricted_max.value, kept[0])
        close(exact.sigma_min.value, kept[-1], 1e-5)
        if found.sigma_min.kind == "value":
            close(found.sigma_min.value, kept[-1], 1e-5)
    assert blocks[0].full.zeros.streams == streams
    for maps in blocks:  # (c) sees x as it is: nothing is lost by structure
        assert maps.oracle.zeros.exact == 0
        close(
            spectrum(maps.oracle).sigma_max.value, torch.linalg.svdvals(reference(maps.oracle))[0]
        )


MATRIX: list[tuple[str, str, dict[str, Any]]] = [
    ("gradient_descent", "linear", {}),
    ("triple_momentum", "momentum", {"mu": 0.6, "gamma": 0.8}),
    ("gradient_descent", "linear", {"normalize": False, "scale": "head_dim"}),
    ("gradient_descent", "momentum", {"form": "released", "scale": "head_dim", "eps": 0.1}),
    ("gradient_descent", "momentum", {"weighted_normalizer": True, "mu_learned": "head"}),
    ("triple_momentum", "momentum", {"mu_learned": "model", "feature_map": "softplus"}),
]


@pytest.mark.parametrize(
    ("rule", "kind", "options"),
    [MATRIX[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in MATRIX[1:])],
    ids=str,
)
def test_blocks_whose_attention_has_a_state_are_those_of_a_dense_svd(
    rule: str, kind: str, options: dict[str, Any], tiny_model: Build
) -> None:
    fields = {"num_kv_heads": 1, "positions": "rope", "num_layers": 1}
    model = tiny_model(rule, attention=kind, attention_options=options, **fields)
    for maps in block_maps(model, ids(model)):
        for one in parts(maps):
            jacobian = reference(one)
            inner = between(jacobian, one.restricted.enter, one.restricted.leave)
            values, kept = torch.linalg.svdvals(jacobian), torch.linalg.svdvals(inner)
            torch.testing.assert_close(one.whole.dense(), jacobian, rtol=1e-8, atol=1e-8)
            if isinstance(one.whole, Chain):
                unit = torch.eye(len(jacobian), dtype=torch.float64).unflatten(0, (TOKENS, -1))
                back = one.whole.transposed(unit).flatten(0, 1)
                torch.testing.assert_close(back, jacobian.T, rtol=1e-8, atol=1e-8)
            exact, found = spectrum(one), spectrum(one, ITERATIVE)
            assert found.method == "pieces"
            close(found.sigma_max.value, values[0])
            close(exact.sigma_min.value, kept[-1], 1e-6 if kept[-1] > 1e-9 * kept[0] else 1.0)
            if found.sigma_min.kind == "value":
                close(found.sigma_min.value, kept[-1])
            else:
                assert found.sigma_min.high is not None
                assert found.sigma_min.high >= kept[-1] * (1 - 1e-9)
        frozen = spectrum(maps.frozen, ITERATIVE)
        assert frozen.sigma_min.kind == "value"


@pytest.mark.slow
def test_adaptive_momentum_is_measured_by_products_alone(tiny_model: Build) -> None:
    model = tiny_model("gradient_descent", attention="adaptive_momentum", num_layers=1)
    (maps,) = block_maps(model, ids(model))
    jacobian = reference(maps.frozen)
    values = torch.linalg.svdvals(jacobian)
    torch.testing.assert_close(maps.frozen.whole.dense(), jacobian, rtol=1e-8, atol=1e-8)
    quick = Options(dense_below=0, max_products=40, steps=4, probes=1, norm_probes=2)
    found = spectrum(maps.frozen, dataclasses.replace(quick, published_draws=1, tolerance=1e-3))
    assert found.method == "matrix-free"
    assert found.sigma_max.value is not None
    assert found.sigma_max.value <= values[0] * (1 + 1e-9)
    assert found.sigma_min.kind == "upper bound"
    assert (found.sigma_min.high or 0.0) >= values[-1] * (1 - 1e-9)


@pytest.mark.parametrize("preset", ["gpt2", "llama"])
@pytest.mark.parametrize("rule", ["gradient_descent", "triple_momentum", "adam"])
def test_other_backbones_are_measured_too(rule: str, preset: str, tiny_model: Build) -> None:
    """Rotary positions, grouped queries and biases; an RMSNorm loses no mean direction."""
    fields = dataclasses.asdict(ModelConfig.preset(preset))
    shape = ("rule", "num_layers", "num_heads", "d_model", "vocab_size", "context_length")
    kept = {k: v for k, v in fields.items() if k not in (*shape, "rule_options", "mlp_width")}
    model = tiny_model(rule, **{**kept, "num_kv_heads": 1})
    momentum = rule == "triple_momentum"
    for maps in block_maps(model, ids(model)):
        zeros = maps.full.zeros
        assert zeros.exact == (TOKENS if momentum and preset == "gpt2" else 0)
        assert zeros.near == (TOKENS if momentum else 0)
        for one in parts(maps):
            jacobian = reference(one)
            inner = between(jacobian, one.restricted.enter, one.restricted.leave)
            values, least = torch.linalg.svdvals(jacobian), torch.linalg.svdvals(inner)[-1]
            found = spectrum(one, ITERATIVE)
            close(found.sigma_max.value, values[0])
            if found.sigma_min.kind == "value":
                close(found.sigma_min.value, least)
