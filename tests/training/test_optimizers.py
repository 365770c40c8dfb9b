from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polyak import ModelConfig, Transformer, rules
from polyak.errors import ConfigError, RuleError
from polyak.rules import UpdateRule
from polyak.training.config.training import TrainingConfig
from polyak.training.optimizers import Muon, Optimizers, check_groups, parameter_groups

SIZE = {
    "num_layers": 2,
    "num_heads": 2,
    "d_model": 8,
    "vocab_size": 11,
    "context_length": 5,
}
SHAPES = [(24, 8), (8, 8), (32, 8), (8, 32)]
"""Of a block's matrices, in units of the width: qkv, out, up, down."""


# Groups


@pytest.mark.parametrize("rule", rules.names())
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_embeddings": False},
        {"splitting": "simultaneous"},
        {"bias": True},
        {
            "norm": "rms",
            "positions": "rope",
            "mlp": "gated",
            "num_kv_heads": 1,
            "qk_norm": True,
            "head_dim": 6,
        },
        {"frozen": True},
        {"stream_start": "zeros"},
        {"stream_start": "zeros", "tie_embeddings": False},
    ],
    ids=str,
)
def test_every_trainable_parameter_is_in_exactly_one_group(
    rule: str, fields: dict[str, Any]
) -> None:
    declared = rules.get(rule)
    options: dict[str, Any] = {}
    if fields.pop("frozen", False):
        options = {"frozen": tuple(declared.present_scalars(declared.resolve({})))}
    if "stream_start" in fields and not any(s.start == "embedding" for s in declared.streams):
        pytest.skip(f"{rule} has no stream that starts from an embedding")
    with torch.device("meta"):
        model = Transformer(ModelConfig(rule=rule, **SIZE, **fields, rule_options=options))
    groups = parameter_groups(model)
    found = [id(parameter) for group in groups.values() for parameter in group]
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    assert len(found) == len(set(found))
    assert set(found) == set(trainable)
    assert all(p.ndim == 2 for p in groups["matrices"])
    matrices = 5 if fields.get("mlp") == "gated" else 4
    assert len(groups["matrices"]) == matrices * SIZE["num_layers"]
    resolved = declared.resolve(options)
    learned = set(declared.present_scalars(resolved)) - set(resolved["frozen"])
    assert bool(groups["scalars"]) == bool(learned)
    for optimizer in ("muon", "adamw"):
        held = Optimizers(model, TrainingConfig(optimizer=optimizer)).all  # type: ignore[arg-type]
        stepped = [id(p) for one in held for group in one.param_groups for p in group["params"]]
        assert sorted(stepped) == sorted(trainable)
        assert len(held) == (2 if optimizer == "muon" else 1)


class Odd(UpdateRule):
    """A user's rule that learns a 3-D tensor, a matrix and a vector of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cube = nn.Parameter(torch.zeros(2, 3, 4))
        self.square = nn.Parameter(torch.eye(8))
        self.row = nn.Parameter(torch.zeros(8))

    def step(self, x: Tensor, state: Any, oracle: Any) -> tuple[Tensor, Any]:
        return x + (1 + self.cube.sum()) * oracle(x) @ self.square + self.row, state


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_whatever_a_users_rule_learns_is_trained(registered: Any, optimizer: Any) -> None:
    model = Transformer(ModelConfig(rule=registered("odd", Odd), **SIZE))
    optimizers = Optimizers(model, TrainingConfig(optimizer=optimizer))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.arange(5)[None]).square().sum().backward()
    optimizers.step(1.0)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    own = {n for n in before if n.rpartition(".")[2] in ("cube", "square", "row")}
    assert len(own) == 3 * 2 * SIZE["num_layers"]
    assert own <= changed


class Complex(UpdateRule):
    """A user's rule that learns a complex number."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.turn = nn.Parameter(torch.ones(1, dtype=torch.complex64))

    def step(self, x: Tensor, state: Any, oracle: Any) -> tuple[Tensor, Any]:
        return x + self.turn.real * oracle(x), state


def test_a_complex_parameter_is_refused_by_name(registered: Any) -> None:
    model = Transformer(ModelConfig(rule=registered("complex", Complex), **SIZE))
    with pytest.raises(RuleError, match=r"blocks\.0\.rules\.attention\.turn is complex64"):
        Optimizers(model, TrainingConfig())


def test_a_parameter_in_no_group_or_in_two_is_named() -> None:
    model = Transformer(ModelConfig(rule="triple_momentum", **SIZE))
    groups = parameter_groups(model)
    check_groups(model, groups.items())
    name = "blocks.1.attention.qkv.weight"
    weight = model.get_parameter(name)
    without = {**groups, "matrices": [p for p in groups["matrices"] if p is not weight]}
    with pytest.raises(ConfigError, match=rf"{name} must be in exactly one .* is in: none"):
        check_groups(model, without.items())
    for group, places in (("norms", "matrices and norms"), ("matrices", "matrices and matrices")):
        twice = {**groups, group: [*groups[group], weight]}
        with pytest.raises(ConfigError, match=rf"{name} must be in exactly one .*: {places}"):
            check_groups(model, twice.items())
    weight.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"'matrices' holds a tensor of shape \(24, 8\)"):
        check_groups(model, groups.items())


def test_a_model_whose_blocks_are_frozen_trains_without_muon() -> None:
    model = Transformer(ModelConfig(rule="nesterov", **SIZE))
    model.blocks.requires_grad_(False)
    optimizers = Optimizers(model, TrainingConfig())
    assert optimizers.muon is None
    assert optimizers.rates() == {"embeddings": 3e-3, "norms": 3e-3}
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        Optimizers(model, TrainingConfig())


@pytest.mark.parametrize("tied", [True, False])
def test_decay_and_peak_rates_are_those_of_the_released_groups(tied: bool) -> None:
    model = Transformer(ModelConfig(rule="triple_momentum", **SIZE, tie_embeddings=tied))
    recipe = TrainingConfig(muon_lr=0.1, adam_lr=0.2, scalar_lr=0.3, weight_decay=0.4)
    optimizers = Optimizers(model, recipe)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: dict[str, tuple[float, float]] = {}
    assert optimizers.rates() == {
        "matrices": 0.1,
        "embeddings": 0.2,
        "norms": 0.2,
        "scalars": 0.3,
    }
    optimizers.step(0.5)
    assert optimizers.rates() == {
        "matrices": 0.05,
        "embeddings": 0.1,
        "norms": 0.1,
        "scalars": 0.15,
    }
    assert optimizers.adam is not None
    assert optimizers.muon is not None
    for group in optimizers.adam.param_groups:
        assert group["betas"] == (0.9, 0.95)
        for parameter in group["params"]:
            seen[names[id(parameter)]] = group["lr"], group["weight_decay"]
    for group in optimizers.muon.param_groups:
        assert group["momentum"] == 0.95
        for parameter in group["params"]:
            seen[names[id(parameter)]] = group["lr"], 0.0
    assert seen.keys() == set(names.values())
    for name, found in seen.items():
        if name.endswith("_raw"):
            expected = 0.15, 0.0
        elif name.startswith(("embedding.", "streams.", "head.")):
            expected = 0.1, 0.4
        elif "norm" in name:
            expected = 0.1, 0.0
        else:
            expected = 0.05, 0.0
        assert found == pytest.approx(expected), name
    assert ("head.weight" in seen) is not tied


def test_a_rate_of_zero_moves_nothing() -> None:
    model = Transformer(ModelConfig(rule="nesterov", **SIZE))
    optimizers = Optimizers(model, TrainingConfig())
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.arange(5)[None]).square().sum().backward()
    optimizers.step(0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


# AdamW


def direct_adamw(
    weight: Any, gradients: list[Any], rates: list[float], decay: float, betas: tuple[float, float]
) -> Any:
    """Decoupled decay, then bias-corrected moments (Loshchilov & Hutter), for one tensor."""
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        weight = weight - lr * decay * weight - lr * m_hat / (np.sqrt(v_hat) + 1e-8)
    return weight


@pytest.mark.parametrize("tied", [True, False])
def test_pure_adamw_equals_the_direct_formula_with_decay_on_all_matrices(tied: bool) -> None:
    config = ModelConfig(rule="triple_momentum", **SIZE, tie_embeddings=tied, bias=True)
    model = Transformer(config).double()
    recipe = TrainingConfig(
        optimizer="adamw", adam_lr=0.1, scalar_lr=0.3, weight_decay=0.4, adam_betas=(0.8, 0.9)
    )
    optimizers = Optimizers(model, recipe)
    assert optimizers.muon is None
    factors = [0.5, 1.0, 0.25, 0.0]
    start = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    gradients: dict[str, list[Any]] = {name: [] for name in start}
    for factor in factors:
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            gradients[name].append(parameter.grad.numpy().copy())
        optimizers.step(factor)
    for name, parameter in model.named_parameters():
        peak = 0.3 if name.endswith("_raw") else 0.1
        decay = 0.4 if parameter.ndim == 2 else 0.0
        rates = [peak * factor for factor in factors]
        expected = direct_adamw(start[name], gradients[name], rates, decay, (0.8, 0.9))
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-9, atol=1e-12)
        assert not np.allclose(parameter.detach().numpy(), start[name])
    assert optimizers.rates() == {"matrices": 0, "embeddings": 0, "norms": 0, "scalars": 0}


def test_under_muon_the_rest_equals_the_direct_adamw() -> None:
    model = Transformer(ModelConfig(rule="triple_momentum", **SIZE)).double()
    optimizers = Optimizers(model, TrainingConfig(adam_lr=0.1, scalar_lr=0.3, weight_decay=0.4))
    start = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    gradients: dict[str, list[Any]] = {name: [] for name in start}
    for _ in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            gradients[name].append(parameter.grad.numpy().copy())
        optimizers.step(1.0)
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and parameter.ndim == 2:
            expected = direct_muon(
                torch.from_numpy(start[name]), list(map(torch.from_numpy, gradients[name])),
                0.02, 0.95,
            ).numpy()  # fmt: skip
        else:
            rate = 0.3 if name.endswith("_raw") else 0.1
            decay = 0.4 if parameter.ndim == 2 else 0.0
            expected = direct_adamw(start[name], gradients[name], [rate] * 3, decay, (0.9, 0.95))
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-9, atol=1e-11)


# Muon


def direct_muon(weight: Tensor, gradients: list[Tensor], lr: float, momentum: float) -> Tensor:
    """The update of the class docstring, written out for one matrix."""
    m, weight = torch.zeros_like(weight), weight.clone()
    for g in gradients:
        m = momentum * m + (1 - momentum) * g
        y = momentum * m + (1 - momentum) * g
        y = y / y.norm()
        for _ in range(5):
            gram = y @ y.T
            y = 3.4445 * y - 4.7750 * gram @ y + 2.0315 * gram @ gram @ y
        weight -= lr * math.sqrt(max(1, weight.shape[0] / weight.shape[1])) * y
    return weight


@pytest.mark.parametrize("steps", [1, 6])
def test_muon_equals_the_direct_formula_in_float64(steps: int) -> None:
    start = [torch.randn(*shape, dtype=torch.float64) for shape in SHAPES + SHAPES[:2]]
    gradients = [[torch.randn_like(w) for w in start] for _ in range(steps)]
    weights = [nn.Parameter(w.clone()) for w in start]
    muon = Muon(weights, lr=0.1, momentum=0.9)
    for found in gradients:
        for weight, gradient in zip(weights, found, strict=True):
            weight.grad = gradient.clone()
        muon.step()
    for place, weight in enumerate(weights):
        expected = direct_muon(start[place], [found[place] for found in gradients], 0.1, 0.9)
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-12)


def test_muon_leaves_weights_without_a_gradient_alone() -> None:
    used, unused = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    muon = Muon([used, unused])
    used.grad = torch.randn(4, 3)
    muon.step()
    assert torch.equal(unused, torch.ones(4, 3))
    assert not torch.equal(used, torch.ones(4, 3))


@pytest.mark.parametrize("shape", [(96, 32), (32, 32), (128, 32), (32, 128)], ids=str)
def test_muon_agrees_with_torchs_up_to_its_bfloat16(shape: tuple[int, int]) -> None:
    # torch runs the five iterations in bfloat16, whose numbers are 2⁻⁸ = 0.4% apart. Each
    # iteration rounds anew and multiplies small singular values by up to 3.4, so a step differs by
    # a few percent of its size; in float64 the same iterations agree with ours to 1e-12 (above).
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Muon([ours], lr=0.02, momentum=0.95)
    other = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.0)
    for _ in range(5):
        gradient = torch.randn(shape)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        other.step()
    moved = (ours - start).detach()
    difference = (ours - theirs).detach()
    assert difference.norm() / moved.norm() < 0.03
    assert moved.norm() > 0.05 * start.norm() / 10


def test_muon_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ValueError, match=r"2-D weights, got shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))])
