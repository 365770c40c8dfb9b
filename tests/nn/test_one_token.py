"""Decoding one row by its short cut is the full forward, for every rule and option."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from polyak import ModelConfig, Transformer, rules
from polyak.evaluation.decoder import Decoder
from polyak.nn.cache import KeyValueCache
from polyak.nn.decoding.one_token import OneToken
from polyak.nn.presets import preset_fields
from polyak.rules import Stream, UpdateRule, state_norm, unit_interval

Build = Callable[..., Transformer]


def check(model: Transformer, atol: float = 1e-10) -> None:
    ids = torch.randint(model.config.vocab_size, (1, model.config.context_length))
    with torch.no_grad():
        expected = model(ids)[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        decoder = Decoder(model, [ids[0, :2].tolist()])
        found = [decoder.logits()]
        found += [decoder.logits(ids[:, place]) for place in range(2, ids.shape[1])]
    assert decoder._one is not None
    torch.testing.assert_close(torch.cat(found), expected[1:], atol=atol, rtol=atol)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with torch.no_grad():  # the model itself was left as it was
        assert torch.equal(model(ids)[0], expected)


LLAMA = preset_fields("llama", 4)
QWEN = {
    **LLAMA,
    "num_heads": 6,
    "num_kv_heads": 2,
    "qk_norm": True,
    "qkv_bias": True,
    "head_dim": 4,
}


@pytest.mark.parametrize("splitting", ["lie_trotter", "simultaneous"])
@pytest.mark.parametrize("rule", rules.names())
def test_one_row_gets_the_logits_of_the_full_forward(
    rule: str, splitting: str, tiny_model: Build
) -> None:
    check(tiny_model(rule, splitting=splitting))
    check(tiny_model(rule, splitting=splitting, dtype=torch.float32), 2e-4)
    check(tiny_model(rule, splitting=splitting, **LLAMA))


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("triple_momentum", {"stream_start": "zeros"}),
        ("triple_momentum", {"bias": True, "tie_embeddings": False}),
        ("triple_momentum", {"rule_options": {"state_norm": "none"}}),
        ("nesterov", {"rule_options": {"gamma": 1e-8}}),  # too small to divide by
        ("gradient_descent", {"rule_options": {"update_norm": "layer"}}),
        ("adamw", {"norm_eps": 0.1}),
        ("gradient_descent", preset_fields("gpt2", 4)),
        ("gradient_descent", preset_fields("momentum_transformer", 4)),
        ("triple_momentum", preset_fields("momentum_transformer", 4)),
        ("nesterov", {"positions": "sinusoidal", "norm": "rms", "norm_position": "post"}),
        ("adam", {"positions": "none", "norm_position": "post"}),
        ("triple_momentum", QWEN),
        ("triple_momentum", {**QWEN, "norm": "layer", "bias": True}),
        ("triple_momentum", {**LLAMA, "rope_scaling": (8.0, 1.0, 4.0, 4.0)}),
        ("triple_momentum", {**LLAMA, "rope_scaling": (8.0,)}),
        ("nesterov", {**LLAMA, "rule_options": {"gamma": 1e-8}}),
        ("gradient_descent", {"mlp": "gated", "bias": True, "num_kv_heads": 1}),
    ],
)
def test_options_hold(rule: str, fields: dict[str, Any], tiny_model: Build) -> None:
    check(tiny_model(rule, **fields))


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("linear", {"normalize": False, "scale": "head_dim", "feature_map": "identity"}),
    ("linear", {"scale": "head_dim", "eps": 0.1}),
    ("momentum", {"mu": 0.8, "gamma": 0.5}),
    ("momentum", {"mu_learned": "head", "gamma_learned": "model", "feature_map": "softplus"}),
    ("momentum", {"mu_learned": "layer", "weighted_normalizer": True}),
    ("momentum", {"normalize": False}),
    ("adaptive_momentum", {"gamma": 0.7}),
    ("adaptive_momentum", {"gamma_learned": "head", "first_step": "gamma"}),
    ("adaptive_momentum", {"normalize": False}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_attention_with_a_state_gets_the_logits_of_the_full_forward(
    kind: str, options: dict[str, Any], tiny_model: Build
) -> None:
    given = {"attention": kind, "attention_options": options}
    check(tiny_model("triple_momentum", **given))
    check(tiny_model("gradient_descent", splitting="simultaneous", **{**QWEN, **given}))
    check(tiny_model("nesterov", dtype=torch.float32, **given), 2e-4)


@pytest.mark.parametrize("silent", [9, 11])
def test_momentum_that_is_nothing_stays_nothing(silent: int, tiny_model: Build) -> None:
    """Values of 0, of most tokens or of all: |P| is 0 where μ divides by it."""
    options = {"gamma": 0.5, "feature_map": "identity", "normalize": False}
    given = {"attention": "adaptive_momentum", "attention_options": options, "positions": "none"}
    model = tiny_model("gradient_descent", num_layers=1, **given)
    with torch.no_grad():
        model.embedding.tokens.weight[:silent] = 0
    check(model)


@pytest.mark.parametrize("kind", ["linear", "momentum", "adaptive_momentum"])
def test_a_state_goes_on_beyond_the_context(kind: str, tiny_model: Build) -> None:
    shape = {"num_heads": 4, "d_model": 16, "attention": kind}
    model = tiny_model("nesterov", **{**LLAMA, **shape})
    ids = torch.randint(11, (2, 30))
    with torch.inference_mode():
        expected = model(ids)
        one = Decoder(model, [ids[0, :2].tolist()])
        rows = Decoder(model, [ids[0, :2].tolist(), ids[1, :9].tolist()])
        found, beside = one.logits()[0], rows.logits()
        assert (found - expected[0, 1]).abs().max() < 1e-10
        for place in range(2, 21):
            found = one.logits(ids[:1, place])[0]
            beside = rows.logits(torch.stack((ids[0, place], ids[1, place + 7])))
        assert (found - expected[0, 20]).abs().max() < 1e-10
        assert (beside[0] - expected[0, 20]).abs().max() < 1e-10
        assert (beside[1] - expected[1, 27]).abs().max() < 1e-10
    assert one._one is not None
    assert one.rereads == [0]


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": True},
        QWEN,
        preset_fields("gpt2", 4),
        {"attention": "momentum"},
        {**QWEN, "attention": "adaptive_momentum"},
    ],
)
def test_matrices_in_blocks_are_the_same(
    fields: dict[str, Any], tiny_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyak.nn.decoding.one_vector.LARGE", 1)
    check(tiny_model("triple_momentum", **fields))


class Twice(UpdateRule):
    """Calls its oracle twice a step, so attention has two slots a layer."""

    streams = (Stream("v", start="ones"),)
    beta = unit_interval(0.3)
    norm = state_norm()

    def step(self, x: Any, state: Any, oracle: Any) -> Any:
        ahead = x + oracle(x + self.beta * state.v)
        v = self.norm(state.v + oracle(ahead))
        return x + v, state.replace(v=v)


class Below(Twice):
    """Uses its base class's step."""

    def step(self, x: Any, state: Any, oracle: Any) -> Any:
        x, state = super().step(x, state, oracle)
        return (1 - self.beta) * x, state


@pytest.mark.parametrize("rule", [Twice, Below])
def test_rules_of_a_users_own_hold(
    rule: type[UpdateRule], registered: Any, tiny_model: Build
) -> None:
    name = registered("mine", rule)
    check(tiny_model(name))
    check(tiny_model(name, attention="momentum"))


def test_scalars_are_read_anew_by_every_generation(tiny_model: Build) -> None:
    model = tiny_model("triple_momentum")
    check(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    check(model)


def test_what_it_does_not_know_it_does_not_take(tiny_model: Build) -> None:
    model = tiny_model("gradient_descent")
    assert OneToken.supports(model)
    model.blocks[1].mlp = torch.nn.Identity()
    assert not OneToken.supports(model)
    assert not OneToken.supports(tiny_model("gradient_descent", dtype=torch.bfloat16))


def test_it_begins_where_the_cache_ends() -> None:
    model = Transformer(ModelConfig(context_length=6, num_layers=1)).eval()
    ids = torch.randint(256, (1, 6))
    cache = KeyValueCache(6)
    with torch.no_grad():
        model(ids[:, :5], cache=cache)
        found = OneToken(model, cache).logits(ids[:, 5])
        torch.testing.assert_close(found, model(ids)[:, -1], atol=1e-5, rtol=1e-4)
