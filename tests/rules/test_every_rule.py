"""What must hold of every registered rule, whoever wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor

from polyak import ModelConfig, Transformer, ops, rules

every_rule = pytest.mark.parametrize("rule", rules.names())
both_splittings = pytest.mark.parametrize("splitting", ["lie_trotter", "simultaneous"])
Build = Callable[..., Transformer]


def ids(batch: int, length: int, vocab: int = 11) -> Tensor:
    return torch.randint(vocab, (batch, length))


def gradients(model: Transformer, input_ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(input_ids[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@every_rule
@both_splittings
def test_future_tokens_do_not_change_past_logits(
    rule: str, splitting: str, tiny_model: Build
) -> None:
    model, input_ids = tiny_model(rule, splitting=splitting), ids(2, 7)
    logits = model(input_ids)
    for position in range(1, 7):
        changed = input_ids.clone()
        changed[:, position:] = (changed[:, position:] + 1) % 11
        difference = (model(changed) - logits).abs().amax(dim=(0, 2))
        assert difference[:position].max() < 1e-12
        assert difference[position] > 1e-6
        # a shorter sequence is a prefix of a longer one
        assert (model(input_ids[:, :position]) - logits[:, :position]).abs().max() < 1e-12


@every_rule
def test_a_model_that_is_not_causal_does_use_the_future(rule: str, tiny_model: Build) -> None:
    model, input_ids = tiny_model(rule, causal=False), ids(1, 7)
    changed = input_ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 11
    difference = (model(changed) - model(input_ids)).abs().amax(dim=(0, 2))
    assert difference.min() > 1e-9


@every_rule
@both_splittings
def test_sequences_of_a_batch_do_not_see_each_other(
    rule: str, splitting: str, tiny_model: Build
) -> None:
    model, input_ids = tiny_model(rule, splitting=splitting), ids(5, 6)
    order = torch.tensor([3, 0, 4, 1, 2])
    logits = model(input_ids)
    assert (model(input_ids[order]) - logits[order]).abs().max() < 1e-12
    alone = torch.cat([model(row[None]) for row in input_ids])
    assert (alone - logits).abs().max() < 1e-12


@every_rule
@both_splittings
@pytest.mark.parametrize("num_heads", [3, 6])  # a token's matrix is wide, or tall
def test_fast_ops_equal_reference_ops(
    rule: str, splitting: str, num_heads: int, tiny_model: Build
) -> None:
    model = tiny_model(rule, splitting=splitting, num_heads=num_heads, bias=True)
    input_ids = ids(2, 7)
    logits, fast = model(input_ids), gradients(model, input_ids)
    with ops.reference_forms():
        assert (model(input_ids) - logits).abs().max() < 1e-9
        plain = gradients(model, input_ids)
    assert fast.keys() == plain.keys()
    for name, gradient in fast.items():
        assert (gradient - plain[name]).abs().max() <= 1e-7 * plain[name].abs().max(), name


@every_rule
@both_splittings
def test_every_parameter_is_used(rule: str, splitting: str, tiny_model: Build) -> None:
    model = tiny_model(rule, splitting=splitting, bias=True)
    found = gradients(model, ids(2, 7))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert name in found, name
        assert found[name].shape == parameter.shape
        assert found[name].abs().max() > 0, name


@pytest.mark.parametrize(
    ("rule", "start"),
    [(rule, None) for rule in rules.names()]
    + [
        (rule, "zeros")
        for rule in rules.names()
        if any(stream.start == "embedding" for stream in rules.get(rule).streams)
    ],
)
def test_logits_and_gradients_are_finite_at_depth_48(rule: str, start: Any) -> None:
    config = ModelConfig(
        rule=rule,
        num_layers=48,
        num_heads=4,
        d_model=16,
        vocab_size=11,
        context_length=6,
        stream_start=start,
    )
    model = Transformer(config)
    input_ids = ids(2, 7)
    assert model(input_ids[:, :6]).isfinite().all()
    for name, gradient in gradients(model, input_ids).items():
        assert gradient.isfinite().all(), name


@every_rule
def test_a_norm_can_be_switched_off(rule: str, tiny_model: Build) -> None:
    for attribute, norm in rules.get(rule).norms.items():
        with_norm, without = (
            tiny_model(rule, rule_options={norm.option: value}) for value in ("layer", "none")
        )
        weight = f"blocks.0.rules.mlp.{attribute}.weight"
        assert weight in dict(with_norm.named_parameters())
        assert weight not in dict(without.named_parameters())
        without.load_state_dict(with_norm.state_dict(), strict=False)
        logits = without(ids(2, 7))
        assert logits.isfinite().all()
        assert (logits - with_norm(ids(2, 7))).abs().max() > 1e-3


@every_rule
def test_a_saved_model_loads_exactly(rule: str, tiny_model: Build, tmp_path: Path) -> None:
    model, input_ids = tiny_model(rule, dtype=torch.float32, bias=True), ids(2, 7)
    save_model(model, str(tmp_path / "model.safetensors"))
    again = Transformer(ModelConfig.from_dict(model.config.to_dict())).eval()
    load_model(again, tmp_path / "model.safetensors")
    assert torch.equal(again(input_ids), model(input_ids))
    plain = Transformer(model.config).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(input_ids), model(input_ids))


@every_rule
def test_dropout_acts_in_training_only(rule: str, tiny_model: Build) -> None:
    model, input_ids = tiny_model(rule, dropout=0.5), ids(2, 7)
    sure = tiny_model(rule)
    sure.load_state_dict(model.state_dict())
    assert torch.equal(model(input_ids), sure(input_ids))
    model.train()
    assert (model(input_ids) - sure(input_ids)).abs().max() > 1e-3
    assert (model(input_ids) - model(input_ids)).abs().max() > 1e-3
    sure.train()  # without dropout, training and evaluation are one function
    assert torch.equal(sure(input_ids), sure(input_ids))


@every_rule
@both_splittings
def test_a_scalar_can_be_frozen_and_started_elsewhere(
    rule: str, splitting: str, tiny_config: Callable[..., ModelConfig]
) -> None:
    kind = rules.get(rule)
    for name in kind.present_scalars(kind.resolve({})):
        options = {"frozen": [name], name: 0.25}
        model = Transformer(tiny_config(rule, splitting=splitting, rule_options=options))
        found = gradients(model, ids(2, 7))
        for parameter, value in model.named_parameters():
            frozen = parameter.endswith(f".{name}_raw")
            assert (parameter not in found) == frozen
            assert value.requires_grad != frozen
        per_substep = model.scalars()[name]
        substeps = 1 if splitting == "simultaneous" else 2
        assert len(per_substep) == substeps
        for depths in per_substep.values():
            assert depths == pytest.approx([0.25] * 2, abs=1e-6)


@every_rule
@both_splittings
def test_unconstrained_coefficients_are_the_raw_values_and_the_same_function(
    rule: str, splitting: str, tiny_model: Build
) -> None:
    kind, input_ids = rules.get(rule), ids(2, 7)
    model = tiny_model(rule, splitting=splitting)
    if not kind.present_scalars(kind.resolve({})):
        return
    free = tiny_model(rule, splitting=splitting, rule_options={"coefficients": "unconstrained"})
    with torch.no_grad():
        free.load_state_dict(model.state_dict())
        for ours, theirs in zip(free.blocks, model.blocks, strict=True):
            for substep, constrained in zip(
                ours.rules.values(), theirs.rules.values(), strict=True
            ):
                for name in kind.present_scalars(constrained.options):
                    getattr(substep, f"{name}_raw").copy_(getattr(constrained, name))
    again = ModelConfig.from_dict(json.loads(json.dumps(free.config.to_dict())))
    assert again == free.config
    assert (free(input_ids) - model(input_ids)).abs().max() < 1e-12
    fast = gradients(free, input_ids)
    with ops.reference_forms():
        plain = gradients(free, input_ids)
    for name, gradient in fast.items():
        assert gradient.abs().max() > 0
        assert (gradient - plain[name]).abs().max() <= 1e-7 * plain[name].abs().max(), name


@pytest.mark.parametrize("rule", [name for name in rules.names() if rules.get(name).descent])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_where_a_rule_descends_its_step_is_gradient_descent_bit_for_bit(
    rule: str, dtype: torch.dtype
) -> None:
    kind = rules.get(rule)
    options = {**(kind.descent or {}), "coefficients": "unconstrained"}
    one = kind(12, 3, options=options).to(dtype)
    x, g, *streams = torch.randn(2 + len(kind.streams), 2, 5, 12, dtype=dtype)
    seen = []

    def oracle(y: Tensor) -> Tensor:
        seen.append(y)
        return g

    moved, _ = one.step(x, kind.State(*streams), oracle)
    assert torch.equal(moved, x + g)
    assert all(torch.equal(y, x) for y in seen)
    # and from there every coefficient is learned: none has a gradient of zero
    y = torch.randn_like(x)
    (one.step(x, kind.State(*streams), lambda ahead: (ahead * y).tanh())[0] * y).sum().backward()
    for name, parameter in one.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, name


def test_the_point_of_descent_is_not_inherited() -> None:
    class Other(rules.get("heavy_ball")):  # type: ignore[misc]
        pass

    assert rules.get("heavy_ball").descent is not None
    assert Other.descent is None


@every_rule
def test_state_has_one_value_per_token(rule: str, tiny_model: Build) -> None:
    model = tiny_model(rule)
    x, state = model.start(ids(2, 7))
    for block in model.blocks:
        x, state = block(x, state)
        assert x.shape == (2, 7, 12)
        for stream in model.rule.streams:
            assert getattr(state, stream.name).shape == (2, 7, *stream.shape(12, 3))
