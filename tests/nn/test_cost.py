"""The cost formulas against torch's counters, to the last digit."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from polyak import ModelConfig, Transformer, ops, rules
from polyak.errors import ConfigError, RuleError
from polyak.nn import attention
from polyak.nn.attention_registry import KINDS
from polyak.nn.cache import KeyValueCache
from polyak.nn.cost import cost
from polyak.nn.presets import Preset, preset_fields
from polyak.rules import Oracle, State, Stream, UpdateRule, unit_interval
from polyak.rules._cost import ElementCounter, count_elements, measure, step_cost

every_rule = pytest.mark.parametrize("rule", rules.names())
Config = Callable[..., ModelConfig]
Register = Callable[[str, type[UpdateRule]], str]

PAPER = {
    "gradient_descent": 124_373_760,
    "heavy_ball": 163_812_144,
    "nesterov": 163_812_168,
    "triple_momentum": 163_812_192,
    "rmsprop": 124_392_240,
    "adam": 163_812_168,
    "adamw": 163_812_192,
    "ortho": 124_392_216,
    "muon": 163_812_144,
    "shampoo": 124_392_240,
    "soap": 163_812_168,
}
"""Parameters at the paper's size (arXiv:2605.24425)."""


def paper_size(rule: str, **fields: Any) -> ModelConfig:
    shape = {"num_layers": 12, "num_heads": 12, "d_model": 768}
    return ModelConfig(rule=rule, **shape, vocab_size=50_304, context_length=1024, **fields)


TWO_RULES = ("gradient_descent", "triple_momentum")
"""One without streams and one with: what is not the rule's own is tried on them."""


def backbones(rule: str) -> list[dict[str, Any]]:
    """What changes the cost of everything but the rule's own step."""
    found: list[dict[str, Any]] = [
        {"tie_embeddings": False},
        {"causal": False},
        preset_fields("gpt2", 3),
        preset_fields("llama", 3),
        {"num_kv_heads": 1, "qk_norm": True, "norm": "rms", "bias": True},
        {"num_kv_heads": 1, "qk_norm": True, "positions": "rope", "head_dim": 10},
        {"head_dim": 3, "bias": True},
        {"positions": "rope", "qk_norm": True, "bias": True, "qkv_bias": False},
        {"mlp": "gated", "mlp_width": 10, "activation": "relu", "qkv_bias": True},
    ]
    if rule in TWO_RULES:
        sinusoidal = {"positions": "sinusoidal", "norm": "rms"}
        found += [
            preset_fields("momentum_transformer", 3),
            sinusoidal,
            {**sinusoidal, "position_mix": "concatenated", "tie_embeddings": False},
            {"positions": "none", "norm_position": "post", "bias": True},
        ]
    return found


def variants(rule: str) -> list[dict[str, Any]]:
    """What changes the cost of a rule's own step."""
    kind = rules.get(rule)
    found: list[dict[str, Any]] = [
        *({}, {"splitting": "simultaneous"}, {"bias": True}, {"num_heads": 6}, {"num_heads": 1}),
    ]
    found += [{"rule_options": {norm.option: "none"}} for norm in kind.norms.values()]
    found += [
        {"rule_options": {norm.option: "layer"}, "bias": True} for norm in kind.norms.values()
    ]
    if any(stream.start == "embedding" for stream in kind.streams):
        found.append({"stream_start": "zeros"})
    return found


def meta_model(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def counted_flops(config: ModelConfig, batch: int, length: int) -> tuple[int, int]:
    """Forward and backward FLOPs of a real pass on the meta device."""
    input_ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    model = meta_model(config)
    with FlopCounterMode(display=False) as forward:
        logits = model(input_ids)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@torch.no_grad()
def counted_elements(config: ModelConfig, length: int) -> float:
    """Elements per token of a real forward pass: what a second sequence adds to the first."""
    model, totals = Transformer(config), []
    for batch in (1, 2):
        with count_elements() as counter, ops.reference_forms(), attention_aside(counter):
            model(torch.zeros(batch, length, dtype=torch.long))
        totals.append(counter.elements)
    return (totals[1] - totals[0]) / length


@contextmanager
def attention_aside(counter: ElementCounter) -> Iterator[None]:
    """What a kind of attention does with queries, keys and values is not counted."""
    kinds = [attention.get(name) for name in attention.names()]
    attends = {kind: kind.attend for kind in kinds if "attend" in vars(kind)}

    def aside(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any) -> Tensor:
            before = counter.elements
            y = attend(*arguments)
            counter.elements = before
            return y

        return run

    matrix = attention.get("linear").__mro__[1]
    attends[matrix] = matrix.attend
    with pytest.MonkeyPatch.context() as patch:
        for kind, attend in attends.items():
            patch.setattr(kind, "attend", aside(attend))
        yield


def per_token(config: ModelConfig, length: int) -> list[float]:
    """Forward FLOPs, backward FLOPs and elements."""
    flops = counted_flops(config, 1, length)
    return [*(count / length for count in flops), counted_elements(config, length)]


@pytest.mark.parametrize(
    ("rule", "fields_of"),
    [
        *((rule, variants) for rule in rules.names()),
        *(
            pytest.param(rule, backbones, marks=() if rule in TWO_RULES else pytest.mark.slow)
            for rule in rules.names()
        ),
    ],
)
def test_formulas_equal_the_counters_to_the_last_digit(
    rule: str, fields_of: Callable[[str], list[dict[str, Any]]], tiny_config: Config
) -> None:
    for fields in fields_of(rule):
        config = tiny_config(rule, **fields)
        if fields:  # once with two layers; the rest with one, which is quicker
            config = dataclasses.replace(config, num_layers=1)
        found = cost(config)
        formulas = [
            found.forward_flops_per_token,
            found.backward_flops_per_token,
            found.elementwise_per_token,
        ]
        assert formulas == per_token(config, config.context_length), fields
        assert found.training_flops_per_token == formulas[0] + formulas[1]


ATTENTIONS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("linear", {"normalize": False, "chunk_size": 3}),
    ("linear", {"chunk_size": 3, "recompute": True}),
    ("momentum", {}),
    ("momentum", {"chunk_size": 4, "mu_learned": "head", "gamma_learned": "model"}),
    ("momentum", {"chunk_size": 3, "recompute": True, "weighted_normalizer": True}),
    ("momentum", {"form": "released", "chunk_size": 3}),
    ("adaptive_momentum", {"gamma_learned": "layer"}),
    ("adaptive_momentum", {"chunk_size": 3, "recompute": True}),
]


@pytest.mark.parametrize(("kind", "options"), ATTENTIONS)
def test_formulas_of_attention_equal_the_counters(
    kind: str, options: dict[str, Any], tiny_config: Config
) -> None:
    fields = {"num_heads": 4, "num_kv_heads": 2, "d_model": 16, "qk_norm": True, "num_layers": 1}
    given = {"attention": kind, "attention_options": options, "positions": "rope"}
    config = tiny_config("triple_momentum", **fields, **given, splitting="simultaneous")
    found = cost(config)
    flops = [found.forward_flops_per_token, found.backward_flops_per_token]
    *counted, elements = per_token(config, 7)
    assert flops == [int(count + 0.5) for count in counted]
    assert found.elementwise_per_token == elements
    groups: Counter[str] = Counter()
    for name, parameter in Transformer(config).named_parameters():
        groups[_group(name)] += parameter.numel()
    assert {group: n for group, n in found.parameters.items() if n} == groups


@pytest.mark.parametrize(("kind", "options"), ATTENTIONS)
def test_decoding_with_a_state_costs_the_same_at_every_position(
    kind: str, options: dict[str, Any], tiny_config: Config
) -> None:
    config = tiny_config("nesterov", attention=kind, attention_options=options)
    prices = {cost(config, position=place).decoding_flops_per_token for place in (0, 3, 6)}
    assert len(prices) == 1
    if options.get("form") == "released":
        return
    model, cache = meta_model(config), KeyValueCache(7)
    ids = torch.zeros(1, 5, dtype=torch.long, device="meta")
    with torch.no_grad():
        model(ids, cache=cache)
        with FlopCounterMode(display=False) as counter:
            model(ids[:, :1], cache=cache)
    assert {counter.get_total_flops()} == prices


BIDIRECTIONAL: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"bidirectional": "two_sided", "chunk_size": 3}),
    ("linear", {"bidirectional": "lra"}),
    ("momentum", {"bidirectional": "two_sided", "recompute": True, "mu_learned": "head"}),
    ("momentum", {"bidirectional": "two_sided", "chunk_size": 3, "weighted_normalizer": True}),
    ("momentum", {"bidirectional": "two_sided", "chunk_size": 4, "normalize": False}),
    ("momentum", {"bidirectional": "read_after_write", "gamma_learned": "model"}),
    ("momentum", {"bidirectional": "read_after_write", "weighted_normalizer": True}),
    ("momentum", {"bidirectional": "read_after_write", "normalize": False}),
    ("momentum", {"bidirectional": "lra"}),
]


@pytest.mark.parametrize(("kind", "options"), BIDIRECTIONAL)
def test_formulas_of_attention_that_sees_the_future_equal_the_counters(
    kind: str, options: dict[str, Any], tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("polyak.nn.attention._cost._measured")
    fields = {"num_heads": 4, "num_kv_heads": 2, "d_model": 16, "num_layers": 1, "causal": False}
    config = tiny_config("adam", attention=kind, attention_options=options, **fields)
    found, (forward, backward) = cost(config), counted_flops(config, 1, 7)
    assert found.forward_flops_per_token == int(forward / 7 + 0.5)
    assert found.backward_flops_per_token == int(backward / 7 + 0.5)
    for position in (0, 3):
        forward, _ = counted_flops(config, 1, position + 1)
        assert cost(config, position=position).decoding_flops_per_token == forward


def test_every_way_of_seeing_the_future_is_here() -> None:
    for kind in ("linear", "momentum"):
        tried = {options["bidirectional"] for name, options in BIDIRECTIONAL if name == kind}
        option: Any = attention.get(kind).declared["bidirectional"]
        assert set(option.values) - tried == set()


def test_a_users_kind_of_attention_is_measured(tiny_config: Config) -> None:
    class Own(attention.get("softmax")):
        """Another product, and a matrix of its own."""

        def __init__(self, config: ModelConfig) -> None:
            super().__init__(config)
            self.mix = torch.nn.Linear(config.head_width, config.head_width, bias=False)

        def attend(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
            return super().attend(q, k, self.mix(v), *rest)

    before = dict(KINDS._registered)
    attention.register("own")(Own)
    try:
        found, plain = cost(tiny_config("adam", attention="own")), cost(tiny_config("adam"))
    finally:
        KINDS._registered.clear()
        KINDS._registered.update(before)
    # two layers, 12 rows of 4 numbers each by (4, 4)
    assert found.forward_flops_per_token - plain.forward_flops_per_token == 2 * 2 * 12 * 4
    assert found.backward_flops_per_token - plain.backward_flops_per_token == 2 * 2 * 2 * 12 * 4
    assert found.decoding_flops_per_token - plain.decoding_flops_per_token == 2 * 2 * 12 * 4
    assert found.parameters["attention"] - plain.parameters["attention"] == 2 * 16


@every_rule
def test_all_matrix_products_grow_with_tokens(rule: str, tiny_config: Config) -> None:
    config = tiny_config(rule)
    forward, backward = counted_flops(config, 3, 7)
    assert forward == 21 * cost(config).forward_flops_per_token
    assert backward == 21 * cost(config).backward_flops_per_token


@pytest.mark.parametrize("rule", PAPER)
def test_flops_at_the_papers_size_equal_the_counter(rule: str) -> None:
    config = paper_size(rule)
    model = meta_model(config)
    input_ids = torch.zeros(1, 1024, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(input_ids).sum().backward()
    assert counter.get_total_flops() == 1024 * cost(config).training_flops_per_token


@pytest.mark.parametrize("rule", PAPER)
def test_parameters_at_the_papers_size_are_the_papers(rule: str) -> None:
    assert cost(paper_size(rule)).total_parameters == PAPER[rule]
    assert sum(p.numel() for p in meta_model(paper_size(rule)).parameters()) == PAPER[rule]


def test_parameters_of_the_papers_controls() -> None:
    zero = cost(paper_size("triple_momentum", stream_start="zeros"))
    untied = cost(paper_size("gradient_descent", tie_embeddings=False))
    assert zero.total_parameters == 124_392_288
    assert untied.total_parameters == 163_007_232


def _group(name: str) -> str:
    match name.split("."):
        case ["embedding", table, _]:
            return table
        case ["streams", *_]:
            return "streams"
        case ["head", _]:
            return "output"
        case ["norm", _] | ["blocks", _, _, "norm" | "q_norm" | "k_norm", _]:
            return "norms"
        case ["attention_scalars", _]:
            return "attention"
        case ["blocks", _, "rules", *_]:
            return "rule"
        case ["blocks", _, oracle, *_]:
            return oracle
    raise AssertionError(name)


@every_rule
def test_parameter_groups_are_those_of_the_model(rule: str, tiny_config: Config) -> None:
    for fields in variants(rule):
        config = tiny_config(rule, **fields)
        groups: Counter[str] = Counter()
        for name, parameter in Transformer(config).named_parameters():
            groups[_group(name)] += parameter.numel()
        found = cost(config).parameters
        assert {group: count for group, count in found.items() if count} == groups, fields


@every_rule
@pytest.mark.parametrize("splitting", ["lie_trotter", "simultaneous"])
def test_state_bytes_are_those_carried_between_layers(
    rule: str, splitting: str, tiny_config: Config
) -> None:
    config = tiny_config(rule, splitting=splitting)
    model = Transformer(config)
    carried = tree_leaves(model.blocks[0](*model.start(torch.zeros(2, 5, dtype=torch.long))))
    assert sum(y.nbytes for y in carried) == 10 * cost(config).state_bytes_per_token
    half = cost(config, bytes_per_number=2)
    assert 2 * half.state_bytes_per_token == cost(config).state_bytes_per_token


@pytest.mark.parametrize(
    "preset", [p for p in get_args(Preset) if preset_fields(p, 3)["attention"] == "softmax"]
)
@pytest.mark.parametrize("rule", ["gradient_descent", "muon", "soap"])
def test_decoding_costs_what_the_last_token_of_a_prefix_costs(
    rule: str, preset: str, tiny_config: Config
) -> None:
    config = tiny_config(rule, **preset_fields(preset, 3))
    for position in (0, 3, 6):
        forward, _ = counted_flops(config, 1, position + 1)
        decoding = cost(config, position=position).decoding_flops_per_token
        assert (position + 1) * decoding == forward
    assert cost(config).decoding_flops_per_token == cost(config).forward_flops_per_token


@pytest.mark.parametrize("preset", get_args(Preset))
def test_decoding_costs_what_a_pass_with_a_cache_multiplies(
    preset: str, tiny_config: Config
) -> None:
    config = tiny_config("triple_momentum", **preset_fields(preset, 3))
    model, cache = meta_model(config), KeyValueCache(7)
    ids = torch.zeros(1, 7, dtype=torch.long, device="meta")
    with torch.no_grad():
        for position in range(7):
            with FlopCounterMode(display=False) as counter:
                model(ids[:, position : position + 1], cache=cache)
            expected = cost(config, position=position).decoding_flops_per_token
            assert counter.get_total_flops() == expected


def test_a_model_that_sees_the_future_decodes_by_whole_passes(tiny_config: Config) -> None:
    config = tiny_config("adam", causal=False)
    forward, _ = counted_flops(config, 1, 4)
    assert cost(config, position=3).decoding_flops_per_token == forward


@every_rule
def test_what_a_rule_declares_is_what_is_measured(rule: str) -> None:
    kind = rules.get(rule)
    if rule in PAPER:
        assert kind.work is not None, "built-in rules declare their cost"
    settings = [{norm.option: v} for norm in kind.norms.values() for v in ("none", "layer")]
    for heads, bias in ((1, False), (4, True), (12, False)):
        for options in settings or [{}]:
            for norm_kind in ("layer", "rms"):
                given = {"bias": bias, "options": options, "norm_kind": norm_kind}
                assert step_cost(kind, 24, heads, **given) == measure(kind, 24, heads, **given)


def test_reading_a_cost_draws_no_random_numbers(tiny_config: Config, registered: Register) -> None:
    name = registered("thrifty", Extragradient)
    state = torch.get_rng_state()
    cost(tiny_config(name))
    assert torch.equal(torch.get_rng_state(), state)


class Extragradient(UpdateRule):
    """Calls its oracle twice and multiplies by a matrix of its own; declares no cost."""

    streams = (Stream("p"),)
    beta = unit_interval(0.5)

    def __init__(self, d_model: int, num_heads: int, **settings: Any) -> None:
        super().__init__(d_model, num_heads, **settings)
        self.mix = torch.nn.Linear(d_model, d_model, bias=False)

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        look = oracle(x)
        p = self.mix(state.p) + oracle(x + self.beta * look)
        return x + p, state.replace(p=p)


class Reader(UpdateRule):
    """Reads a value while it runs, which the meta device cannot offer."""

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        return x + min(1.0, x.abs().max().item()) * oracle(x), state


class Broken(UpdateRule):
    """Its step fails."""

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        return x + oracle(x)[..., :3], state


@pytest.mark.parametrize("splitting", ["lie_trotter", "simultaneous"])
def test_a_users_rule_that_declares_nothing_is_measured_exactly(
    splitting: str, tiny_config: Config, registered: Register
) -> None:
    config = tiny_config(registered("extragradient", Extragradient), splitting=splitting)
    found = cost(config)
    assert step_cost(Extragradient, 12, 3).oracle_calls == 2
    assert found.total_parameters == sum(p.numel() for p in Transformer(config).parameters())
    assert [
        found.forward_flops_per_token,
        found.backward_flops_per_token,
        found.elementwise_per_token,
    ] == per_token(config, config.context_length)


def test_a_rule_that_reads_values_is_measured_on_the_cpu(
    tiny_config: Config, registered: Register
) -> None:
    reader = cost(tiny_config(registered("reader", Reader)))
    plain = cost(tiny_config("gradient_descent"))
    assert reader.training_flops_per_token == plain.training_flops_per_token
    # per substep |x|, one product and the sum, against the sum alone
    assert reader.elementwise_per_token == plain.elementwise_per_token + 4 * 2 * 12


def test_a_rule_whose_step_fails_is_named(tiny_config: Config, registered: Register) -> None:
    with pytest.raises(RuleError, match="rule broken: its step fails when run to measure"):
        cost(tiny_config(registered("broken", Broken)))


def test_a_declaration_is_not_inherited_by_a_rule_that_steps_differently() -> None:
    class Twice(rules.get("heavy_ball")):
        def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
            return super().step(*super().step(x, state, oracle), oracle)

    assert Twice.work is None
    assert step_cost(Twice, 12, 3).oracle_calls == 2
    assert (
        step_cost(Twice, 12, 3).elements == 2 * step_cost(rules.get("heavy_ball"), 12, 3).elements
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position": 7}, r"position=7 must be from 0 to 6"),
        ({"position": -1}, r"position=-1 must be from 0 to 6"),
        ({"bytes_per_number": 0}, r"bytes_per_number=0 must be a whole number of at least 1"),
    ],
)
def test_impossible_questions_are_refused(
    arguments: dict[str, int], message: str, tiny_config: Config
) -> None:
    with pytest.raises(ConfigError, match=message):
        cost(tiny_config("adam"), **arguments)


def test_elements_count_arithmetic_and_nothing_else() -> None:
    u = torch.randn(5, 8)
    with count_elements() as counter:
        torch.nn.functional.layer_norm(u, (8,), torch.ones(8))
    assert counter.elements == 5 * (4 * 8 + 4)
    with count_elements() as counter, ops.reference_forms():
        ops.layer_norm(u, torch.ones(8), None, 1e-5)
    assert counter.elements == 5 * (4 * 8 + 4)
    with count_elements() as counter:
        _ = u[:, :3].t().contiguous(), torch.cat([u, u]), u @ u.t(), torch.zeros_like(u)
        q = u.view(1, 1, 5, 8)
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert counter.elements == 0
    with count_elements() as counter:
        (u * u).sum()
    assert counter.elements == 41
