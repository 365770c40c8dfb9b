from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from polyak import ModelConfig, Transformer, rules
from polyak.rules import UpdateRule
from polyak.training.config import TrainingConfig
from polyak.training.optimizers import Muon, Optimizers, cosine_with_warmup, parameter_groups

SIZE = {
    "num_layers": 2,
    "num_heads": 2,
    "d_model": 8,
    "vocab_size": 11,
    "context_length": 5,
}
SHAPES = [(24, 8), (8, 8), (32, 8), (8, 32)]
"""Of a block's matrices, in units of the width: qkv, out, up, down."""


# Schedule


@given(
    steps=st.integers(1, 300),
    warmup=st.floats(0, 1),
    final_rate=st.floats(0, 1),
    data=st.data(),
)
def test_the_schedule_is_linear_then_cosine(
    steps: int, warmup: float, final_rate: float, data: st.DataObject
) -> None:
    config = TrainingConfig(steps=steps, warmup=warmup, final_rate=final_rate)
    step = data.draw(st.integers(0, steps - 1))
    w = round(warmup * steps)
    if step < w:
        expected = step / w
    else:
        phase = (step - w) / (steps - w)
        expected = final_rate + (1 - final_rate) * (1 + math.cos(math.pi * phase)) / 2
    assert cosine_with_warmup(step, config) == pytest.approx(expected, abs=1e-12)
    assert 0 <= cosine_with_warmup(step, config) <= 1


def test_the_released_schedule_starts_at_0_peaks_after_warmup_and_ends_at_a_tenth() -> None:
    config = TrainingConfig(steps=1000, warmup=0.1, final_rate=0.1)
    factors = [cosine_with_warmup(step, config) for step in range(1001)]
    assert factors[0] == 0
    assert factors[50] == 0.5
    assert factors[100] == max(factors) == 1
    assert factors[550] == pytest.approx(0.55)
    assert factors[1000] == pytest.approx(0.1)
    assert factors[999] == pytest.approx(0.1, abs=1e-5)


# Groups


@pytest.mark.parametrize("rule", rules.names())
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_embeddings": False},
        {"splitting": "simultaneous"},
        {"bias": True},
        {"frozen": True},
        {"stream_start": "zeros"},
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
    assert len(groups["matrices"]) == 4 * SIZE["num_layers"]
    assert (not groups["scalars"]) == (
        bool(options) or not declared.present_scalars(declared.resolve({}))
    )


class Odd(UpdateRule):
    """A user's rule that learns a 3-D tensor, a matrix and a vector of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cube = nn.Parameter(torch.zeros(2, 3, 4))
        self.square = nn.Parameter(torch.eye(8))
        self.row = nn.Parameter(torch.zeros(8))

    def step(self, x: Tensor, state: Any, oracle: Any) -> tuple[Tensor, Any]:
        return x + (1 + self.cube.sum()) * oracle(x) @ self.square + self.row, state


def test_whatever_a_users_rule_learns_is_trained(registered: Any) -> None:
    model = Transformer(ModelConfig(rule=registered("odd", Odd), **SIZE))
    optimizers = Optimizers(model, TrainingConfig())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.arange(5)[None]).square().sum().backward()
    optimizers.step(1.0)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    own = {n for n in before if n.rpartition(".")[2] in ("cube", "square", "row")}
    assert len(own) == 3 * 2 * SIZE["num_layers"]
    assert own <= changed


@pytest.mark.parametrize("tied", [True, False])
def test_decay_and_peak_rates_are_those_of_the_released_groups(tied: bool) -> None:
    model = Transformer(ModelConfig(rule="triple_momentum", **SIZE, tie_embeddings=tied))
    recipe = TrainingConfig(muon_lr=0.1, adam_lr=0.2, scalar_lr=0.3, weight_decay=0.4)
    optimizers = Optimizers(model, recipe)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: dict[str, tuple[float, float]] = {}
    optimizers.step(0.5)
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
