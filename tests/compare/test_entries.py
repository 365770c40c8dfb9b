from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak import ModelConfig, rules
from polyak.compare.config import FULL_RULES, QUICK_RULES, CompareConfig
from polyak.compare.entries import Entry, enlarged, parse_entries, parse_entry
from polyak.errors import ConfigError, PolyakError
from polyak.nn.cost import cost
from polyak.settings import override, parse_free
from polyak.training.config.run import RunConfig

BASE = ModelConfig(num_layers=2, num_heads=2, d_model=16, context_length=8)
MINE = """
from polyak.rules import UpdateRule

class Mine(UpdateRule):
    def step(self, x, state, oracle):
        return x + oracle(x), state
"""


# Entries


@pytest.mark.parametrize("rule", rules.names())
def test_a_bare_name_is_that_rule_on_the_base(rule: str) -> None:
    entry = parse_entry(rule, BASE)
    assert entry == Entry(rule, dataclasses.replace(BASE, rule=rule))
    assert entry.slug == rule


def test_brackets_set_fields_and_options() -> None:
    entry = parse_entry(
        "triple_momentum[stream_start=zeros, splitting=simultaneous,mu=0.25,frozen=mu+nu]", BASE
    )
    assert entry.model == dataclasses.replace(
        BASE,
        rule="triple_momentum",
        stream_start="zeros",
        splitting="simultaneous",
        rule_options={"mu": 0.25, "frozen": ("mu", "nu")},
    )
    assert entry.name == (
        "triple_momentum[stream_start=zeros,splitting=simultaneous,mu=0.25,frozen=mu+nu]"
    )
    same = parse_entry("triple_momentum[rule_options.mu=0.25]", BASE)
    assert same.model.rule_options == {"mu": 0.25}


@pytest.mark.parametrize("order", ["num_heads=5,d_model=30", "d_model=30,num_heads=5"])
def test_fields_that_are_right_together_need_no_order(order: str) -> None:
    model = parse_entry(f"adam[{order}]", BASE).model
    assert (model.num_heads, model.d_model) == (5, 30)


def test_one_entrys_brackets_leave_the_others_alone() -> None:
    first, second, third = parse_entries(
        "gradient_descent[d_model=32,tie_embeddings=false],adam,triple_momentum[stream_start=none]",
        BASE,
    )
    assert (first.model.d_model, first.model.tie_embeddings) == (32, False)
    assert second.model == dataclasses.replace(BASE, rule="adam")
    assert third.model.stream_start is None


@pytest.mark.parametrize("text", [FULL_RULES, QUICK_RULES])
def test_the_defaults_can_be_read_and_have_folders_of_their_own(text: str) -> None:
    entries = parse_entries(text, BASE)
    assert entries[0].name == "gradient_descent"
    assert len({entry.slug for entry in entries}) == len(entries)
    assert {entry.model.rule for entry in entries} <= set(rules.names())


def test_a_users_rule_is_found_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = [
        parse_entry(f"{where}:Mine", BASE)
        for where in ("mine.py", "./mine.py", f"{tmp_path}/mine.py", "~/mine.py")
    ]
    assert found == found[:1] * 4
    assert found[0].name == "Mine"
    assert found[0].model.rule == f"{tmp_path / 'mine.py'}:Mine"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "nothing to compare"),
        ("adam,adam", "'adam' is named twice"),
        ("adam[d_model=3", "cannot read"),
        ("adam]", "cannot read"),
        ("adam[num_heads=2,num_heads=4]", "'num_heads' is set twice"),
        ("adam[num_heads=3]", "num_heads=3 does not divide d_model=16"),
        ("adam[rule=sgd]", "'rule'"),
        ("adam[context_length=4]", "would not see the same batches"),
        ("adam[nu=1]", "'nu'"),
        ("admm", "did you mean 'adam'"),
    ],
)
def test_what_cannot_be_read_is_one_line(text: str, says: str) -> None:
    with pytest.raises(PolyakError, match=says.replace("[", r"\[")) as caught:
        parse_entries(text, BASE)
    assert "\n" not in str(caught.value)


@given(
    st.lists(
        st.sampled_from(["adam", "adam[beta_1=0.1]", "adam[d_model=32]", "muon[beta=0.3]"]),
        unique=True,
        min_size=1,
    ),
    st.sampled_from([",", " , ", ",,"]),
)
def test_entries_are_kept_in_order_whatever_the_spaces(names: list[str], comma: str) -> None:
    scalars = rules.get("adam").scalars
    names = [name.replace("beta_1", next(iter(scalars))) for name in names]
    assert [entry.name for entry in parse_entries(comma.join(names), BASE)] == names


# Equal parameters


@pytest.mark.parametrize("other", ["triple_momentum", "gradient_descent[num_layers=5]"])
def test_the_widened_baseline_is_the_nearest_in_parameters(other: str) -> None:
    baseline = parse_entry("gradient_descent", BASE)
    target = cost(parse_entry(other, BASE).model).total_parameters
    wide = enlarged(baseline, target).model
    assert wide.d_model % BASE.num_heads == 0
    assert dataclasses.replace(wide, d_model=16) == baseline.model

    def miss(d_model: int) -> int:
        return abs(cost(dataclasses.replace(wide, d_model=d_model)).total_parameters - target)

    nearest = min(range(2, 80, 2), key=miss)
    assert miss(wide.d_model) == miss(nearest)


def test_a_widened_llama_keeps_what_rotary_positions_need() -> None:
    baseline = parse_entry("gradient_descent[preset=llama,d_model=20]", BASE)
    target = cost(parse_entry("triple_momentum[preset=llama,d_model=20]", BASE).model)
    wide = enlarged(baseline, target.total_parameters).model
    assert wide.d_model > 20
    assert wide.d_model % 4 == 0
    assert dataclasses.replace(wide, d_model=20) == baseline.model


def test_a_widened_model_has_room_for_pairs_of_sinusoids() -> None:
    for brackets, unit in (("preset=momentum_transformer", 12), ("positions=sinusoidal", 6)):
        baseline = parse_entry(f"gradient_descent[{brackets},num_heads=3,d_model=12]", BASE)
        wide = enlarged(baseline, cost(baseline.model).total_parameters * 2).model
        assert wide.d_model > 12
        assert wide.d_model % unit == 0


@pytest.mark.parametrize("preset", ["paper", "llama", "momentum_transformer"])
def test_a_wider_residual_stream_is_the_nearest_in_parameters(preset: str) -> None:
    baseline = parse_entry(f"gradient_descent[preset={preset}]", BASE)
    target = cost(parse_entry(f"triple_momentum[preset={preset}]", BASE).model).total_parameters
    wide = enlarged(baseline, target, "residual_width")
    width = wide.model.residual_width
    assert wide.name == f"gradient_descent[preset={preset},residual_width={width}]"
    assert dataclasses.replace(wide.model, residual_width=None) == baseline.model
    unit = 4 if preset == "momentum_transformer" else 2

    def miss(width: int) -> int:
        changed = dataclasses.replace(baseline.model, residual_width=width)
        return abs(cost(changed).total_parameters - target)

    assert width is not None
    assert miss(width) == min(map(miss, range(16, 80, unit)))


def test_a_second_table_is_as_large_as_a_velocitys() -> None:
    baseline = parse_entry("gradient_descent", BASE)
    velocity = cost(parse_entry("triple_momentum", BASE).model)
    made = enlarged(baseline, velocity.total_parameters, "reinjection")
    assert made.name == "gradient_descent[embedding_reinjection=true]"
    assert made == parse_entry(made.name, BASE)
    found = cost(made.model).parameters["streams"]
    assert found == velocity.parameters["streams"] + BASE.num_layers
    with pytest.raises(ConfigError, match="has its second table already; use --match-by width"):
        enlarged(made, 10**6, "reinjection")


def test_controls_stand_in_brackets() -> None:
    inside = "stream_start=x,embedding_norm=rms,embedding_std=1,residual_width=24"
    entry = parse_entry(f"spherical[{inside},embedding_reinjection=true]", BASE)
    assert entry.model == dataclasses.replace(
        BASE,
        rule="spherical",
        stream_start="x",
        embedding_norm="rms",
        embedding_std=1.0,
        residual_width=24,
        embedding_reinjection=True,
    )
    with pytest.raises(PolyakError, match="'embeding_norm'; did you mean 'embedding_norm'"):
        parse_entry("adam[embeding_norm=rms]", BASE)
    with pytest.raises(ConfigError, match="match_by='residual_width' says how parameters are"):
        CompareConfig(match_by="residual_width")


def test_a_preset_in_brackets_sets_its_fields_and_those_beside_it_win() -> None:
    first, second, paper = parse_entries(
        "adam[preset=llama],adam[norm=layer,preset=llama,num_heads=8],adam[preset=paper]",
        dataclasses.replace(BASE, bias=True),
    )
    shape = {"num_layers": 2, "d_model": 16, "context_length": 8}
    assert first.model == ModelConfig.preset("llama", rule="adam", num_heads=2, **shape)
    assert first.name == "adam[preset=llama]"
    wanted = ModelConfig.preset("llama", rule="adam", norm="layer", num_heads=8, **shape)
    assert second.model == wanted
    assert second.model.num_kv_heads == 2
    assert paper.model == dataclasses.replace(BASE, rule="adam")
    base = ModelConfig(attention="momentum", attention_options={"mu": 0.3})
    for inside, kind, options in (
        ("", "momentum", {"mu": 0.3}),
        ("attention.mu=0.5", "momentum", {"mu": 0.5}),
        ("preset=llama", "softmax", {}),
        ("preset=llama,attention=linear", "linear", {}),
        ("preset=llama,attention=momentum", "momentum", {"mu": 0.3}),
    ):
        model = parse_entry(f"adam[{inside}]", base).model
        assert (model.attention, model.attention_options) == (kind, options)
    with pytest.raises(ConfigError, match="unknown preset 'lama'; did you mean 'llama'"):
        parse_entry("adam[preset=lama]", BASE)
    run = override(RunConfig(), ["model.preset=gpt2", "model.num_layers=3"])
    assert run.model == ModelConfig.preset("gpt2", num_layers=3)


def test_a_widened_entrys_name_says_so() -> None:
    target = cost(parse_entry("triple_momentum", BASE).model).total_parameters
    plain = enlarged(parse_entry("gradient_descent", BASE), target)
    assert plain.name == f"gradient_descent[d_model={plain.model.d_model}]"
    untied = enlarged(parse_entry("gradient_descent[tie_embeddings=false]", BASE), 2 * target)
    assert untied.name == (f"gradient_descent[tie_embeddings=false,d_model={untied.model.d_model}]")


# Settings


def test_assignments_apply_together_and_the_later_counts() -> None:
    config = override(
        RunConfig(),
        [
            "model.d_model=150",
            "model.num_heads=5",
            "training.adam_betas=0.8+0.9",
            "training.steps=3",
            "training.steps = 7",
            "training.micro_batch_size=none",
            "model.tie_embeddings=False",
            "threads=2",
        ],
    )
    assert (config.model.d_model, config.model.num_heads) == (150, 5)
    assert config.model.tie_embeddings is False
    assert config.training.adam_betas == (0.8, 0.9)
    assert (config.training.steps, config.training.micro_batch_size) == (7, None)
    assert config.threads == 2
    assert config.corpus == RunConfig().corpus


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("modle.d_model=3", "'modle'; did you mean 'model'"),
        ("model.d_modle=3", "'d_modle'; did you mean 'd_model'"),
        ("corpus.name=x", "corpus has no fields of its own"),
        ("model=x", "cannot be set from text"),
        ("training.adam_betas=0.9", "two numbers"),
        ("training.steps=3.5", "must be a whole number"),
        ("training.clip=big", "must be a number"),
        ("model.causal=1", "must be true or false"),
        ("device=gpu", "unknown device 'gpu'"),
        ("threads", "has no '='"),
    ],
)
def test_wrong_assignments_are_one_line(assignment: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        override(RunConfig(), [assignment])
    assert "\n" not in str(caught.value)


def test_free_text_becomes_what_it_looks_like() -> None:
    looks = {"3": 3, "3.5": 3.5, "1e-3": 1e-3, "true": True, "False": False, "layer": "layer"}
    assert {text: parse_free(text) for text in looks} == looks
    assert parse_free("mu+nu") == ("mu", "nu")
