"""Configurations that cannot work are refused when they are built, in one line with the fix."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak import ModelConfig, PolyakError
from polyak.errors import ConfigError, UnknownNameError

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_layers": 0}, "num_layers=0 must be a whole number of at least 1"),
    ({"num_layers": True}, "num_layers=True must be a whole number"),
    ({"d_model": 12.0}, "d_model=12.0 must be a whole number"),
    ({"vocab_size": -1}, "vocab_size=-1 must be"),
    ({"context_length": "8"}, "context_length='8' must be"),
    ({"num_heads": 5, "d_model": 128}, "num_heads=5 does not divide d_model=128; use 4 heads"),
    ({"splitting": "lie_troter"}, "unknown splitting 'lie_troter'; did you mean 'lie_trotter'"),
    ({"activation": "gleu"}, "unknown activation 'gleu'; did you mean 'gelu'"),
    ({"bias": 1}, "bias=1 must be true or false"),
    ({"qk_norm": "yes"}, "qk_norm='yes' must be true or false"),
    ({"qkv_bias": 0}, "qkv_bias=0 must be true, false or none"),
    ({"positions": "rotary"}, "unknown positions 'rotary'"),
    ({"norm": "rmsnorm"}, "unknown norm 'rmsnorm'; did you mean 'rms'"),
    ({"mlp": "swiglu"}, "unknown mlp 'swiglu'"),
    ({"mlp_width": 0}, "mlp_width=0 must be a whole number of at least 1, or none"),
    ({"num_kv_heads": 1.0}, "num_kv_heads=1.0 must be a whole number of at least 1, or none"),
    (
        {"num_heads": 6, "d_model": 12, "num_kv_heads": 4},
        "num_kv_heads=4 does not divide num_heads=6; use one of 1, 2, 3, 6",
    ),
    ({"num_kv_heads": 8}, "num_kv_heads=8 does not divide num_heads=4; use one of 1, 2, 4"),
    (
        {"positions": "rope", "d_model": 12},
        "d_model/num_heads = 3 is odd; use a d_model that is a multiple of 8",
    ),
    ({"positions": "rope", "head_dim": 7}, "head_dim=7 is odd; use an even one"),
    ({"head_dim": 0}, "head_dim=0 must be a whole number of at least 1, or none"),
    ({"positions": "rope", "rope_scaling": (-2.0,)}, "or one factor for all"),
    ({"positions": "rope", "rope_theta": 0}, "rope_theta=0 must be a number above 0"),
    ({"rope_theta": "large"}, "rope_theta='large' must be a number above 0"),
    ({"rope_theta": 5e5}, "rope_theta=500000.0 needs positions='rope'"),
    ({"rope_scaling": (8, 1, 4, 8192)}, "rope_scaling=.* needs positions='rope'"),
    ({"positions": "rope", "rope_scaling": (8, 1, 4)}, "must be four numbers above 0"),
    ({"positions": "rope", "rope_scaling": (8, 4, 1, 99)}, "low below high"),
    (
        {"positions": "none", "rope_theta": 5e5},
        "rope_theta=500000.0 needs positions='rope', and positions are 'none'",
    ),
    ({"norm_position": "posts"}, "unknown norm_position 'posts'; did you mean 'post'"),
    (
        {"norm_position": "post", "splitting": "simultaneous"},
        "norm_position='post' norms x after the step .* use splitting='lie_trotter'",
    ),
    ({"position_mix": "concat"}, "unknown position_mix 'concat'; did you mean 'concatenated'"),
    (
        {"position_mix": "concatenated", "positions": "rope"},
        "position_mix='concatenated' needs positions='sinusoidal', and positions are 'rope'",
    ),
    (
        {"positions": "sinusoidal", "d_model": 9, "num_heads": 3},
        "positions='sinusoidal' are pairs .* d_model=9 is odd; use an even one",
    ),
    (
        {"positions": "sinusoidal", "position_mix": "concatenated", "d_model": 6, "num_heads": 3},
        "d_model=6 is no multiple of 4; use one",
    ),
    (
        {"positions": "sinusoidal", "position_mix": "concatenated"},
        "tie_embeddings=True: .* set tie_embeddings=false",
    ),
    ({"activation_dropout": 1}, "activation_dropout=1 must be a number from 0 to below 1"),
    ({"causal": "yes"}, "causal='yes' must be true or false"),
    ({"norm_eps": -1e-5}, "norm_eps=-1e-05 must be a number from 0"),
    ({"dropout": 1.0}, "dropout=1.0 must be a number from 0 to below 1"),
    ({"dropout": "some"}, "dropout='some' must be a number"),
    ({"rule": "tripel_momentum"}, "unknown rule 'tripel_momentum'; did you mean 'triple_momentum'"),
    (
        {"stream_start": "ones", "rule": "nesterov"},
        "stream_start='ones' must be 'zeros', 'x'",
    ),
    ({"stream_start": "zeros"}, "stream_start='zeros': rule gradient_descent has no stream"),
    ({"stream_start": "zeros", "rule": "rmsprop"}, "rule rmsprop has no stream that starts"),
    ({"stream_start": "zeros", "rule": "shampoo"}, "rule shampoo has no stream that starts"),
    ({"rule_options": [1]}, "rule_options=\\[1\\] must map option names to values"),
    (
        {"rule": "nesterov", "rule_options": {"bata": 0.9}},
        "unknown option of rule nesterov 'bata'; did you mean 'beta'",
    ),
    (
        {"rule": "nesterov", "rule_options": {"update_norm": "none"}},
        "unknown option of rule nesterov 'update_norm'; did you mean 'state_norm'",
    ),
    (
        {"rule": "nesterov", "rule_options": {"state_norm": "rms"}},
        "rule option state_norm='rms' of nesterov: use one of layer, none",
    ),
    (
        {"rule": "nesterov", "rule_options": {"beta": 1.0}},
        r"rule option beta=1.0: its initial value must be a number in \(0, 1\)",
    ),
    (
        {"rule": "adam", "rule_options": {"gamma": -2}},
        r"rule option gamma=-2: its initial value must be a number in \(0, ∞\)",
    ),
    ({"rule": "adam", "rule_options": {"beta1": True}}, "rule option beta1=True"),
    ({"rule": "adam", "rule_options": {"beta1": float("nan")}}, "rule option beta1=nan"),
    ({"rule": "adam", "rule_options": {"beta1": "half"}}, "rule option beta1='half'"),
    (
        {"rule": "adam", "rule_options": {"frozen": ["beta3"]}},
        "unknown frozen scalar of adam 'beta3'; did you mean 'beta",
    ),
    # γ belongs to the wrapper, which is off by default
    ({"rule_options": {"gamma": 0.5}}, "unknown option of rule gradient_descent 'gamma'"),
    ({"rule_options": {"frozen": "gamma"}}, "unknown frozen scalar of gradient_descent 'gamma'"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_a_configuration_that_cannot_work_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ModelConfig(**fields)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, PolyakError)
    assert isinstance(caught.value, ValueError)


def test_an_unknown_setting_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown model setting 'layers'.*known:"):
        ModelConfig.from_dict({"layers": 3})
    with pytest.raises(UnknownNameError, match="did you mean 'num_layers'"):
        ModelConfig.from_dict({"num_layer": 3})


@given(
    layers=st.integers(1, 6),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 9),
    splitting=st.sampled_from(["lie_trotter", "simultaneous"]),
    start=st.sampled_from([None, "zeros"]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    beta=st.floats(0.01, 0.99),
)
def test_a_configuration_survives_json(
    layers: int,
    heads: int,
    head_dim: int,
    splitting: Any,
    start: Any,
    flags: tuple[bool, bool, bool],
    beta: float,
) -> None:
    tied, causal, bias = flags
    config = ModelConfig(
        rule="nesterov",
        num_layers=layers,
        num_heads=heads,
        d_model=heads * head_dim,
        splitting=splitting,
        stream_start=start,
        tie_embeddings=tied,
        causal=causal,
        bias=bias,
        rule_options={"beta": beta, "frozen": ["mu"]},
    )
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.head_width == head_dim


def test_presets_are_the_backbones_they_are_named_for() -> None:
    assert ModelConfig.preset("paper", num_layers=2) == ModelConfig(num_layers=2)
    gpt2 = ModelConfig.preset("gpt2")
    assert (gpt2.bias, gpt2.activation, gpt2.tie_embeddings) == (True, "gelu_tanh", True)
    assert (gpt2.norm, gpt2.positions, gpt2.hidden_width) == ("layer", "learned", 4 * 128)
    llama = ModelConfig.preset("llama")
    assert (llama.bias, llama.activation, llama.tie_embeddings) == (False, "silu", False)
    assert (llama.norm, llama.positions, llama.mlp) == ("rms", "rope", "gated")
    assert (llama.num_kv_heads, llama.hidden_width) == (1, 344)  # 8·128/3 = 341.3
    assert ModelConfig.preset("llama", norm="layer", num_kv_heads=None).kv_heads == 4
    for heads, groups in ((1, 1), (2, 1), (3, 1), (6, 1), (7, 1), (8, 2), (12, 3), (32, 8)):
        shaped = ModelConfig.preset("llama", num_heads=heads, d_model=2 * heads)
        assert shaped.num_kv_heads == groups
    momentum = ModelConfig.preset("momentum_transformer")
    assert (momentum.norm_position, momentum.activation, momentum.bias) == ("post", "relu", True)
    assert (momentum.positions, momentum.position_mix) == ("sinusoidal", "concatenated")
    assert momentum.token_width == 64
    assert momentum.attention == "momentum"
    assert momentum.rule == "residual_momentum@attention+gradient_descent@mlp"
    assert (
        ModelConfig.preset("momentum_transformer", rule="adam", attention="linear").rule == "adam"
    )
    with pytest.raises(UnknownNameError, match="unknown preset 'lama'; did you mean 'llama'"):
        ModelConfig.preset("lama")
    for config in (gpt2, llama):
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_gated_mlp_has_about_the_parameters_of_a_plain_one() -> None:
    for d_model in (128, 384, 768, 1024):
        gated = ModelConfig(d_model=d_model, mlp="gated").hidden_width
        assert 3 * gated == pytest.approx(8 * d_model, rel=0.04)


def test_a_configuration_written_before_the_options_were_there_is_the_papers() -> None:
    old = {
        "rule": "nesterov",
        "num_layers": 2,
        "num_heads": 2,
        "d_model": 16,
        "vocab_size": 11,
        "context_length": 7,
        "splitting": "lie_trotter",
        "stream_start": None,
        "tie_embeddings": True,
        "causal": True,
        "norm_eps": 1e-5,
        "bias": False,
        "activation": "gelu",
        "dropout": 0.0,
        "rule_options": {},
    }
    shape = {name: old[name] for name in ("num_layers", "num_heads", "d_model", "vocab_size")}
    wanted = ModelConfig.preset("paper", rule="nesterov", context_length=7, **shape)
    assert ModelConfig.from_dict(old) == wanted


def test_a_configuration_is_frozen_and_keyword_only() -> None:
    config = ModelConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 2
    with pytest.raises(TypeError):
        ModelConfig("adam")


def test_options_given_are_copied() -> None:
    options = {"beta": 0.25}
    config = ModelConfig(rule="heavy_ball", rule_options=options)
    options["beta"] = 0.75
    assert config.rule_options == {"beta": 0.25}


def test_configurations_and_rule_names_need_no_torch() -> None:
    program = (
        "import sys, polyak, polyak.nn.cost, polyak.rules\n"
        "assert 'triple_momentum' in polyak.rules.names()\n"
        "polyak.ModelConfig(num_layers=2)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
