"""Several rules in one model: which steps where, and that all that holds of one holds of them."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor

from polyak import ModelConfig, Transformer, rules
from polyak.errors import ConfigError, RuleError
from polyak.nn.cache import KeyValueCache
from polyak.nn.cost import cost
from polyak.nn.placement import placement_of
from polyak.nn.probe import probe
from polyak.nn.rule_places import Part, brackets_of, is_composite, parts_of, renamed, text_of
from polyak.nn.rule_text import parse_rule
from polyak.nn.splitting import oracle_of
from polyak.rules import Oracle, State, Stream, UpdateRule, unit_interval
from polyak.training.optimizers import Optimizers, check_groups, parameter_groups
from polyak.training.runs.model_files import attention_calls
from tests.nn.test_cost import per_token
from tests.nn.test_one_token import check as decodes_one_token
from tests.tiny_runs import run_config

PAPERS = "residual_momentum@attention+gradient_descent@mlp"
COMPOSITES = (
    PAPERS,
    "adaptive_residual_momentum[kind=pr]@attention+gradient_descent",
    "triple_momentum@2+gradient_descent",
    "heavy_ball[beta=0.3,state_norm=none]@1.attention+shampoo",
    "nesterov@mlp+adam[frozen=gamma]@2.attention+heavy_ball@1.attention",
)
Build = Callable[..., Transformer]
Config = Callable[..., ModelConfig]
Register = Callable[[str, type[UpdateRule]], str]
every_composite = pytest.mark.parametrize("rule", COMPOSITES)


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(11, (batch, length))


# what the text says


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("nesterov", [("nesterov", "", None)]),
        (PAPERS, [("residual_momentum", "", "attention"), ("gradient_descent", "", "mlp")]),
        (
            "a[x=1, y=p+q]@1-6.attention + b [z=2] @ 7",
            [("a", "x=1, y=p+q", "1-6.attention"), ("b", "z=2", "7")],
        ),
        ("/my/c++/r.py:R", [("/my/c++/r.py:R", "", None)]),
        ("c++/r.py:R", [("c++/r.py:R", "", None)]),
        ("me@work/r.py:R", [("me@work/r.py:R", "", None)]),
        ("a@mlp+b/r.py:R[x=1]@attention", [("a", "", "mlp"), ("b/r.py:R", "x=1", "attention")]),
        ("./c++/r.py:R@3+p.m:R", [("./c++/r.py:R", "", "3"), ("p.m:R", "", None)]),
        ("a+b", [("a", "", None), ("b", "", None)]),
        ("a@attention+", [("a@attention+", "", None)]),
        ("a@attention++b", [("a@attention++b", "", None)]),
    ],
)
def test_a_text_is_its_parts(text: str, parts: list[tuple[str, str, str | None]]) -> None:
    found = parts_of(text)
    assert [(part.rule, part.brackets, part.place) for part in found] == parts
    assert is_composite(text) == (len(parts) > 1 or parts[0][2] is not None)
    assert parts_of(text_of(found)) == tuple(
        dataclasses.replace(part, brackets=",".join(p.strip() for p in part.brackets.split(",")))
        for part in found
    )
    assert renamed(text, lambda name: name) == text_of(found)


def test_reading_a_text_takes_no_time_whatever_it_is() -> None:
    for text in ("a:" * 20_000, "@" * 40_000, "a " * 20_000, "a@1+" * 10_000, "a[" * 20_000):
        parts_of(text)


def test_options_in_brackets_are_read_as_they_are_written() -> None:
    options = {"mu": 1e-05, "kind": "pr", "free": True, "frozen": ("mu", "s"), "count": 3}
    text = f"a[{brackets_of(options)}]@mlp"
    assert parts_of(text)[0].options == options
    assert brackets_of({"frozen": ()}) == "frozen=none"


def test_brackets_hold_what_belongs_to_the_rule_and_to_the_model() -> None:
    found = parse_rule(
        "residual_momentum[mu=0.9, tie_embeddings=false]@attention"
        "+gradient_descent[attention=momentum,attention.mu=0.6]@mlp"
    )
    assert found.rule == "residual_momentum[mu=0.9]@attention+gradient_descent@mlp"
    assert found.fields == {"tie_embeddings": "false", "attention": "momentum"}
    assert found.attention_options == {"mu": 0.6}
    assert found.options == {}
    assert found.label == (
        "residual_momentum[mu=0.9,tie_embeddings=false]@attention"
        "+gradient_descent[attention=momentum,attention.mu=0.6]@mlp"
    )
    with pytest.raises(ConfigError, match=r"--rule: 'bias' is set twice in"):
        parse_rule("adam[bias=true]@1+nesterov[bias=true]", "--rule")


@pytest.mark.parametrize(
    ("rule", "fields", "message"),
    [
        ("residual_momentum@attention", {}, "takes mlp of layer 1; add one without a place"),
        ("triple_momentum@2", {}, "no part of 'triple_momentum@2' takes attention of layer 1"),
        ("nesterov@attention+adam@1+muon", {}, "both take attention of layer 1; places may not"),
        ("nesterov@1-9+adam", {}, "nesterov@1-9: layers run from 1 to 2 in this model"),
        ("nesterov@0+adam", {}, "nesterov@0: layers run from 1 to 2"),
        ("nesterov@2-1+adam", {}, "nesterov@2-1: layers run from 1 to 2"),
        ("nesterov+adam", {}, "nesterov and adam both have no place; one part may take the rest"),
        ("nesterov@1-2+adam", {}, "nothing is left for adam, as the other parts take every step"),
        ("nesterov@atention+adam", {}, "nesterov@atention: there is no place 'atention'; use att"),
        ("nesterov@layer+adam", {}, "there is no place 'layer'"),
        ("nesterov@1.layer+adam", {"splitting": "simultaneous"}, "there is no place 'layer'"),
        ("nesterov@1.2+adam", {}, r"place '1.2' of nesterov@1.2 is none; use attention, mlp"),
        ("nesterov@+adam", {}, "place '' of nesterov@ is none"),
        ("nesterov@attention+", {}, "cannot be read; write RULE@PLACE\\+RULE"),
        (PAPERS, {"splitting": "simultaneous"}, "there is no place attention or mlp; use layers"),
        (PAPERS, {"rule_options": {"mu": 0.9}}, "do not say whose they are in rule="),
        (PAPERS, {"stream_start": "zeros"}, "has no stream that starts from an embedding"),
        (
            "residual_momentum@attention+heavy_ball",
            {},
            "stream 'v' starts from zeros in residual_momentum and from embedding in heavy_ball, "
            "but streams of one name are one stream; use rules whose streams start alike, or "
            "stream_start='zeros'",
        ),
        ("rmsprop@1+residual_momentum[mu=2]", {}, "mu=2: its initial value must be a number"),
        ("nesterov[mu]@1+adam", {}, r"'mu' in 'nesterov\[mu\]@1' has no '='; write key=value"),
        ("nesterov[nu=1]@1+adam", {}, "unknown option of rule nesterov 'nu'"),
        ("nesterof@1+adam", {}, "unknown rule 'nesterof'; did you mean 'nesterov'?"),
    ],
)
def test_places_that_cannot_be_are_one_clear_line(
    rule: str, fields: dict[str, Any], message: str, tiny_config: Config
) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        tiny_config(rule, **fields)
    assert "\n" not in str(found.value)


def test_streams_that_start_apart_may_start_at_zeros_together(tiny_model: Build) -> None:
    for order in (("residual_momentum", "heavy_ball"), ("heavy_ball", "residual_momentum")):
        rule = "{}@attention+{}".format(*order)
        model = tiny_model(rule, stream_start="zeros")
        assert [stream.name for stream in model.placement.streams] == ["v"]
        assert not model.streams
        assert not model.start(ids(1, 3))[1].v.any()


# what the model computes


@pytest.mark.parametrize("rule", ["triple_momentum", "soap"])
@pytest.mark.parametrize("places", ["{0}@1+{0}", "{0}@attention+{0}@mlp", "{0}@1-2"])
def test_one_rule_at_every_place_is_that_rule_bit_for_bit(
    rule: str, places: str, tiny_config: Config
) -> None:
    torch.manual_seed(0)
    plain = Transformer(tiny_config(rule))
    torch.manual_seed(0)
    model = Transformer(tiny_config(places.format(rule)))
    assert list(plain.state_dict()) == list(model.state_dict())
    input_ids = ids(2, 7)
    assert torch.equal(plain(input_ids), model(input_ids))
    assert model.scalars() == plain.scalars()
    assert cost(model.config) == cost(plain.config)
    assert plain.placement.State is rules.get(rule).State


@pytest.mark.parametrize("reverse", [False, True])
def test_each_place_steps_by_its_rule_and_other_streams_pass_through(
    reverse: bool, tiny_model: Build
) -> None:
    parts = ["triple_momentum[mu=0.2]@2.mlp", "adam@1.attention", "rmsprop"]
    rule = "+".join(reversed(parts) if reverse else parts)
    model, input_ids = tiny_model(rule), ids(2, 7)
    assert {stream.name for stream in model.placement.streams} == {"m", "s", "v"}
    x, state = model.start(input_ids)
    assert torch.equal(state.s, torch.ones_like(x))
    streams = state._asdict()
    owners = {(0, "attention"): "adam", (1, "mlp"): "triple_momentum"}
    for layer, block in enumerate(model.blocks):
        for substep, made in block.rules.items():  # type: ignore[operator,union-attr]
            kind = rules.get(owners.get((layer, substep), "rmsprop"))
            assert type(made) is kind
            oracle = oracle_of(substep, block.attention, block.mlp)  # type: ignore[arg-type]
            own = kind.State(**{s.name: streams[s.name] for s in kind.streams})
            x, after = made.step(x, own, oracle)
            streams |= after._asdict()
    assert model.blocks[1].rules["mlp"].options["mu"] == 0.2  # type: ignore[index,union-attr]
    assert torch.equal(model.head(model.norm(x)), model(input_ids))
    y, state = model.start(input_ids)
    for block in model.blocks:
        y, state = block(y, state)
    for name, value in streams.items():
        assert torch.equal(getattr(state, name), value), name


def test_a_rule_sees_its_own_streams_only(registered: Register, tiny_model: Build) -> None:
    class Counts(UpdateRule):
        streams = (Stream("c", start="zeros"),)
        beta = unit_interval(0.5)

        def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
            (c,) = state
            return x + self.beta * oracle(x), self.State(c=c + 1)

    model = tiny_model(f"triple_momentum@attention+{registered('counts', Counts)}@mlp")
    x, state = model.start(ids(1, 3))
    for block in model.blocks:
        x, state = block(x, state)
    assert state._fields == ("v", "c")
    assert torch.equal(state.c, torch.full_like(state.c, 2))


def test_every_call_of_attention_has_a_slot(
    registered: Register, tiny_config: Config, tiny_model: Build
) -> None:
    class Twice(UpdateRule):
        def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
            return x + oracle(x + oracle(x)), state

    name = registered("twice", Twice)
    for place, calls in (("1.attention", 3), ("mlp", 2)):
        config = tiny_config(f"{name}@{place}+triple_momentum")
        assert attention_calls(config) == calls
        assert costs_of(config) == per_token(config, config.context_length)
        decodes_one_token(tiny_model(config.rule))


@pytest.mark.parametrize(
    ("kind", "norm_position"),
    [
        ("momentum", "post"),
        pytest.param("linear", "pre", marks=pytest.mark.slow),
        pytest.param("momentum", "pre", marks=pytest.mark.slow),
        pytest.param("adaptive_momentum", "pre", marks=pytest.mark.slow),
        pytest.param("adaptive_momentum", "post", marks=pytest.mark.slow),
    ],
)
def test_places_hold_with_every_kind_of_attention(
    kind: str, norm_position: str, tiny_config: Config, tiny_model: Build
) -> None:
    fields = {"attention": kind, "norm_position": norm_position}
    for rule in COMPOSITES[:2]:
        probe(tiny_config(rule, **fields))
        model, input_ids = tiny_model(rule, **fields), ids(2, 7)
        with torch.no_grad():
            cache = KeyValueCache(7)
            pieces = [model(piece, cache=cache) for piece in input_ids.split([3, 1, 2, 1], 1)]
            assert (torch.cat(pieces, 1) - model(input_ids)).abs().max() < 1e-9


def test_scalars_are_those_of_each_place(tiny_model: Build) -> None:
    scalars = tiny_model("nesterov@2.attention+heavy_ball[frozen=beta]").scalars()
    assert scalars.keys() == {"mu", "beta", "gamma"}
    assert scalars["mu"].keys() == {"attention"}
    assert scalars["mu"]["attention"][0] is None
    assert scalars["mu"]["attention"][1] is not None
    assert None not in scalars["beta"]["attention"] + scalars["beta"]["mlp"]


def test_a_model_of_several_rules_has_no_one_rule(tiny_model: Build) -> None:
    model = tiny_model(PAPERS)
    with pytest.raises(ConfigError, match="is not one rule; ask for the model's placement"):
        _ = model.rule
    assert tiny_model("adam").rule is rules.get("adam")
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(torch.tensor([[1, 2]])), model(torch.tensor([[1, 2]])))
    assert copy.deepcopy(model).placement.State is model.placement.State


# what holds of every rule


@every_composite
def test_later_tokens_and_other_rows_are_not_seen(rule: str, tiny_config: Config) -> None:
    probe(tiny_config(rule))


def test_layers_can_differ_where_a_layer_is_one_step(
    tiny_config: Config, tiny_model: Build
) -> None:
    rule = "muon@1+adam@2"
    config = tiny_config(rule, splitting="simultaneous")
    probe(config)
    decodes_one_token(tiny_model(rule, splitting="simultaneous"))
    assert per_token(config, 7) == costs_of(config)


def costs_of(config: ModelConfig) -> list[float]:
    found = cost(config)
    return [
        found.forward_flops_per_token,
        found.backward_flops_per_token,
        found.elementwise_per_token,
    ]


@every_composite
def test_a_leak_of_any_part_is_found(rule: str, registered: Register, tiny_config: Config) -> None:
    class Leaks(UpdateRule):
        def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
            return x + oracle(x).mean(1, keepdim=True), state

    name = registered("leaks", Leaks)
    for part in parts_of(rule):
        leaky = (Part(name, "", p.place) if p == part else p for p in parts_of(rule))
        with pytest.raises(RuleError, match=r"leaks.* sees later tokens"):
            probe(tiny_config(text_of(leaky)))


@every_composite
def test_decoding_is_the_whole_pass(rule: str, tiny_model: Build) -> None:
    model, input_ids = tiny_model(rule), ids(2, 7)
    with torch.no_grad():
        cache = KeyValueCache(7)
        pieces = [model(piece, cache=cache) for piece in input_ids.split([3, 1, 2, 1], 1)]
        assert (torch.cat(pieces, 1) - model(input_ids)).abs().max() < 1e-10
    decodes_one_token(model)


@every_composite
def test_costs_are_those_of_the_counters(rule: str, tiny_config: Config) -> None:
    others = {"bias": True, "norm": "rms", "mlp": "gated", "positions": "rope"}
    for fields in ({}, others) if rule == PAPERS else ({},):
        config = tiny_config(rule, **fields)
        model = Transformer(config)
        assert costs_of(config) == per_token(config, config.context_length)
        found = cost(config)
        assert found.total_parameters == sum(p.numel() for p in model.parameters())
        x, state = model.start(ids(1, 1))
        assert found.state_bytes_per_token == 4 * (x.numel() + sum(s.numel() for s in state))


@every_composite
def test_what_is_saved_is_what_is_loaded(rule: str, tiny_model: Build, tmp_path: Path) -> None:
    model, input_ids = tiny_model(rule, dtype=torch.float32), ids(2, 7)
    save_model(model, str(tmp_path / "model.safetensors"))
    values = json.loads(json.dumps(model.config.to_dict()))
    again = Transformer(ModelConfig.from_dict(values)).eval()
    load_model(again, tmp_path / "model.safetensors")
    assert again.config == model.config
    assert torch.equal(again(input_ids), model(input_ids))


@every_composite
def test_every_parameter_is_trained_in_one_group(rule: str, tiny_model: Build) -> None:
    model, input_ids = tiny_model(rule), ids(2, 7)
    check_groups(model, parameter_groups(model).items())
    Optimizers(model, run_config(Path("unused")).training)
    F.cross_entropy(model(input_ids).flatten(0, 1), input_ids.roll(-1, 1).flatten()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    frozen = {n.rpartition(".")[2] for n, p in model.named_parameters() if not p.requires_grad}
    fixed = {"residual_momentum": {"mu_raw", "s_raw"}, "adaptive_residual_momentum": {"s_raw"}}
    expected = {"gamma_raw"} if "frozen=gamma" in rule else set[str]()
    for part in parts_of(rule):
        expected |= fixed.get(part.rule, set())
    assert frozen == expected


@pytest.mark.parametrize("rule", COMPOSITES[:3])
def test_logits_and_gradients_are_finite_at_depth_48(rule: str) -> None:
    sizes = {"num_heads": 4, "d_model": 16, "vocab_size": 11, "context_length": 6}
    model = Transformer(ModelConfig(rule=rule.replace("@2", "@2-40"), num_layers=48, **sizes))
    input_ids = ids(2, 6)
    F.cross_entropy(model(input_ids).flatten(0, 1), input_ids.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("rule", "backend"),
    [
        (COMPOSITES[1], "aot_eager"),
        *(pytest.param(rule, "inductor", marks=pytest.mark.slow) for rule in COMPOSITES[:3]),
    ],
)
def test_compiled_blocks_are_the_same_function(rule: str, backend: str, tiny_model: Build) -> None:
    model = tiny_model(rule)
    torch.compiler.reset()
    x, state = model.start(ids(2, 7))
    for block in model.blocks:
        fast = torch.compile(block, backend=backend, fullgraph=True)
        y, after = block(x, state)
        z, then = fast(x, state)
        for one, other in zip((y, *after), (z, *then), strict=True):
            assert (one - other).abs().max() <= 1e-10 * max(1.0, float(one.detach().abs().max()))
        x, state = y, after
    torch.compiler.reset()


def test_the_placement_of_a_configuration_is_what_the_model_has(tiny_config: Config) -> None:
    found = placement_of(tiny_config("heavy_ball@1.attention+soap"))
    assert found.name == "heavy_ball@1.attention+soap"
    assert found.title.startswith("1.attention: v ← LN(βv + γO(x)); x ← x + v · else: R as")
    assert [stream.name for stream in found.streams] == ["v", "m", "R"]
    assert [(substep, placed.rule.name) for substep, placed in found.steps()] == [
        ("attention", "heavy_ball"),
        ("mlp", "soap"),
        ("attention", "soap"),
        ("mlp", "soap"),
    ]
