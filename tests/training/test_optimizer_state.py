from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyak import ModelConfig, Transformer, rules
from polyak.errors import ConfigError, RunError
from polyak.rules import UpdateRule
from polyak.training.config.training import TrainingConfig
from polyak.training.optimizers import Optimizers

SIZE = {
    "num_layers": 2,
    "num_heads": 2,
    "d_model": 8,
    "vocab_size": 11,
    "context_length": 5,
}

Saved = dict[str, Tensor]


def train(model: Transformer, optimizers: Optimizers, steps: range) -> None:
    for step in steps:
        ids = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(step))
        logits = model(ids[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizers.step(1 / (1 + step))


def copied(tensors: Saved) -> Saved:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("rule", rules.names())
def test_saved_and_restored_state_goes_on_bit_for_bit(rule: str, optimizer: Any) -> None:
    recipe = TrainingConfig(optimizer=optimizer)

    def fresh() -> tuple[Transformer, Optimizers]:
        model = Transformer(ModelConfig(rule=rule, **SIZE))
        return model, Optimizers(model, recipe)

    model, optimizers = fresh()
    assert optimizers.named_state(model) == {}
    train(model, optimizers, range(2))
    weights, state = copied(model.state_dict()), copied(optimizers.named_state(model))
    train(model, optimizers, range(2, 4))

    torch.manual_seed(9)
    other, restored = fresh()
    train(other, restored, range(7, 8))  # whatever was there is replaced
    other.load_state_dict(weights)
    restored.load_named_state(other, state)
    given = copied(state)
    assert same(restored.named_state(other), state)
    train(other, restored, range(2, 4))
    assert same(other.state_dict(), model.state_dict())
    assert same(restored.named_state(other), optimizers.named_state(model))
    assert same(state, given)  # training goes on in copies


def same(a: Saved, b: Saved) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def trained(optimizer: Any = "muon", **fields: Any) -> tuple[Transformer, Optimizers]:
    model = Transformer(ModelConfig(rule="triple_momentum", **{**SIZE, **fields}))
    optimizers = Optimizers(model, TrainingConfig(optimizer=optimizer))
    train(model, optimizers, range(2))
    return model, optimizers


def test_state_is_named_by_optimizer_parameter_and_kind() -> None:
    model, optimizers = trained()
    state = optimizers.named_state(model)
    expected = set()
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and parameter.ndim == 2:
            expected.add(f"muon.{name}.momentum")
            assert state[f"muon.{name}.momentum"].shape == parameter.shape
            continue
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            expected.add(f"adam.{name}.{kind}")
        assert state[f"adam.{name}.exp_avg"].shape == parameter.shape
        assert state[f"adam.{name}.exp_avg_sq"].shape == parameter.shape
        step = state[f"adam.{name}.step"]
        assert (step.shape, step.dtype, float(step)) == (torch.Size(), torch.float32, 2.0)
    assert state.keys() == expected
    model, optimizers = trained("adamw")
    assert {name.split(".")[0] for name in optimizers.named_state(model)} == {"adam"}
    assert len(optimizers.named_state(model)) == 3 * len(list(model.parameters()))


def test_no_state_is_loaded_as_before_the_first_step() -> None:
    model, optimizers = trained()
    template = optimizers.named_state(model, template=True)
    optimizers.load_named_state(model, {})
    assert optimizers.named_state(model) == {}
    zeros = optimizers.named_state(model, template=True)
    assert optimizers.named_state(model) == {}  # asking for it makes nothing
    assert zeros.keys() == template.keys()
    for name, zero in zeros.items():
        assert not zero.any()
        assert (zero.shape, zero.dtype) == (template[name].shape, template[name].dtype)
    fresh = Transformer(model.config)
    fresh.load_state_dict(model.state_dict())
    others = Optimizers(fresh, TrainingConfig())
    train(model, optimizers, range(3))
    train(fresh, others, range(3))
    assert same(model.state_dict(), fresh.state_dict())


class Unused(UpdateRule):
    """A user's rule whose second scalar takes part from some moment on."""

    used = False

    muon_parameters = ("square",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.later = nn.Parameter(torch.ones(3))
        self.square = nn.Parameter(torch.eye(8))

    def step(self, x: Tensor, state: Any, oracle: Any) -> tuple[Tensor, Any]:
        g = oracle(x)
        return x + (g @ self.square * self.later.sum() if Unused.used else g), state


def test_a_parameter_without_gradients_so_far_resumes_exactly(
    registered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(rule=registered("unused", Unused), **SIZE)
    model = Transformer(config)
    optimizers = Optimizers(model, TrainingConfig())
    train(model, optimizers, range(2))
    state = copied(optimizers.named_state(model))
    name = "blocks.0.rules.mlp"
    assert not state[f"muon.{name}.square.momentum"].any()
    assert [float(state[f"adam.{name}.{p}.step"]) for p in ("later",)] == [0.0]
    other = Transformer(config)
    other.load_state_dict(model.state_dict())
    restored = Optimizers(other, TrainingConfig())
    restored.load_named_state(other, state)
    monkeypatch.setattr(Unused, "used", True)
    train(model, optimizers, range(2, 4))
    train(other, restored, range(2, 4))
    assert float(restored.named_state(other)[f"adam.{name}.later.step"]) == 2
    assert same(other.state_dict(), model.state_dict())


def test_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    model, optimizers = trained()
    other, adamw = trained("adamw")
    deeper, more = trained(num_layers=3)
    before = copied(optimizers.named_state(model))
    name = "adam.embedding.tokens.weight.exp_avg"
    wrong: list[tuple[Saved, str]] = [
        ({k: v for k, v in before.items() if k != name}, rf"has no '{name}';"),
        ({**before, "adam.norm.bias.step": torch.ones(())}, "unexpected 'adam.norm.bias.step';"),
        ({**before, name: torch.zeros(11, 9)}, r"float32 of shape \(11, 9\) where .* \(11, 8\)"),
        ({**before, name: before[name].double()}, rf"'{name}' is float64 of shape"),
        ({**before, f"{name[:-7]}step": torch.ones(1)}, r"of shape \(1,\) where"),
        (adamw.named_state(other), r"has no 'muon\.blocks\.0.*\(and 7 more\); .*optimizer"),
        (more.named_state(deeper), r"unexpected '.*blocks\.2\..*\(and \d+ more\)"),
    ]
    for tensors, message in wrong:
        with pytest.raises(RunError, match=message) as caught:
            optimizers.load_named_state(model, tensors)
        assert "\n" not in str(caught.value)
        assert same(optimizers.named_state(model), before)


def test_optimizers_of_another_models_parameters_say_so() -> None:
    _, optimizers = trained()
    other, _ = trained()
    with pytest.raises(ConfigError, match="build the optimizers after the model is on its device"):
        optimizers.named_state(other)
