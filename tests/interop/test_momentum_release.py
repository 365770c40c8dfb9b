"""Weights of the Momentum Transformer's release in our models: its stacks, and whole models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from polyak import ModelConfig, Transformer
from polyak.errors import ConfigError
from polyak.interop import momentum_release
from polyak.nn.sinusoidal import sinusoids

FOLDER = Path(__file__).parents[1] / "conformance" / "momentum_transformer"
NAMES = {
    "attention.q": "attention.query_projection",
    "attention.k": "attention.key_projection",
    "attention.v": "attention.value_projection",
    "attention.out": "attention.out_projection",
    "ffn.up": "linear1",
    "ffn.down": "linear2",
    "norm_attention": "norm1",
    "norm_ffn": "norm2",
    "norm_final": "norm",
}
ATTENTION: dict[str, dict[str, Any]] = {
    "linear": {"attention": "linear"},
    "momentum": {"attention": "momentum", "attention_options": {"mu": 0.6, "gamma": 0.9}},
    "adaptive": {"attention": "adaptive_momentum", "attention_options": {"gamma": 0.9}},
}
STACKS = [f"stack_{kind}" for kind in ("plain", "momentum", "adaptive")]
DECODERS = [
    "decoder_plain_residual_momentum_attention",
    "decoder_adaptive_residual_momentum_attention",
    "decoder_adaptive_residual_adaptive_attention",
]


def released(name: str) -> str:
    """The vectors' name of a weight as the release has it."""
    for short, full in NAMES.items():
        name = name.replace(f"{short}.", f"{full}.")
    return name


def vector(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Inputs and outputs, weights by released name, and hyperparameters."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        given = json.loads(file.metadata()["hyperparameters"])
    weights = {released(k[7:]): v for k, v in tensors.items() if k.startswith("weight.")}
    return tensors, weights, given


def built(given: dict[str, Any], width: int, **fields: Any) -> Transformer:
    """Our model of a vector, in float64, its fixed coefficients exact."""
    rule = "gradient_descent"
    if "adaptive" in given:
        options = f"kind={given['adaptive']},s={given['s_r']}"
        rule = f"adaptive_residual_momentum[{options}]@attention+gradient_descent@mlp"
    elif "mu_r" in given:
        options = f"mu={given['mu_r']},s={given['s_r']}"
        rule = f"residual_momentum[{options}]@attention+gradient_descent@mlp"
    shape = {"num_layers": 3, "num_heads": 3, "d_model": 12, "mlp_width": width, "vocab_size": 11}
    backbone = {"positions": "none", "position_mix": "added"}
    backbone |= ATTENTION[given.get("attention", "linear")]
    fields = {**shape, **backbone, "context_length": 9, **fields}
    model = Transformer(ModelConfig.preset("momentum_transformer", rule=rule, **fields)).double()
    with torch.no_grad():
        for block in model.blocks:
            for one in block.rules.values():  # type: ignore[operator]
                for name, scalar in one.present_scalars(one.options).items():
                    raw: Any = scalar.raw_of(one.options[name])
                    one.get_parameter(f"{name}_raw").fill_(raw)
    return model.eval()


@pytest.mark.parametrize("name", [*STACKS, *DECODERS])
def test_our_model_with_released_weights_is_the_released_stack(name: str) -> None:
    """In value and every gradient that the vectors hold (all six have some), padding included."""
    tensors, weights, given = vector(name)
    model = built(given, 20)
    momentum_release.load_state_dict(model, weights)
    x, mask = tensors["x"].clone().requires_grad_(), None
    if "lengths" in tensors:
        mask = (torch.arange(x.shape[1]) < tensors["lengths"][:, None]).long()
    ids = torch.zeros(x.shape[:2], dtype=torch.long)
    context, (_, state) = model.context(ids, mask), model.start(ids)  # streams start at zero
    y = x
    for block in model.blocks:
        y, state = block(y, state, context)
    out = model.norm(y)
    (out * tensors["cotangent"]).sum().backward()
    found = {"out": out.detach(), "grad.x": x.grad}
    for ours, names in momentum_release._sources(model, whole=False).items():
        grad = model.get_parameter(ours).grad
        assert grad is not None, ours
        found |= zip((f"grad.weight.{n}" for n in names), grad.chunk(len(names)), strict=True)
    expected = {released(k): v for k, v in tensors.items() if k.startswith(("out", "grad."))}
    assert expected.keys() >= {"out", "grad.x"}
    for key, value in expected.items():
        off = (found[key] - value).abs().max()
        assert off <= 1e-10 * value.abs().max(), key


def whole_state(model: Transformer) -> dict[str, Tensor]:
    """Random weights of a whole model, by the release's names."""
    wanted = momentum_release._sources(model, whole=True)
    parameters = dict(model.named_parameters())
    state: dict[str, Tensor] = {}
    for ours, names in wanted.items():
        parts = torch.randn_like(parameters[ours]).chunk(len(names))
        state |= dict(zip(names, parts, strict=True))
    table = sinusoids(torch.arange(9), 6, torch.float32)[None]
    bias = torch.randn(model.config.vocab_size, dtype=torch.float64)
    return state | {"pos_embedding.pe": table, "predictor.bias": bias}


SINUSOIDAL = {"positions": "sinusoidal", "position_mix": "concatenated"}


@torch.no_grad()
def test_a_whole_models_output_bias_is_in_the_final_norm() -> None:
    model = built({"attention": "momentum"}, 48, **SINUSOIDAL)
    state, ids = whole_state(model), torch.randint(11, (2, 9))
    momentum_release.load_state_dict(model, state)
    logits = model(ids)
    model.norm.bias.copy_(state["transformer.norm.bias"])
    expected = model.features(ids) @ state["predictor.weight"].T + state["predictor.bias"]
    assert (logits - expected).abs().max() < 1e-9
    assert torch.equal(model.embedding.tokens.weight, state["value_embedding.weight"])


def test_what_the_release_does_not_have_is_refused_in_one_line(
    tiny_config: Callable[..., ModelConfig],
) -> None:
    model = built({"attention": "momentum"}, 48, **SINUSOIDAL)
    state = whole_state(model)
    before = [parameter.clone() for parameter in model.parameters()]
    other = state["transformer.layers.1.linear1.weight"][:, :5]
    for change, says in (
        ({"transformer.layers.0.linres1.weight": torch.eye(12)}, "unexpected transformer.layers.0"),
        ({"transformer.layers.1.linear1.weight": other}, "shape .* the model needs"),
        ({"pos_embedding.pe": torch.zeros(1, 9, 6)}, "other positions than sines and cosines"),
    ):
        with pytest.raises(ConfigError, match=says) as caught:
            momentum_release.load_state_dict(model, {**state, **change})
        assert "\n" not in str(caught.value)
    short = {k: v for k, v in state.items() if k != "transformer.norm.weight"}
    with pytest.raises(ConfigError, match=r"missing transformer.norm.weight"):
        momentum_release.load_state_dict(model, short)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
    with pytest.raises(ConfigError, match="norm_position='post'; this model differs"):
        momentum_release.load_state_dict(Transformer(tiny_config("gradient_descent")), state)
    many = built({"attention": "momentum"}, 48, **SINUSOIDAL, vocab_size=40)
    with pytest.raises(ConfigError, match=r"predictor.bias cannot be had: 40 classes of 12"):
        momentum_release.load_state_dict(many, whole_state(many))
