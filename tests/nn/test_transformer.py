"""The model around the rules: embeddings, oracles, splittings, initialisation, errors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polyak import ModelConfig, Transformer
from polyak.errors import ConfigError
from polyak.nn.transformer import parameter_count
from polyak.rules import Oracle, State, UpdateRule

Build = Callable[..., Transformer]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


def plain_attention(model: Transformer, layer: int, x: Tensor) -> Tensor:
    """Softmax attention written out, one head at a time."""
    attention = model.blocks[layer].attention
    d, heads = model.config.d_model, model.config.num_heads
    normed = F.layer_norm(x, (d,), attention.norm.weight, attention.norm.bias, 1e-5)
    q, k, v = (normed @ part.T for part in attention.qkv.weight.split(d))
    width, outputs = d // heads, []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        outputs.append(weights @ v[..., part])
    return torch.cat(outputs, -1) @ attention.out.weight.T


def plain_mlp(model: Transformer, layer: int, x: Tensor) -> Tensor:
    mlp = model.blocks[layer].mlp
    h = F.layer_norm(x, x.shape[-1:], mlp.norm.weight, mlp.norm.bias, 1e-5) @ mlp.up.weight.T
    return (0.5 * h * (1 + torch.erf(h / math.sqrt(2)))) @ mlp.down.weight.T


@pytest.mark.parametrize("splitting", ["lie_trotter", "simultaneous"])
@pytest.mark.parametrize("tie", [True, False])
def test_gradient_descent_is_the_pre_norm_transformer(
    splitting: str, tie: bool, tiny_model: Build
) -> None:
    model = tiny_model("gradient_descent", splitting=splitting, tie_embeddings=tie)
    x = model.embedding.tokens.weight[IDS] + model.embedding.positions.weight[:7]
    for layer in range(2):
        after = x + plain_attention(model, layer, x)
        at = after if splitting == "lie_trotter" else x
        x = after + plain_mlp(model, layer, at)
    x = F.layer_norm(x, (12,), model.norm.weight, None, 1e-5)
    output = model.embedding.tokens.weight if tie else model.head.weight
    assert (model(IDS) - x @ output.T).abs().max() < 1e-12


def test_splittings_differ(tiny_model: Build) -> None:
    one = tiny_model("gradient_descent")
    other = tiny_model("gradient_descent", splitting="simultaneous")
    other.load_state_dict(one.state_dict())
    assert (one(IDS) - other(IDS)).abs().max() > 1e-3


def test_simultaneous_calls_the_rule_once_a_layer(
    tiny_model: Build, registered: Callable[[str, type[UpdateRule]], str]
) -> None:
    calls: list[float] = []

    class Watching(UpdateRule):
        def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
            calls.append(float(x.detach().sum()))
            return x + oracle(x), state

    name = registered("watching", Watching)
    for splitting, count in (("lie_trotter", 4), ("simultaneous", 2)):
        calls.clear()
        tiny_model(name, splitting=splitting)(IDS)
        assert len(calls) == count


def test_weights_start_as_released() -> None:
    config = ModelConfig(
        rule="triple_momentum", num_layers=8, d_model=64, vocab_size=512, context_length=256
    )
    model = Transformer(config)
    residual = 0.02 / math.sqrt(16)
    for name, parameter in model.named_parameters():
        if name.endswith("_raw"):
            continue
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones(64)), name
            continue
        expected = residual if name.endswith(("out.weight", "down.weight")) else 0.02
        assert abs(parameter.mean()) < 5 * expected / math.sqrt(parameter.numel()), name
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
    for values in model.scalars()["mu"].values():
        assert values == pytest.approx([0.5] * 8)
    assert model.scalars()["gamma"]["attention"] == pytest.approx([math.log(2)] * 8)
    assert model.scalars()["nu"]["mlp"] == pytest.approx([1.0] * 8)
    # the velocity has its own tables, drawn apart from x's
    assert not torch.equal(model.streams["v"].tokens.weight, model.embedding.tokens.weight)


def test_adamw_starts_with_little_decay() -> None:
    model = Transformer(ModelConfig(rule="adamw"))
    decay = 1 / (1 + math.exp(5))
    assert model.scalars()["lambda_"]["mlp"] == pytest.approx([decay] * 4)
    assert model.blocks[0].rules["mlp"].lambda__raw.shape == ()


def test_one_seed_gives_one_model() -> None:
    config = ModelConfig(rule="adam")
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(Transformer(config))
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("tie", [True, False])
def test_the_output_is_the_token_table_when_tied(tie: bool, tiny_model: Build) -> None:
    model = tiny_model("nesterov", tie_embeddings=tie)
    assert (model.head.weight is model.embedding.tokens.weight) == tie
    assert len({id(p) for p in model.parameters()}) == len(list(model.parameters()))
    model.double().requires_grad_()  # a move keeps them tied
    assert (model.head.weight is model.embedding.tokens.weight) == tie


def test_a_zero_start_has_no_tables_and_starts_at_zero(tiny_model: Build) -> None:
    model = tiny_model("soap", stream_start="zeros")
    assert list(model.streams) == []
    _, state = model.start(IDS)
    assert torch.equal(state.m, torch.zeros(2, 7, 12, dtype=torch.float64))
    # only streams that start from an embedding are touched
    assert torch.equal(state.R, torch.eye(4, dtype=torch.float64).expand(2, 7, 4, 4))


def test_a_sequence_longer_than_the_context_is_refused(tiny_model: Build) -> None:
    model = tiny_model("adam")
    with pytest.raises(ConfigError, match=r"8 tokens is longer than context_length=7; shorten it"):
        model(torch.zeros(1, 8, dtype=torch.long))


def test_parameter_count_needs_no_memory() -> None:
    config = ModelConfig(
        num_layers=96, num_heads=96, d_model=12288, vocab_size=50257, context_length=2048
    )
    assert parameter_count(config) == pytest.approx(175e9, rel=0.01)


def test_norm_eps_reaches_every_norm(tiny_model: Build) -> None:
    model = tiny_model("heavy_ball", norm_eps=0.25, bias=True)
    norms = [m for m in model.modules() if type(m).__name__ == "LayerNorm"]
    assert len(norms) == 2 * (2 + 2) + 1
    for norm in norms:
        assert norm.eps == 0.25
        assert norm.bias is not None
