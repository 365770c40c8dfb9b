"""Spectra that are known in closed form; intervals of quantiles; what is refused."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from polyak import Transformer, rules
from polyak.analysis.jacobian import Map, Options, block_maps, spectrum
from polyak.analysis.jacobian.quantiles import estimated
from polyak.errors import ConfigError, DataError
from polyak.rules import UpdateRule

Build = Callable[..., Transformer]


@pytest.mark.parametrize("lam", [0.3, 1.7, 6.0])
def test_the_heavy_ball_matrix_has_the_derived_eigenvalues(lam: float) -> None:
    """Of g = −λx: real where the step is small or large, complex of modulus √β between."""
    d, tokens, beta, gamma = 3, 4, 0.6, 0.5
    options = {"state_norm": "none", "beta": beta, "gamma": gamma}
    rule = rules.get("heavy_ball")(d, 1, options=options).double()

    def step(z: Tensor) -> Tensor:
        x, state = rule.step(z[None, :, :d], rule.State(z[None, :, d:]), lambda y: -lam * y)
        return torch.cat([x[0], state.v[0]], dim=-1)

    one = Map("toy", step, torch.randn(tokens, 2 * d, dtype=torch.float64))
    dense = one.whole.dense()
    found = torch.linalg.eigvals(dense).numpy()
    trace = 1 + beta - gamma * lam
    root = cmath.sqrt(trace**2 - 4 * beta)
    expected = [(trace + sign * root) / 2 for sign in (1, -1)]
    for value in expected:
        assert np.sum(np.abs(found - value) < 1e-6) == tokens * d
    # singular values of [[1 − γλ, β], [−γλ, β]]: σ₁σ₂ = β, σ₁² + σ₂² = ‖·‖_F²
    square = (1 - gamma * lam) ** 2 + (gamma * lam) ** 2 + 2 * beta**2
    high = math.sqrt((square + math.sqrt(square**2 - 4 * beta**2)) / 2)
    for options_ in (Options(), Options(dense_below=0)):
        spectra = spectrum(one, options_)
        assert spectra.sigma_max.value == pytest.approx(high, rel=1e-6)
        assert spectra.sigma_min.value == pytest.approx(beta / high, rel=1e-6)


def test_a_diagonal_map_has_its_entries_as_singular_values() -> None:
    scales = torch.logspace(-3, 2, 10, dtype=torch.float64)
    one = Map("diagonal", lambda z: z * scales, torch.zeros(7, 10, dtype=torch.float64))
    for options in (Options(), Options(dense_below=0)):
        found = spectrum(one, options)
        assert found.sigma_max.value == pytest.approx(100)
        assert found.sigma_min.value == pytest.approx(1e-3)
        assert found.log_sigma_min.value == pytest.approx(math.log(1e-3))
        low, high = found.frobenius.low, found.frobenius.high
        assert low is not None
        assert high is not None
        norm = math.sqrt(7) * float(scales.norm())
        assert low * (1 - 1e-9) <= norm <= high * (1 + 1e-9)


def test_a_singular_block_is_given_as_a_bound() -> None:
    scales = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    one = Map("singular", lambda z: z * scales, torch.zeros(4, 3, dtype=torch.float64))
    for options in (Options(), Options(dense_below=0)):
        found = spectrum(one, options)
        assert found.sigma_min.kind == "upper bound"
        assert found.kappa.kind == "lower bound"
        assert (found.sigma_min.value or 0.0) < 1e-6


def test_intervals_of_quantiles_cover_the_truth() -> None:
    generator = torch.Generator().manual_seed(0)
    size = 400
    sigmas = torch.rand(size, generator=generator, dtype=torch.float64).exp() ** 3
    squares = sigmas.square()
    ordered = np.sort(sigmas.numpy())
    wanted = (0.05, 0.25, 0.5, 0.75, 0.95)
    missed = 0
    for seed in range(20):
        found = estimated(
            lambda u: squares * u,
            lambda u: u / squares,
            size,
            wanted,
            ends=(float(ordered[0]), float(ordered[-1])),
            probes=2,
            steps=40,
            seed=seed,
        )
        for quantile in found:
            truth = ordered[math.ceil(quantile.q * size) - 1]
            missed += not quantile.low <= truth <= quantile.high
            assert quantile.high / quantile.low < 3  # and they say something
    assert missed <= 10  # of 100, at a nominal 5


def test_dropout_and_later_tokens_are_refused(tiny_model: Build) -> None:
    ids = torch.randint(11, (6,))
    with pytest.raises(ConfigError, match=r"model\.eval\(\)"):
        block_maps(tiny_model("adam", dropout=0.1).train(), ids)
    with pytest.raises(ConfigError, match="not causal"):
        block_maps(tiny_model("adam", causal=False), ids)


def test_bad_tokens_are_refused(tiny_model: Build) -> None:
    model = tiny_model("adam")
    with pytest.raises(DataError, match="one sequence"):
        block_maps(model, torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(DataError, match="tokenizer"):
        block_maps(model, torch.full((5,), 99))


def test_a_rule_that_mixes_tokens_is_refused(
    tiny_model: Build, registered: Callable[[str, type[UpdateRule]], str]
) -> None:
    class Mixing(UpdateRule):
        """x + O(x) + a running mean over tokens."""

        def step(self, x, state, oracle):  # type: ignore[no-untyped-def]
            return x + oracle(x) + 0.1 * x.cumsum(1), state

    model = tiny_model(registered("mixing", Mixing))
    with pytest.raises(ConfigError, match="outside of scaled_dot_product_attention"):
        spectrum(block_maps(model, torch.randint(11, (6,)))[0].frozen)


def test_a_rule_that_asks_its_oracle_twice_works(
    tiny_model: Build, registered: Callable[[str, type[UpdateRule]], str]
) -> None:
    class Midpoint(UpdateRule):
        """The explicit midpoint step."""

        def step(self, x, state, oracle):  # type: ignore[no-untyped-def]
            return x + oracle(x + 0.5 * oracle(x)), state

    model = tiny_model(registered("midpoint", Midpoint))
    one = block_maps(model, torch.randint(11, (6,)))[1].frozen
    dense = torch.func.jacrev(one.function)(one.point).flatten(2).flatten(0, 1)
    torch.testing.assert_close(one.whole.dense(), dense, rtol=1e-9, atol=1e-9)
    found, values = spectrum(one, Options(dense_below=0)), torch.linalg.svdvals(dense)
    assert found.sigma_max.value == pytest.approx(float(values[0]), rel=1e-6)
    assert found.sigma_min.value == pytest.approx(float(values[-1]), rel=1e-6)


def test_options_that_cannot_work_are_refused() -> None:
    for fields, says in (
        ({"quantiles": (0.0,)}, "quantiles"),
        ({"tolerance": 0.5}, "tolerance"),
        ({"probes": 0}, "probes"),
    ):
        with pytest.raises(ConfigError, match=says):
            Options(**fields)  # type: ignore[arg-type]


def test_plain_hugging_face_models_work() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=12, n_layer=2, n_head=3, attn_implementation="sdpa"
    )
    model = transformers.GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    for maps in block_maps(model, torch.randint(11, (6,))):
        assert not maps.streams
        assert maps.full is maps.frozen
        assert maps.oracle.zeros.exact == 6
        dense = torch.func.jacrev(maps.frozen.function)(maps.frozen.point)
        values = torch.linalg.svdvals(dense.flatten(2).flatten(0, 1))
        found = spectrum(maps.frozen, Options(dense_below=0))
        assert found.sigma_max.value == pytest.approx(float(values[0]), rel=1e-6)
        assert found.sigma_min.value == pytest.approx(float(values[-1]), rel=1e-6)


def test_eager_attention_is_refused_with_the_fix() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=12, n_layer=1, n_head=3, attn_implementation="eager"
    )
    model = transformers.GPT2LMHeadModel(config).double().eval()
    with pytest.raises(ConfigError, match="attn_implementation='sdpa'"):
        spectrum(block_maps(model, torch.randint(11, (6,)))[0].frozen)
