"""Rules on backbones: what holds on the paper's holds on GPT-2's, Llama's and the others.

Every rule is tried on GPT-2's and Llama's; two, one of them with streams, on the rest, whose
fields meet in pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor
from torch.func import functional_call, jacfwd, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from polyak import ModelConfig, Transformer, ops, rules
from polyak.errors import ConfigError
from polyak.nn.cache import KeyValueCache
from polyak.nn.presets import preset_fields
from polyak.nn.rotary import rotary_table, rotate

# two key-value heads, so that a group is more than one head and less than all; heads that are
# wider than d / H
SHAPE = {"num_layers": 2, "num_heads": 4, "d_model": 16, "vocab_size": 11, "context_length": 7}
BACKBONES: dict[str, dict[str, Any]] = {
    "gpt2": preset_fields("gpt2", 4),
    "llama": {**preset_fields("llama", 4), "num_kv_heads": 2, "head_dim": 6},
}
OTHERS: dict[str, dict[str, Any]] = {
    "momentum_transformer": preset_fields("momentum_transformer", 4),
    "post rope": {**BACKBONES["llama"], "norm_position": "post", "qk_norm": True},
    "post learned": {"norm_position": "post", "mlp": "gated", "qkv_bias": True},
    "sinusoidal": {"positions": "sinusoidal", "norm": "rms", "num_kv_heads": 1, "bias": True},
    "concatenated": {
        "positions": "sinusoidal",
        "position_mix": "concatenated",
        "tie_embeddings": False,
        "activation": "relu",
    },
    "none": {"positions": "none", "norm_position": "post", "norm": "rms", "head_dim": 6},
}
BACKBONES |= OTHERS
TWO_RULES = ("gradient_descent", "triple_momentum")
PAIRS = [
    (rule, backbone)
    for backbone in BACKBONES
    for rule in (TWO_RULES if backbone in OTHERS else rules.names())
]
SPLIT = [
    (rule, backbone, splitting)
    for rule, backbone in PAIRS
    for splitting in ("lie_trotter", "simultaneous")
    if splitting == "lie_trotter" or BACKBONES[backbone].get("norm_position") != "post"
]
every_rule = pytest.mark.parametrize("rule", rules.names())
every_backbone = pytest.mark.parametrize("backbone", BACKBONES)
every_pair = pytest.mark.parametrize(("rule", "backbone"), PAIRS)
costly_pair = pytest.mark.parametrize(
    ("rule", "backbone"),
    [
        pytest.param(
            rule,
            backbone,
            marks=pytest.mark.slow if backbone == "gpt2" and rule not in TWO_RULES else (),
        )
        for rule, backbone in PAIRS
    ],
)
"""Every rule on Llama's alone, which has more of its own than GPT-2's."""
every_split_pair = pytest.mark.parametrize(("rule", "backbone", "splitting"), SPLIT)
Build = Callable[..., Transformer]


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(11, (batch, length))


@pytest.fixture
def build(tiny_model: Build) -> Build:
    """A small float64 model of a backbone, its weights far from their start."""

    def make(rule: str, backbone: str, **fields: Any) -> Transformer:
        return tiny_model(rule, **{**SHAPE, **BACKBONES[backbone], **fields})

    return make


def gradients(model: Transformer, input_ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(input_ids[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@every_split_pair
@torch.no_grad()
def test_the_past_is_all_that_counts_cached_or_not(
    rule: str, backbone: str, splitting: str, build: Build
) -> None:
    model, input_ids = build(rule, backbone, splitting=splitting), ids(2, 7)
    logits = model(input_ids)
    changed = input_ids.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 11
    difference = (model(changed) - logits).abs().amax(dim=(0, 2))
    assert difference[:4].max() < 1e-12
    assert difference[4] > 1e-6
    for sizes in ([1] * 7, [3, 1, 3]):
        cache = KeyValueCache(7)
        found = torch.cat([model(piece, cache=cache) for piece in input_ids.split(sizes, 1)], 1)
        assert (found - logits).abs().max() < 1e-10


@every_pair
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_padding_does_not_change_real_positions(
    rule: str, backbone: str, causal: bool, build: Build
) -> None:
    model, input_ids = build(rule, backbone, causal=causal), ids(3, 7)
    alone = model(input_ids[:1, :4])
    for place in (slice(0, 4), slice(3, 7)):
        mask, padded = torch.zeros(3, 7, dtype=torch.long), input_ids.clone()
        mask[0, place], padded[0, place] = 1, input_ids[0, :4]
        mask[1] = 1  # and the third is nothing but padding
        logits = model(padded, attention_mask=mask)
        assert (logits[0, place] - alone[0]).abs().max() < 1e-10
        assert (logits[1] - model(padded[1:2])[0]).abs().max() < 1e-10
        assert logits.isfinite().all()


@every_pair
@torch.no_grad()
def test_decoding_goes_on_past_left_padding(rule: str, backbone: str, build: Build) -> None:
    model, input_ids = build(rule, backbone), ids(2, 7)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    alone = model(input_ids[:1, 3:])
    cache, pieces = KeyValueCache(7), []
    for start, end in ((0, 5), (5, 6), (6, 7)):
        pieces.append(model(input_ids[:, start:end], attention_mask=mask[:, :end], cache=cache))
    logits = torch.cat(pieces, 1)
    assert (logits[0, 3:] - alone[0]).abs().max() < 1e-10
    assert (logits[1] - model(input_ids[1:])[0]).abs().max() < 1e-10


@every_split_pair
def test_every_parameter_is_used_and_fast_ops_equal_reference_ops(
    rule: str, backbone: str, splitting: str, build: Build
) -> None:
    model, input_ids = build(rule, backbone, splitting=splitting, qk_norm=True), ids(2, 7)
    logits, fast = model(input_ids), gradients(model, input_ids)
    with ops.reference_forms():
        assert (model(input_ids) - logits).abs().max() < 1e-9
        plain = gradients(model, input_ids)
    assert fast.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name in fast:
        assert fast[name].abs().max() > 0, name
        assert (fast[name] - plain[name]).abs().max() <= 1e-7 * plain[name].abs().max(), name


@every_pair
def test_a_saved_model_loads_exactly(
    rule: str, backbone: str, build: Build, tmp_path: Path
) -> None:
    model, input_ids = build(rule, backbone).float(), ids(2, 7)
    save_model(model, str(tmp_path / "model.safetensors"))
    again = Transformer(ModelConfig.from_dict(model.config.to_dict())).eval()
    load_model(again, tmp_path / "model.safetensors")
    assert torch.equal(again(input_ids), model(input_ids))


@costly_pair
def test_logits_and_gradients_are_finite_at_depth_48(rule: str, backbone: str) -> None:
    config = ModelConfig(rule=rule, **{**SHAPE, **BACKBONES[backbone], "num_layers": 48})
    model, input_ids = Transformer(config), ids(2, 7)
    assert model(input_ids).isfinite().all()
    for name, gradient in gradients(model, input_ids).items():
        assert gradient.isfinite().all(), name


@every_pair
@torch.no_grad()
def test_half_precision_is_the_same_model_up_to_rounding(
    rule: str, backbone: str, build: Build
) -> None:
    config = ModelConfig(rule=rule, **{**SHAPE, **BACKBONES[backbone]})
    exact, input_ids = Transformer(config).eval(), ids(2, 7)
    expected = exact(input_ids)
    # Newton–Schulz lifts small singular values, and their rounding, up to 3.4⁵ times
    bound = (1.5 if rule == "ortho" else 0.15) * expected.abs().max()
    for dtype in (torch.bfloat16, torch.float16):
        model = Transformer(config).eval()
        model.load_state_dict(exact.state_dict())
        found = model.to(dtype)(input_ids)
        assert found.dtype == dtype
        assert (found - expected).abs().max() < bound
        cache = KeyValueCache(7)
        pieces = [model(piece, cache=cache) for piece in input_ids.split([4, 1, 2], 1)]
        assert (torch.cat(pieces, 1) - found).abs().max() < bound


@costly_pair
def test_derivatives_of_a_block_are_right(rule: str, backbone: str, build: Build) -> None:
    model = build(rule, backbone, num_layers=1, d_model=8, num_heads=2, num_kv_heads=1)
    block = model.blocks[0]
    scalars = {n: p.detach() for n, p in block.named_parameters() if p.dim() < 2 and "_raw" in n}
    x, state = model.start(ids(1, 3))
    state = [stream.detach().clone() for stream in state]

    def function(x: Tensor, scalar: Tensor) -> Tensor:
        values = {name: value + scalar for name, value in scalars.items()}
        y, _ = functional_call(block, values, (x, model.rule.State(*state)))
        return y

    inputs = (x.detach().requires_grad_(), torch.zeros((), dtype=x.dtype, requires_grad=True))
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-4)
        assert torch.autograd.gradgradcheck(
            function, inputs, eps=1e-6, atol=1e-4, rtol=1e-3, fast_mode=True
        )
        reverse, forward = jacrev(function)(*inputs), jacfwd(function)(*inputs)
    assert (reverse - forward).abs().max() <= 1e-9 * max(1.0, float(reverse.detach().abs().max()))


@pytest.mark.slow
@every_backbone
def test_a_compiled_block_is_the_same_function(backbone: str, build: Build) -> None:
    model = build("triple_momentum", backbone)
    block, (x, state) = model.blocks[0], model.start(ids(2, 7))
    torch.compiler.reset()
    # a walk over states is run as it is
    whole = not block.attention.recurrent
    compiled = torch.compile(block, backend="aot_eager", fullgraph=whole)

    def run(call: Any) -> list[Tensor]:
        y, after = call(x, state)
        total = (y**3).sum() + (after.v**2).sum()
        return [y.detach(), after.v.detach(), *torch.autograd.grad(total, list(block.parameters()))]

    for eager, fast in zip(run(block), run(compiled), strict=True):
        assert (eager - fast).abs().max() <= 1e-10 * max(1.0, float(eager.abs().max()))
    torch.compiler.reset()


# What the options mean


@pytest.mark.parametrize("rule", ["gradient_descent", "triple_momentum", "adam"])
@torch.no_grad()
def test_a_post_norm_block_shows_oracles_x_and_norms_it_after_every_step(
    rule: str, build: Build
) -> None:
    block, input_ids = (model := build(rule, "momentum_transformer")).blocks[0], ids(2, 7)
    found, streams = block(*model.start(input_ids))
    x, state = model.start(input_ids)
    for name, step in block.rules.items():
        oracle = getattr(block, name)
        norm, oracle.norm = oracle.norm, torch.nn.Identity()
        x, state = step.step(x, state, oracle)
        oracle.norm = norm
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        x = x * norm.weight + norm.bias
    assert (found - x).abs().max() < 1e-12
    for one, other in zip(streams, state, strict=True):
        assert (one - other).abs().max() < 1e-12


@torch.no_grad()
def test_sinusoids_are_their_equation_beside_the_tokens_or_added_to_them(build: Build) -> None:
    input_ids, place = ids(2, 7), torch.arange(7)
    for backbone, width in (("momentum_transformer", 8), ("sinusoidal", 16)):
        model = build("triple_momentum", backbone)
        x, state = model.start(input_ids)
        tokens = model.embedding.tokens.weight[input_ids]
        extra = x[..., 8:] if width == 8 else x - tokens
        for m in range(width // 2):
            angle = place.double() * 10000.0 ** (-2 * m / width)
            assert (extra[..., 2 * m] - angle.sin()).abs().max() < 1e-12
            assert (extra[..., 2 * m + 1] - angle.cos()).abs().max() < 1e-12
        if width == 8:
            assert torch.equal(x[..., :8], tokens)
        assert torch.equal(state.v, model.streams["v"].tokens.weight[input_ids])  # d numbers


@torch.no_grad()
def test_without_positions_the_order_of_what_was_read_does_not_count(build: Build) -> None:
    model = build("gradient_descent", "none", num_layers=1)
    input_ids = ids(2, 7)
    turned = torch.cat((input_ids[:, :6].flip(1), input_ids[:, 6:]), 1)
    assert (model(turned)[:, -1] - model(input_ids)[:, -1]).abs().max() < 1e-12
    assert (model(turned)[:, 0] - model(input_ids)[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("backbone", ["none", "llama", "sinusoidal", "momentum_transformer"])
@torch.no_grad()
def test_only_a_table_of_positions_ends_a_state_of_constant_size(
    backbone: str, build: Build
) -> None:
    model = build("triple_momentum", backbone, attention="linear")
    longer = Transformer(dataclasses.replace(model.config, context_length=20)).double().eval()
    longer.load_state_dict(model.state_dict())
    input_ids = ids(2, 20)
    assert torch.equal(model(input_ids), longer(input_ids))
    for fields in ({"attention": "linear", "positions": "learned"}, {"attention": "softmax"}):
        with pytest.raises(ConfigError, match="longer than context_length=7"):
            build("triple_momentum", "gpt2", **fields)(input_ids)


def test_what_is_dropped_inside_the_mlp_is_what_its_field_says(build: Build) -> None:
    mlp = build("gradient_descent", "momentum_transformer", activation_dropout=0.5).blocks[0].mlp
    mlp.up.weight.data.zero_(), mlp.up.bias.data.fill_(1)
    mlp.down.weight.data.fill_(1), mlp.down.bias.data.zero_()
    x = torch.zeros(100, 3, 16, dtype=torch.float64)
    assert bool((mlp(x) == 64).all())
    kept = mlp.train()(x)[..., 0].detach() / 2  # each that stays counts twice
    assert kept.std() > 1
    assert float(kept.mean()) == pytest.approx(32, abs=2)


def test_tokens_beside_sinusoids_start_as_large_as_they_are(build: Build) -> None:
    for backbone, fields, size in (
        ("momentum_transformer", {}, 1.0),
        ("sinusoidal", {"tie_embeddings": False}, 1.0),
        ("sinusoidal", {}, 0.02),
        ("llama", {}, 0.02),
    ):
        shape = {**SHAPE, **BACKBONES[backbone], **fields, "vocab_size": 500}
        model = Transformer(ModelConfig(rule="triple_momentum", **shape))
        assert float(model.embedding.tokens.weight.detach().std()) == pytest.approx(size, rel=0.1)
        assert float(model.streams["v"].tokens.weight.detach().std()) == pytest.approx(
            0.02, rel=0.1
        )


@every_rule
@torch.no_grad()
def test_rotary_positions_are_relative(rule: str, build: Build) -> None:
    model, input_ids = build(rule, "llama", context_length=64), ids(2, 7)
    moved = model(input_ids, position_ids=torch.arange(7)[None] + 50)
    assert (moved - model(input_ids)).abs().max() < 1e-9
    stretched = model(input_ids, position_ids=2 * torch.arange(7)[None])
    assert (stretched - model(input_ids)).abs().max() > 1e-3
    assert not any("positions" in name for name, _ in model.named_parameters())


def test_rotation_is_multiplication_by_complex_numbers() -> None:
    x, positions = torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.arange(3, 8)
    turned = rotate(x, rotary_table(positions, 8, 100.0, x.dtype))
    points = torch.complex(x[..., :4], x[..., 4:])
    rates = 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    angles = positions[:, None, None] * rates
    expected = points * torch.polar(torch.ones_like(angles), angles)
    assert (turned - torch.cat((expected.real, expected.imag), -1)).abs().max() < 1e-12
    cos, _ = rotary_table(torch.tensor([1001]), 8, 1e4, torch.bfloat16)
    assert float(cos[0, 0, 0]) == pytest.approx(math.cos(1001), abs=1e-4)  # angles are not rounded


@torch.no_grad()
def test_grouped_queries_are_all_heads_with_shared_keys_and_values(build: Build) -> None:
    grouped = build("adam", "llama")
    every = build("adam", "llama", num_kv_heads=4)
    state = grouped.state_dict()
    for name, weight in list(state.items()):
        if name.endswith("qkv.weight"):
            q, k, v = weight.split((24, 12, 12))
            k, v = (part.unflatten(0, (2, 6)).repeat_interleave(2, 0) for part in (k, v))
            state[name] = torch.cat((q, k.flatten(0, 1), v.flatten(0, 1)))
    every.load_state_dict(state)
    input_ids = ids(2, 7)
    assert (every(input_ids) - grouped(input_ids)).abs().max() < 1e-12


@torch.no_grad()
def test_normed_queries_and_keys_ignore_their_scale(build: Build) -> None:
    for fields, differs in (({"qk_norm": True, "norm_eps": 0.0}, False), ({}, True)):
        model, input_ids = build("gradient_descent", "llama", **fields), ids(2, 7)
        before = model(input_ids)
        model.blocks[0].attention.qkv.weight[:36] *= 3  # queries and keys
        assert ((model(input_ids) - before).abs().max() > 1e-6) == differs


def test_the_rules_norms_follow_the_models(build: Build) -> None:
    for backbone, kind in (("gpt2", "LayerNorm"), ("llama", "RMSNorm")):
        for rule in ("triple_momentum", "adam"):
            model = build(rule, backbone, qk_norm=True)
            found = [type(m).__name__ for m in model.modules() if type(m).__name__.endswith("Norm")]
            assert found == [kind] * (2 * (2 + 2 + 2) + 1)


@torch.no_grad()
def test_a_gated_mlp_is_its_equation(build: Build) -> None:
    model = build("gradient_descent", "llama", mlp_width=10)
    mlp, x = model.blocks[0].mlp, torch.randn(2, 3, 16, dtype=torch.float64)
    u = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mlp.norm.weight
    gate, up = u @ mlp.gate.weight.T, u @ mlp.up.weight.T
    expected = (gate * torch.sigmoid(gate) * up) @ mlp.down.weight.T
    assert (mlp(x) - expected).abs().max() < 1e-12
