"""Controls of a model's start and width, with rules, backbones and each other, in pairs.

`embedding_norm`, `embedding_std`, `stream_start`, `residual_width` and `embedding_reinjection`:
what each is, and that causality, caches, derivatives, costs and saving hold with all of them.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_cost import counted_elements, counted_flops
from test_one_token import check as check_one_token
from torch import Tensor

from polyak import ModelConfig, Transformer, ops, rules
from polyak.analysis._common import math_attention
from polyak.analysis.groups import parameter_groups as kinds_of_parameters
from polyak.analysis.jacobian import block_maps
from polyak.errors import ConfigError
from polyak.interop import momentum_release, release
from polyak.interop.upgrade import upgrade
from polyak.nn.cache import KeyValueCache
from polyak.nn.cost import cost
from polyak.nn.presets import preset_fields
from polyak.nn.probe import probe
from polyak.nn.rule_text import parse_rule
from polyak.rules import Oracle, State, Stream, UpdateRule
from polyak.training.optimizers import parameter_groups

Build = Callable[..., Transformer]
Register = Callable[[str, type[UpdateRule]], str]
PLACED = "heavy_ball@attention+gradient_descent@mlp"
RULES = ("gradient_descent", "triple_momentum", "adam", "spherical", PLACED)
BACKBONES: dict[str, dict[str, Any]] = {
    "paper": {},
    "gpt2": preset_fields("gpt2", 3),
    "llama": {**preset_fields("llama", 3), "head_dim": 6},
    "momentum_transformer": preset_fields("momentum_transformer", 3),
}
FACTORS: dict[str, tuple[Any, ...]] = {
    "rule": RULES,
    "backbone": tuple(BACKBONES),
    "embedding_norm": ("none", "layer", "rms"),
    "embedding_std": (None, 1.0),
    "stream_start": (None, "zeros", "x"),
    "residual_width": (None, 24, 6),
    "embedding_reinjection": (False, True),
    "splitting": ("lie_trotter", "simultaneous"),
}
ALL: dict[str, Any] = {
    "embedding_norm": "layer",
    "embedding_std": 0.5,
    "residual_width": 18,
    "embedding_reinjection": True,
}


def fits(row: dict[str, Any]) -> bool:
    """Whether such a model can be: concatenated positions need a width in fours, and so on."""
    post = row["backbone"] == "momentum_transformer"
    plain = row["rule"] == "gradient_descent"
    return not (
        (post and (row["splitting"] == "simultaneous" or row["residual_width"] == 6))
        or (plain and row["stream_start"] is not None)
        or (row["rule"] == PLACED and row["splitting"] == "simultaneous")
    )


def pairs_of(row: dict[str, Any]) -> set[Any]:
    return set(itertools.combinations(row.items(), 2))


def covering() -> Iterator[dict[str, Any]]:
    """Rows in which every two values that can meet do, found greedily."""
    every = itertools.product(*FACTORS.values())
    rows = [row for values in every if fits(row := dict(zip(FACTORS, values, strict=True)))]
    each = [pairs_of(row) for row in rows]
    left: set[Any] = set().union(*each)
    while left:
        best = max(range(len(rows)), key=lambda place: len(each[place] & left))
        left -= each[best]
        yield rows[best]


ROWS = list(covering())


def build_row(row: dict[str, Any], tiny_model: Build) -> Transformer:
    fields = {**BACKBONES[row["backbone"]], **row}
    return tiny_model(**{name: value for name, value in fields.items() if name != "backbone"})


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(11, (batch, length))


def gradients(model: Transformer, input_ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = F.cross_entropy(model(input_ids).flatten(0, 1), input_ids.roll(-1, 1).flatten())
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_model(model: Transformer) -> None:
    input_ids = ids(2, 7)
    with torch.no_grad():
        logits = model(input_ids)
        changed = input_ids.clone()
        changed[:, 4:] = (changed[:, 4:] + 1) % 11
        moved = (model(changed) - logits).abs().amax((0, 2))
        assert moved[:4].max() < 1e-12 < 1e-6 < moved[4]
        cache = KeyValueCache(7)
        pieces = [model(piece, cache=cache) for piece in input_ids.split([3, 1, 1, 2], 1)]
        assert (torch.cat(pieces, 1) - logits).abs().max() < 1e-10
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]] * 2)
        padded = model(input_ids, attention_mask=mask)[:, 2:]
        assert (padded - model(input_ids[:, 2:])).abs().max() < 1e-10
    check_one_token(model)
    found = gradients(model, input_ids)
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == learned
    still = {name for name, gradient in found.items() if gradient.abs().max() == 0}
    from_rest = model.config.stream_start == "zeros"  # a velocity of 0 has nothing to be weighed
    assert all(from_rest and name.startswith("blocks.0.rules.") for name in still)
    with ops.reference_forms():
        for name, plain in gradients(model, input_ids).items():
            assert (plain - found[name]).abs().max() <= 1e-7 * plain.abs().max(), name


def check_cost(config: ModelConfig) -> None:
    found = cost(config)
    forward, backward = counted_flops(config, 1, 7)
    assert found.forward_flops_per_token == forward / 7
    assert found.backward_flops_per_token == backward / 7
    assert found.elementwise_per_token == counted_elements(config, 7)
    with torch.device("meta"):
        model = Transformer(config)
    groups = Counter[str]()
    for name, parameter in model.named_parameters():
        own = name.startswith(("streams.", "starts.")) or name.endswith("reinjection_raw")
        groups["streams" if own else "others"] += parameter.numel()
    assert groups["streams"] == found.parameters["streams"]
    assert groups.total() == found.total_parameters


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row.values())))
def test_what_holds_of_every_model_holds_with_controls(
    row: dict[str, Any], tiny_model: Build
) -> None:
    model = build_row(row, tiny_model)
    if model.config.attention == "softmax":
        check_model(model)
        check_cost(replace(model.config, num_layers=1))
    again = ModelConfig.from_dict(json.loads(json.dumps(model.config.to_dict())))
    assert again == model.config
    groups = parameter_groups(model)
    assert all(parameter.ndim == 2 for parameter in groups["matrices"])
    assert "other" not in kinds_of_parameters(model)


@pytest.mark.parametrize("rule", rules.names())
def test_every_rule_has_every_control(rule: str, tiny_model: Build) -> None:
    free = any(stream.start == "embedding" for stream in rules.get(rule).streams)
    model = tiny_model(rule, **ALL, stream_start="x" if free else None)
    check_model(model)
    check_cost(replace(model.config, num_layers=1))
    probe(model.config)


def test_the_rows_hold_every_pair_that_can_be() -> None:
    assert len(ROWS) < 30
    assert {row["residual_width"] for row in ROWS} == {None, 24, 6}


# What each of them is


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_x_is_normed_without_parameters_and_the_table_is_not(
    kind: str, tied: bool, tiny_model: Build
) -> None:
    model = tiny_model("triple_momentum", embedding_norm=kind, tie_embeddings=tied)
    plain = tiny_model("triple_momentum", tie_embeddings=tied)
    plain.load_state_dict(model.state_dict())  # there is nothing else to load
    input_ids = ids(2, 7)
    (x, state), (before, other) = model.start(input_ids), plain.start(input_ids)
    centred = before - before.mean(-1, keepdim=True) if kind == "layer" else before
    scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert (x - centred / scale).abs().max() < 1e-12
    assert torch.equal(state.v, other.v)  # a stream's own table is its own
    assert (model.head.weight is model.embedding.tokens.weight) == tied


def test_the_standard_deviation_scales_the_same_draws_of_one_table() -> None:
    config = ModelConfig(num_layers=1, num_heads=2, d_model=16, rule="nesterov")
    models = []
    for std in (None, 1.0):
        torch.manual_seed(3)
        models.append(Transformer(replace(config, embedding_std=std)))
    for (name, one), (_, other) in zip(
        *(model.named_parameters() for model in models), strict=True
    ):
        if name == "embedding.tokens.weight":
            assert torch.allclose(other, 50 * one)
            assert 0.9 < float(other.detach().std()) < 1.1
        else:
            assert torch.equal(one, other), name
    assert models[1].head.weight is models[1].embedding.tokens.weight


@pytest.mark.parametrize("rule", ["heavy_ball", "adam", "soap", PLACED])
def test_streams_start_from_x_with_one_gain_a_channel(rule: str, tiny_model: Build) -> None:
    fresh = Transformer(tiny_model(rule, stream_start="x", bias=True).config)
    gains = dict(fresh.starts.named_parameters())
    assert [tuple(gain.shape) for gain in gains.values()] == [(12,)]
    assert all((gain == 0.5).all() for gain in gains.values())
    assert len(fresh.streams) == 0
    model = tiny_model(rule, stream_start="x", bias=True)
    x, state = model.start(ids(2, 7))
    (name, gain), *_ = model.starts.named_parameters()
    expected = F.layer_norm(x, (12,), gain, None, 1e-5)
    assert (getattr(state, name.partition(".")[0]) - expected).abs().max() < 1e-12


def test_a_wider_stream_leaves_attention_and_mlp_as_wide(tiny_model: Build) -> None:
    model = tiny_model("soap", residual_width=18)
    block: Any = model.blocks[0]
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters()}
    assert shapes["attention.qkv.weight"] == (36, 18)
    assert shapes["attention.out.weight"] == (18, 12)
    assert shapes["mlp.up.weight"] == (48, 18)
    assert shapes["mlp.down.weight"] == (18, 48)
    assert tuple(model.head.weight.shape) == (11, 18)
    _, state = model.start(ids(2, 7))
    assert (state.m.shape[-1], state.R.shape[-1]) == (18, 6)
    same, plain = (tiny_model("soap", residual_width=width) for width in (12, None))
    same.load_state_dict(plain.state_dict())
    assert torch.equal(same(ids_ := ids(2, 7)), plain(ids_))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_second_table_is_added_before_every_layer(norm: str, tiny_model: Build) -> None:
    model = tiny_model("gradient_descent", embedding_reinjection=True, norm=norm)
    fresh = Transformer(model.config)
    assert fresh.scalars() == {"reinjection": {"layer": [pytest.approx(0.1)] * 2}}
    input_ids = ids(2, 7)
    with torch.no_grad():
        plain = tiny_model("gradient_descent", norm=norm)
        plain.load_state_dict(model.state_dict(), strict=False)
        table: Any = model.streams["reinjected"]
        e = table.tokens(input_ids) + table.positions.weight
        form = F.layer_norm if norm == "layer" else F.rms_norm
        e = form(e, (12,), eps=1e-5)
        x, state = plain.start(input_ids)
        for block, without in zip(model.blocks, plain.blocks, strict=True):
            x, state = without(x + block.reinjection_raw * e, state)
        assert (model.head(model.norm(x)) - model(input_ids)).abs().max() < 1e-12
        for block in model.blocks:
            block.reinjection_raw.zero_()
        assert torch.equal(model(input_ids), plain(input_ids))


def test_a_rule_may_start_a_stream_from_x_itself(tiny_model: Build, registered: Register) -> None:
    class FromX(UpdateRule):
        """v ← v + O(x); x ← x + v."""

        streams = (Stream("v", start="x"),)

        def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
            v = state.v + oracle(x)
            return x + v, state.replace(v=v)

    model = tiny_model(registered("from_x", FromX))
    assert set(model.starts) == {"v"}
    check_model(model)
    check_cost(replace(model.config, num_layers=1))


# What reads a model


def test_a_model_with_controls_is_upgraded_to_the_same_function(tiny_model: Build) -> None:
    source = tiny_model("gradient_descent", dtype=torch.float32, **ALL)
    made = upgrade(source, parse_rule("triple_momentum[stream_start=x]"), lambda: ids(2, 7))
    assert made.exact
    assert torch.equal(made.model(input_ids := ids(2, 7)), source(input_ids))
    fitted = upgrade(source, parse_rule("spherical[stream_start=x]"), lambda: ids(2, 7))
    assert not fitted.exact
    assert len(fitted.misses) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embedding_norm": "rms"}, "have embedding_norm='none'; this model differs, with .*'rms'"),
        ({"embedding_reinjection": True}, "have embedding_reinjection=False; this model differs"),
        ({"residual_width": 24}, "have residual_width=None; this model differs, with .*=24"),
        ({"stream_start": "x"}, "have stream_start=None; this model differs, with .*='x'"),
    ],
)
def test_what_a_release_has_not_is_not_written_to_its_files(
    fields: dict[str, Any], message: str, tiny_model: Build
) -> None:
    model = tiny_model("triple_momentum", **fields)
    with pytest.raises(ConfigError, match=message):
        release.to_state_dict(model)
    same = tiny_model("triple_momentum", residual_width=12, embedding_std=1.0)
    assert len(release.to_state_dict(same)) == len(dict(same.named_parameters()))
    backbone = preset_fields("momentum_transformer", 3)
    other = tiny_model("triple_momentum", **backbone, embedding_reinjection=True)
    with pytest.raises(ConfigError, match="has embedding_reinjection=False; this model differs"):
        momentum_release.load_state_dict(other, {})


def test_maps_of_blocks_are_of_the_wide_stream_and_what_comes_in(tiny_model: Build) -> None:
    model = tiny_model("nesterov", **ALL, stream_start="x")
    given = ids(1, 5)[0]
    x, state = model.start(given[None])
    block: Any = model.blocks[0]
    mu = block.rules["attention"].mu
    ahead = x + block.reinjection_raw * state.reinjected + mu * state.v
    first = block_maps(model, given)[0]
    assert (first.oracle.point - ahead[0]).abs().max() < 1e-12
    assert first.full.point.shape == (5, 3 * 18)
    with math_attention(), torch.no_grad():
        jacobian = torch.func.jacrev(first.full.function)(first.full.point)
    dense = first.full.whole.dense()
    assert (dense - jacobian.flatten(2).flatten(0, 1)).abs().max() < 1e-9


@pytest.mark.parametrize("rule", ["gradient_descent", "spherical"])
def test_a_captured_block_is_the_same_function(rule: str, tiny_model: Build) -> None:
    model = tiny_model(rule, **ALL)
    x, state = model.start(ids(2, 7))
    compiled = torch.compile(model.blocks[0], backend="aot_eager", fullgraph=True)
    for eager, fast in zip(
        torch.utils._pytree.tree_leaves(model.blocks[0](x, state)),
        torch.utils._pytree.tree_leaves(compiled(x, state)),
        strict=True,
    ):
        assert (eager - fast).abs().max() < 1e-10
    torch.compiler.reset()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"stream_start": "y", "rule": "adam"}, "stream_start='y' must be 'zeros', 'x' or left out"),
    ({"stream_start": "x"}, "stream_start='x': rule gradient_descent has no stream that starts"),
    ({"embedding_norm": "lay"}, "unknown embedding_norm 'lay'; did you mean 'layer'"),
    ({"embedding_std": 0}, "embedding_std=0 must be a number above 0"),
    ({"embedding_std": "big"}, "embedding_std='big' must be a number above 0"),
    ({"embedding_reinjection": 1}, "embedding_reinjection=1 must be true or false"),
    ({"residual_width": 0}, "residual_width=0 must be a whole number of at least 1, or none"),
    ({"residual_width": 130}, "residual_width=130 is no multiple of num_heads=4.*; use 128"),
    ({"residual_width": 2**21}, "residual_width=2097152 must be at most 1,048,576"),
    (
        {"positions": "sinusoidal", "residual_width": 9, "num_heads": 1},
        "residual_width=9 is odd; use an even one",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=str)
def test_controls_that_cannot_work_are_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        ModelConfig(**fields)
    assert "\n" not in str(error.value)


def test_a_rules_stream_of_the_reserved_name_is_refused(registered: Register) -> None:
    class Taken(UpdateRule):
        """x ← x + O(x)."""

        streams = (Stream("reinjected", start="zeros"),)

        def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
            return x + oracle(x), state

    with pytest.raises(ConfigError, match="rule taken has one of that name; rename the rule's"):
        ModelConfig(rule=registered("taken", Taken), embedding_reinjection=True)
