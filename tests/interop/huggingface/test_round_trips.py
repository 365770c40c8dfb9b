"""What is saved is what is loaded, for every rule and option."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import polyak.interop.huggingface as hf
from polyak import ModelConfig, Transformer, rules
from polyak.errors import ConfigError, PolyakError, RunError, UnknownNameError
from polyak.files import sha256_of
from polyak.nn.presets import preset_fields
from tests.interop.huggingface.conftest import if_few, one_line

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "my_rule.py"
IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]])
OPTIONS: dict[str, dict[str, Any]] = {
    "untied": {"tie_embeddings": False},
    "simultaneous": {"splitting": "simultaneous"},
    "biases": {"bias": True, "norm_eps": 1e-3},
    "dropout": {"dropout": 0.25},
    "encoder": {"causal": False},
    "gpt2": preset_fields("gpt2", 3),
    "momentum_transformer": preset_fields("momentum_transformer", 3),
    "llama": {**preset_fields("llama", 3), "qk_norm": True, "head_dim": 6},
    "llama tied": {**preset_fields("llama", 3), "tie_embeddings": True, "causal": False},
    "everything": {"tie_embeddings": False, "splitting": "simultaneous", "bias": True},
}


def same(first: Any, second: Any) -> None:
    weights, others = first.state_dict(), second.state_dict()
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name
        assert weight.dtype == others[name].dtype
    learned = {name: p.requires_grad for name, p in first.named_parameters()}
    assert learned == {name: p.requires_grad for name, p in second.named_parameters()}
    with torch.no_grad():
        assert torch.equal(first(IDS).logits, second(IDS).logits)
    assert first.config.model_config() == second.config.model_config()
    tied = first.config.tie_word_embeddings
    assert (second.head.weight is second.embedding.tokens.weight) is tied


def there_and_back(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    kind = AutoModelForCausalLM if model.config.polyak["causal"] else AutoModelForMaskedLM
    return kind.from_pretrained(folder)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        *(pytest.param(rule, {}, id=f"{rule}-plain") for rule in rules.names()),
        *(
            pytest.param(rule, options, id=f"{rule}-{name}", marks=if_few(rule))
            for name, options in OPTIONS.items()
            for rule in rules.names()
        ),
    ],
)
def test_saved_and_loaded_is_the_same_to_the_last_bit(
    tiny: Callable[..., Any], tmp_path: Path, rule: str, options: dict[str, Any]
) -> None:
    model = tiny(rule, **options)
    again = there_and_back(model, tmp_path / "one")
    same(model, again)
    same(model, there_and_back(again, tmp_path / "two"))  # and nothing is lost the second time


@pytest.mark.parametrize("rule", rules.names())
def test_every_option_of_every_rule_is_kept(
    tiny: Callable[..., Any], tmp_path: Path, rule: str
) -> None:
    kind = rules.get(rule)
    tried: list[dict[str, Any]] = [
        {"rule_options": {"frozen": [name], name: 0.3}}
        for name in kind.present_scalars(kind.resolve({}))
    ]
    tried += [{"rule_options": {norm.option: "none"}} for norm in kind.norms.values()]
    tried += [
        {"rule_options": {name: value}}
        for name, choice in kind.choices.items()
        for value in choice.values
    ]
    if any(stream.start == "embedding" for stream in kind.streams):
        tried.append({"stream_start": "zeros"})
    for number, options in enumerate(tried):
        model = tiny(rule, **options)
        same(model, there_and_back(model, tmp_path / str(number)))


@pytest.mark.parametrize("rule", rules.names())
def test_the_model_computes_what_the_transformer_computes(
    tiny: Callable[..., Any], rule: str
) -> None:
    model = tiny(rule)
    plain = Transformer(model.config.model_config()).eval()
    plain.load_state_dict(model.state_dict())  # the names are the same
    with torch.no_grad():
        assert torch.equal(plain(IDS), model(IDS).logits)


def test_a_new_model_starts_where_a_transformer_of_that_seed_starts(
    tiny_config: Callable[..., ModelConfig],
) -> None:
    config = tiny_config("triple_momentum")
    torch.manual_seed(3)
    plain = Transformer(config)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(hf.PolyakConfig(config.to_dict()))
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_weights_on_the_meta_device_are_all_replaced_by_the_files(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    """A weight that stays uninitialised or is drawn anew would differ between two loads."""
    model = tiny("soap", tie_embeddings=False, bias=True)
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    assert file.keys() == dict(model.named_parameters()).keys()
    for seed in range(2):
        torch.manual_seed(seed)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert all(not p.is_meta for p in again.parameters())
        assert not [name for name, _ in again.named_buffers()]
        for name, weight in again.named_parameters():
            assert torch.equal(weight, file[name]), name


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, "auto", "bfloat16"])
def test_dtype_arguments(
    tiny: Callable[..., Any], tmp_path: Path, name: str, dtype: torch.dtype | str
) -> None:
    tiny().to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **{name: dtype})
    expected = torch.bfloat16 if isinstance(dtype, str) else dtype
    assert {p.dtype for p in model.parameters()} == {expected}
    with torch.no_grad():
        assert model(IDS).logits.dtype == expected


def test_weights_in_several_files(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny(tie_embeddings=False)
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    same(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_copy_is_a_model_of_its_own(tiny: Callable[..., Any]) -> None:
    model = tiny()
    twin = copy.deepcopy(model)
    same(model, twin)
    with torch.no_grad():
        twin.norm.weight.zero_()
    assert not twin(IDS).logits.any()
    assert model(IDS).logits.any()
    replica = model._replicate_for_data_parallel()
    replica._modules["norm"] = twin.norm  # as DataParallel puts a device's copy in its place
    assert not replica(IDS).logits.any()
    assert model(IDS).logits.any()


CONTROLS: dict[str, Any] = {
    "embedding_norm": "layer",
    "embedding_std": 0.5,
    "residual_width": 18,
    "embedding_reinjection": True,
}


@pytest.mark.parametrize(("rule", "start"), [("gradient_descent", None), ("spherical", "x")])
def test_controls_of_start_and_width_are_kept(
    tiny: Callable[..., Any], tmp_path: Path, rule: str, start: str | None
) -> None:
    model = tiny(rule, **CONTROLS, stream_start=start)
    same(model, there_and_back(model, tmp_path))
    named = hf.PolyakConfig(rule=rule, d_model=12, num_heads=3, stream_start=start, **CONTROLS)
    assert {name: named.polyak[name] for name in CONTROLS} == CONTROLS
    assert named.hidden_size == 12
    made = model.generate(IDS[:1], max_new_tokens=2, do_sample=False)
    with torch.no_grad():
        assert int(made[0, 5]) == int(model(IDS[:1]).logits[0, -1].argmax())
    model.resize_token_embeddings(13, mean_resizing=False)
    assert len(model.transformer.streams["reinjected"].tokens.weight) == 13
    assert model(IDS).logits.shape[-1] == 13
    old = {k: v for k, v in ModelConfig(rule="adam").to_dict().items() if k not in CONTROLS}
    assert hf.PolyakConfig(old).model_config() == ModelConfig(rule="adam")  # as saved before


@pytest.mark.parametrize("size", [7, 11, 16])
@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_resize_the_streams_tables_too(
    tiny: Callable[..., Any], tmp_path: Path, size: int, tied: bool
) -> None:
    model = tiny(tie_embeddings=tied)
    before = model(IDS % 7).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    kept = min(size, 11)
    assert torch.allclose(model(IDS % 7).logits[..., :kept], before[..., :kept], atol=1e-6)
    assert model(torch.tensor([[size - 1]])).logits.shape[-1] == size
    again = there_and_back(model, tmp_path)
    assert again.config.vocab_size == size
    assert torch.equal(again(IDS % 7).logits, model(IDS % 7).logits)


# A user's rule


def test_a_rule_of_ones_own_is_saved_and_found_again(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny(f"{EXAMPLE}:MyRule")
    again = there_and_back(model, tmp_path)
    kept = f"code/{sha256_of(EXAMPLE)[:12]}/my_rule.py:MyRule"
    assert again.config.rule == f"{tmp_path}/{kept}"
    again.config.rule = model.config.rule
    again.transformer.config = model.transformer.config
    same(model, again)


def test_a_rule_file_goes_with_the_model_and_another_can_be_given(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    own = tmp_path / "rules" / "own.py"
    own.parent.mkdir()
    own.write_text(EXAMPLE.read_text())
    model = tiny(f"{own}:MyRule")
    model.save_pretrained(tmp_path / "model")
    expected = model(IDS).logits
    own.rename(tmp_path / "moved.py")
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")(IDS).logits, expected
    )
    moved = f"{tmp_path / 'moved.py'}:MyRule"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", rule=moved)
    assert again.config.rule == moved
    assert torch.equal(again(IDS).logits, expected)


def test_a_rule_that_calls_its_oracle_twice_has_two_slots_a_layer(
    tiny: Callable[..., Any], registered: Callable[[str, Any], str]
) -> None:
    class Twice(rules.UpdateRule):
        def step(self, x: Any, state: Any, oracle: Any) -> Any:
            return x + oracle(x + 0.5 * oracle(x)), state

    model = tiny(registered("twice", Twice))
    assert model.config.num_hidden_layers == 4
    whole = model(IDS).logits
    generated = model.generate(IDS[:, :2], max_new_tokens=3, do_sample=False, use_cache=True)
    plain = model.generate(IDS[:, :2], max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(generated, plain)
    cached = model(IDS[:, :3], use_cache=True).past_key_values
    rest = model(IDS[:, 3:], past_key_values=cached).logits
    assert torch.allclose(rest, whole[:, 3:], atol=1e-5)


# Configurations


def test_standard_names_read_and_write_the_architecture() -> None:
    config = hf.PolyakConfig(rule="adam", hidden_size=24, num_heads=3, vocab_size=50)
    assert config.model_config() == ModelConfig(rule="adam", d_model=24, num_heads=3, vocab_size=50)
    assert (config.num_hidden_layers, config.num_key_value_heads) == (4, 3)
    config.max_position_embeddings = 9
    config.tie_word_embeddings = False
    assert config.model_config().context_length == 9
    again = hf.PolyakConfig.from_dict(config.to_dict())
    assert again == config
    assert again != hf.PolyakConfig()
    assert again.model_config() == config.model_config()


@pytest.mark.parametrize(
    "names",
    [
        {
            "num_hidden_layers": 3,
            "hidden_size": 48,
            "num_attention_heads": 3,
            "intermediate_size": 40,
            "max_position_embeddings": 64,
            "num_key_value_heads": 1,
            "hidden_act": "gelu_new",
        },
        {
            "n_layer": 3,
            "n_embd": 48,
            "n_head": 3,
            "n_inner": 40,
            "n_positions": 64,
            "num_kv_heads": 1,
            "activation_function": "gelu_new",
        },
        {
            "num_layers": 3,
            "d_model": 48,
            "num_heads": 3,
            "mlp_width": 40,
            "context_length": 64,
            "num_kv_heads": 1,
            "activation": "gelu_tanh",
        },
    ],
    ids=["llama", "gpt2", "own"],
)
def test_the_names_of_transformers_models_are_understood(names: dict[str, Any]) -> None:
    config = hf.PolyakConfig(rule="adam", **names)
    assert config.model_config() == ModelConfig(
        rule="adam",
        num_layers=3,
        d_model=48,
        num_heads=3,
        mlp_width=40,
        context_length=64,
        num_kv_heads=1,
        activation="gelu_tanh",
    )
    assert config.num_hidden_layers == 3
    assert hf.PolyakConfig.from_dict(config.to_dict()) == config


def test_words_about_where_a_configuration_lies_are_no_settings_of_the_model(run: Path) -> None:
    # as lm-evaluation-harness asks, which hands on what it was not given
    config = AutoConfig.from_pretrained(
        run / "model", revision="main", trust_remote_code=False, gguf_file=None, subfolder=""
    )
    assert config.polyak["rule"] == "triple_momentum"


def test_overrides_of_from_pretrained_are_applied_or_refused(tmp_path: Path) -> None:
    hf.PolyakConfig(rule="adam", num_layers=2, d_model=32, num_heads=2).save_pretrained(tmp_path)
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        for kind in (hf.PolyakConfig, AutoConfig):
            found = kind.from_pretrained(tmp_path, **{name: 3})
            assert (found.polyak["num_layers"], found.num_hidden_layers) == (3, 3), name
    assert AutoConfig.from_pretrained(tmp_path, pad_token_id=7).pad_token_id == 7
    with pytest.raises(UnknownNameError, match="'num_layer'; did you mean 'num_layers'"):
        AutoConfig.from_pretrained(tmp_path, num_layer=3)
    hf.PolyakForCausalLM(hf.PolyakConfig.from_pretrained(tmp_path)).save_pretrained(tmp_path)
    for kind in (hf.PolyakForCausalLM, AutoModelForCausalLM):
        assert kind.from_pretrained(tmp_path, dropout=0.5).config.polyak["dropout"] == 0.5
        with pytest.raises(UnknownNameError, match="'dropuot'; did you mean 'dropout'"):
            kind.from_pretrained(tmp_path, dropuot=0.5)


def test_what_a_configuration_is_refused_for() -> None:
    for build, error, said in (
        (lambda: hf.PolyakConfig({"ruel": "adam"}), UnknownNameError, "did you mean 'rule'"),
        (lambda: hf.PolyakConfig({"d_model": 8}, hidden_size=16), ConfigError, "disagrees"),
        (lambda: hf.PolyakConfig({"num_layers": 8}, n_layer=2), ConfigError, "disagrees"),
        (lambda: hf.PolyakConfig(n_layer=2, num_layers=3), ConfigError, "are one setting"),
        (lambda: hf.PolyakConfig(num_hidden_layer=3), UnknownNameError, "mean 'num_hidden_layers'"),
        (lambda: hf.PolyakConfig({"rule": "adam"}, num_head=3), UnknownNameError, "'num_heads'"),
        (lambda: hf.PolyakConfig(resid_pdrop=0.1), UnknownNameError, "setting of a polyak model"),
        (lambda: hf.PolyakForCausalLM(hf.PolyakConfig(rule="adamm")), UnknownNameError, "adam"),
        (lambda: hf.PolyakForCausalLM(hf.PolyakConfig(num_heads=5)), ConfigError, "num_heads=5"),
        (lambda: hf.PolyakForCausalLM(hf.PolyakConfig(causal=False)), ConfigError, "MaskedLM"),
        (lambda: hf.PolyakForMaskedLM(hf.PolyakConfig()), ConfigError, "CausalLM"),
    ):
        with pytest.raises(error, match=said) as caught:
            build()
        one_line(caught.value)


def test_a_saved_folder_says_what_it_is(tiny: Callable[..., Any], tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "polyak"
    assert written["architectures"] == ["PolyakForCausalLM"]
    assert written["auto_map"]["AutoModelForCausalLM"] == "modeling_polyak.PolyakForCausalLM"
    assert written["polyak"]["rule"] == "triple_momentum"
    assert written["hidden_size"] == written["polyak"]["d_model"] == 12
    code = (tmp_path / "modeling_polyak.py").read_text()
    assert "from polyak.interop.huggingface import" in code
    assert "class" not in code  # it only imports
    assert [file.name for file in tmp_path.glob("*.py")] == ["modeling_polyak.py"]


# Weights that do not fit


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("blocks.0.rules.mlp.beta_raw"), r"missing blocks.0.rules.mlp.beta_raw"),
        (lambda w: w.update(extra=torch.zeros(2)), "left over extra"),
        (lambda w: w.update({"norm.weight": torch.zeros(5)}), "of another shape norm.weight"),
        (lambda w: w.pop("embedding.tokens.weight"), "missing .*(embedding.tokens|head).weight"),
    ],
    ids=["missing", "left over", "other shape", "tied missing"],
)
def test_weights_that_do_not_fit_are_one_line(
    tiny: Callable[..., Any], tmp_path: Path, change: Callable[[Any], Any], said: str
) -> None:
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    change(weights)
    (tmp_path / "weights.json").unlink()  # the hash would have said so first
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(RunError, match=said) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "do not fit config.json" in one_line(caught.value)


def test_the_wrong_rule_for_the_weights_is_one_line(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    tiny("triple_momentum").save_pretrained(tmp_path)
    with pytest.raises(PolyakError, match=r"do not fit config\.json") as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path, rule="adam")
    one_line(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("vocab_size", 2**31 - 1), ("context_length", 2**31 - 1), ("d_model", 2**20)],
)
def test_sizes_that_the_weights_do_not_have_are_refused_before_they_are_allocated(
    tiny: Callable[..., Any], tmp_path: Path, field: str, value: int
) -> None:
    tiny(num_heads=4, d_model=16).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content = {"polyak": {**content["polyak"], field: value}, "model_type": "polyak"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"do not fit config\.json \([\d,]+ numbers, [\d,]+ needed"):
        hf.PolyakForCausalLM.from_pretrained(tmp_path)
