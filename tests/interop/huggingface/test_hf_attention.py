"""Kinds of attention with a state, behind transformers' interface."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

import polyak.interop.huggingface as hf
from polyak.errors import ConfigError, UnknownNameError
from polyak.nn.attention import get, names
from polyak.nn.presets import preset_fields
from tests.interop.huggingface.conftest import one_line
from tests.interop.huggingface.test_hf_generate import greedy, padded
from tests.interop.huggingface.test_round_trips import same, there_and_back

KINDS = [name for name in names() if get(name).recurrent]
IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]])
every_kind = pytest.mark.parametrize("kind", KINDS)
Make = Callable[..., Any]


@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_padding_changes_nothing(tiny: Make, kind: str, side: str, causal: bool) -> None:
    if get(kind).causal_only and not causal:
        return
    model = tiny(attention=kind, causal=causal, num_kv_heads=1).double()
    ids, mask = padded(side)
    logits = model(ids, attention_mask=mask).logits
    for row, kept in enumerate(mask.bool()):
        alone = model(ids[row, kept][None]).logits[0]
        assert torch.allclose(logits[row, kept], alone, atol=1e-9)


@every_kind
@pytest.mark.parametrize("positions", ["learned", "rope", "sinusoidal", "none"])
@torch.no_grad()
def test_cached_decoding_is_the_full_forward_past_left_padding_too(
    tiny: Make, kind: str, positions: str
) -> None:
    model = tiny(attention=kind, positions=positions).double()
    ids, mask = padded("left")
    whole, past, parts = model(ids, attention_mask=mask).logits, None, []
    for start, end in ((0, 2), (2, 4), (4, 5)):
        given = {"attention_mask": mask[:, :end], "past_key_values": past, "use_cache": True}
        part = model(ids[:, start:end], **given)
        past = part.past_key_values
        parts.append(part.logits)
    assert isinstance(past, hf.StateCache)
    assert int(past.get_seq_length()) == 5
    assert torch.allclose(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], atol=1e-9)


@every_kind
@pytest.mark.parametrize("way", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
@torch.no_grad()
def test_greedy_generation_of_a_padded_batch(tiny: Make, kind: str, way: dict[str, Any]) -> None:
    model = tiny(attention=kind).double()
    ids = torch.tensor([[10, 10, 3], [4, 5, 6]])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, **way}
    out = model.generate(ids, attention_mask=mask, **how)
    assert out[0, 2:].tolist() == greedy(model, [3], 4)
    assert out[1].tolist() == greedy(model, [4, 5, 6], 4)


@every_kind
def test_beams_and_samples_are_the_same_with_and_without_a_cache(tiny: Make, kind: str) -> None:
    model = tiny(attention=kind).double()
    ids = torch.tensor([[10, 3, 7], [4, 5, 6]])
    how: dict[str, Any] = {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    how |= {"max_new_tokens": 4, "return_dict_in_generate": True, "eos_token_id": -1}
    beams = {"num_beams": 3, "num_return_sequences": 3, "do_sample": False, "output_scores": True}
    plain, cached = (model.generate(ids, use_cache=c, **how, **beams) for c in (False, True))
    assert torch.equal(plain.sequences, cached.sequences)
    assert torch.allclose(plain.sequences_scores, cached.sequences_scores, atol=1e-9)
    drawn = []
    for use_cache in (False, True):
        torch.manual_seed(1)
        found = model.generate(
            ids, use_cache=use_cache, do_sample=True, num_return_sequences=5, **how
        )
        drawn.append(found.sequences)
    assert torch.equal(*drawn)


def test_generation_goes_on_from_a_cache_it_returned_and_leaves_it_as_it_was(tiny: Make) -> None:
    model, start = tiny(attention="adaptive_momentum"), torch.tensor([[3, 4, 5]])
    how: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}
    how |= {"eos_token_id": -1, "pad_token_id": -1}
    first = model.generate(start, max_new_tokens=2, **how)
    cache = first.past_key_values
    states = [[tensor.clone() for tensor in cache[slot]["recurrent_state"]] for slot in range(2)]
    kept = [cache[slot]["recurrent_state"] for slot in range(2)]
    rest = model.generate(first.sequences, past_key_values=cache, max_new_tokens=2, **how)
    assert torch.equal(rest.sequences, model.generate(start, max_new_tokens=4, **how).sequences)
    for held, copies in zip(kept, states, strict=True):  # who holds a state can go on from it
        assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


def test_a_cache_has_the_names_and_the_layout_of_flash_linear_attention(tiny: Make) -> None:
    model = tiny(attention="momentum", num_kv_heads=1)
    cache = model(IDS).past_key_values
    assert len(cache) == 2
    entry = cache[1]
    assert set(entry) == {"recurrent_state", "attn_state", "conv_state", "ffn_state"}
    s, p, z = entry["recurrent_state"][:3]
    assert s.shape == p.shape == (2, 1, 4, 4)  # (batch, kv heads, key, value)
    assert z.shape == (2, 1, 4)
    assert s.dtype == torch.float32
    copy = hf.StateCache()
    for slot in range(2):
        copy.update(recurrent_state=cache[slot]["recurrent_state"], layer_idx=slot, offset=5)
    assert copy.get_seq_length() == copy.get_seq_length(1) == 5
    following = IDS[:, :1]
    one, other = (model(following, past_key_values=c).logits for c in (copy, cache))
    assert torch.equal(one, other)


def test_only_a_table_of_positions_ends_generation(tiny: Make) -> None:
    how: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": -1}
    for positions in ("none", "rope", "sinusoidal"):
        model = tiny(attention="momentum", positions=positions)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            out = model.generate(IDS, **how)
        assert out.shape == (2, 25)  # the context is 7
        full = model(out[:, :-1]).logits
        assert torch.equal(full[:, 4:].argmax(-1), out[:, 5:])
    with pytest.warns(UserWarning, match="stops here, at the end of context_length=7"):
        assert tiny(attention="momentum").generate(IDS, **how).shape == (2, 8)


def test_what_a_state_cannot_do_is_refused_in_one_line(tiny: Make) -> None:
    model, softmax = tiny(attention="linear"), tiny()
    how: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": -1}
    with pytest.raises(ConfigError, match="a DynamicCache keeps keys and values") as caught:
        model(IDS, past_key_values=DynamicCache())
    one_line(caught.value)
    with pytest.raises(ConfigError, match="StateCache remembers states") as caught:
        softmax(IDS, past_key_values=hf.StateCache())
    one_line(caught.value)
    with pytest.raises(ConfigError, match="cache_implementation='quantized'") as caught:
        model.generate(IDS, cache_implementation="quantized", **how)
    one_line(caught.value)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(IDS[:1], assistant_model=softmax, **how)
    cache = model(IDS).past_key_values
    with pytest.raises(ConfigError, match="states of 5 tokens cannot forget") as caught:
        cache.crop(-1)
    one_line(caught.value)
    for options, said in (
        ({"mu": 1.5}, "mu=1.5"),
        ({"nu": 0.5}, "unknown option of attention momentum 'nu'; did you mean 'mu'"),
    ):
        config = softmax.config.polyak | {"attention": "momentum", "attention_options": options}
        with pytest.raises((ConfigError, UnknownNameError), match=said) as refused:
            hf.PolyakForCausalLM(hf.PolyakConfig(config))
        one_line(refused.value)


def test_the_released_form_is_passed_through_whole_and_not_cached(tiny: Make) -> None:
    model = tiny(attention="momentum", attention_options={"form": "released"})
    assert model(IDS).past_key_values is None
    how: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": -1}
    assert model.generate(IDS, use_cache=False, **how).shape == (2, 7)
    with pytest.raises(ConfigError, match="cannot decode token by token") as caught:
        model.generate(IDS, **how)
    one_line(caught.value)


OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {"feature_map": "softplus", "eps": 1e-3},
    "momentum": {"mu": 0.3, "mu_learned": "head", "gamma_learned": "model", "scale": "head_dim"},
    "adaptive_momentum": {"first_step": "gamma", "gamma": 0.5, "gamma_learned": "layer"},
}


@every_kind
@pytest.mark.parametrize("preset", ["paper", "momentum_transformer"])
def test_saved_and_loaded_is_the_same_to_the_last_bit(
    tiny: Make, tmp_path: Path, kind: str, preset: str
) -> None:
    for number, options in enumerate(({}, OPTIONS[kind])):
        fields = {**preset_fields(preset, 3), "attention": kind, "attention_options": options}
        model = tiny("triple_momentum", **fields)
        same(model, there_and_back(model, tmp_path / str(number)))


def test_a_configuration_takes_kinds_and_options_by_name(tiny: Make, tmp_path: Path) -> None:
    config = hf.PolyakConfig(
        attention="momentum", attention_options={"mu": 0.5}, num_hidden_layers=1, hidden_size=12
    )
    model = hf.PolyakForCausalLM(config)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.model_config().attention_options == {"mu": 0.5}
    other = AutoModelForCausalLM.from_pretrained(tmp_path, attention_options={"mu": 0.25})
    assert other.transformer.blocks[0].attention.options["mu"] == 0.25
    with pytest.raises(UnknownNameError, match="did you mean 'momentum'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attention="momentun")


@pytest.mark.slow
@every_kind
def test_the_trainer_lowers_the_loss_with_checkpointing_too(
    tiny: Make, tmp_path: Path, kind: str
) -> None:
    rows = [{"input_ids": [1, 2, 3, 4, 5, 6], "labels": [1, 2, 3, 4, 5, 6]}] * 8
    for checkpointing in (False, True):
        model = tiny(attention=kind, attention_options=OPTIONS[kind])
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(checkpointing)),
            max_steps=20,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            gradient_checkpointing=checkpointing,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
        )
        ids = torch.tensor([rows[0]["input_ids"]])
        before = float(model(ids, labels=ids).loss.detach())
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        assert float(model.eval()(ids, labels=ids).loss.detach()) < 0.5 * before
