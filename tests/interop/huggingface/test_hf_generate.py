"""Masks, caches and `generate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    StaticCache,
    pipeline,
)

from polyak import rules
from polyak.errors import ConfigError
from polyak.nn.presets import preset_fields
from tests.interop.huggingface.conftest import if_few, one_line

IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]])
CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda config: DynamicCache(),
    "dynamic of a configuration": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=7),
}


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 2, 4 and 5 tokens, padded with a token that also occurs in them."""
    rows = [[1, 2], [3, 4, 5, 6], [7, 8, 9, 0, 1]]
    ids, mask = torch.full((3, 5), 2), torch.zeros(3, 5, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(5 - len(row), 5)
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return ids, mask


rule_and_preset = pytest.mark.parametrize(
    ("rule", "preset"),
    [
        *((rule, "paper") for rule in rules.names()),
        *(pytest.param(rule, "llama", marks=if_few(rule)) for rule in rules.names()),
    ],
)


@rule_and_preset
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing(
    tiny: Callable[..., Any], rule: str, side: str, causal: bool, preset: str
) -> None:
    model = tiny(
        rule, causal=causal, **preset_fields(preset, 3)
    ).double()  # orthogonalising makes rounding large
    ids, mask = padded(side)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        assert torch.isfinite(logits).all()
        for row, kept in enumerate(mask.bool()):
            alone = model(ids[row, kept][None]).logits[0]
            assert torch.allclose(logits[row, kept], alone, atol=1e-9)
        changed = model(torch.where(mask.bool(), ids, 9), attention_mask=mask).logits
        assert torch.allclose(changed[mask.bool()], logits[mask.bool()], atol=1e-9)


@rule_and_preset
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_cached_decoding_is_the_full_forward_past_left_padding_too(
    tiny: Callable[..., Any], rule: str, cache: Callable[[Any], Any], preset: str
) -> None:
    model = tiny(rule, **preset_fields(preset, 3)).double()
    ids, mask = padded("left")
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        past = cache(model.config)
        parts = []
        for start, end in ((0, 2), (2, 4), (4, 5)):
            part = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                past_key_values=past,
                use_cache=True,
            )
            past = part.past_key_values
            parts.append(part.logits)
    assert int(past.get_seq_length()) == 5
    assert torch.allclose(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], atol=1e-9)


def greedy(model: Any, row: list[int], new: int) -> list[int]:
    for _ in range(new):
        row = [*row, int(model(torch.tensor([row])).logits[0, -1].argmax())]
    return row


@pytest.mark.parametrize("rule", rules.names())
@pytest.mark.parametrize("way", ["dynamic", "static", "none"])
def test_greedy_generation_of_a_padded_batch(tiny: Callable[..., Any], rule: str, way: str) -> None:
    model = tiny(rule).double()
    how = {"use_cache": False} if way == "none" else {"cache_implementation": way}
    ids = torch.tensor([[10, 10, 3], [4, 5, 6]])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=-1, **how
        )
        assert out[0, 2:].tolist() == greedy(model, [3], 4)
        assert out[1].tolist() == greedy(model, [4, 5, 6], 4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams_are_the_same_with_and_without_a_cache(tiny: Callable[..., Any], cache: str) -> None:
    model = tiny("soap")
    ids = torch.tensor([[10, 3, 7], [4, 5, 6]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    arguments = {"attention_mask": mask, "max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    arguments |= {"num_return_sequences": 3, "return_dict_in_generate": True}
    arguments |= {"output_scores": True, "eos_token_id": -1}
    plain = model.generate(ids, use_cache=False, **arguments)
    cached = model.generate(ids, cache_implementation=cache, **arguments)
    assert torch.equal(plain.sequences, cached.sequences)
    assert torch.allclose(plain.sequences_scores, cached.sequences_scores, atol=1e-5)
    best = model.generate(ids, **{**arguments, "num_beams": 1, "num_return_sequences": 1})
    assert not torch.equal(best.sequences, cached.sequences[::3])  # beams found another


def test_sampling_follows_its_seed_and_the_models_probabilities(tiny: Callable[..., Any]) -> None:
    model = tiny()
    prompt = torch.tensor([[3, 4]]).expand(2000, 2)
    torch.manual_seed(1)
    drawn = model.generate(prompt, max_new_tokens=1, do_sample=True, top_k=0, eos_token_id=-1)
    torch.manual_seed(1)
    again = model.generate(prompt, max_new_tokens=1, do_sample=True, top_k=0, eos_token_id=-1)
    assert torch.equal(drawn, again)
    share = torch.bincount(drawn[:, -1], minlength=11) / len(drawn)
    wanted = model(prompt[:1]).logits[0, -1].softmax(-1)
    assert torch.allclose(share, wanted, atol=0.05)


def test_generation_goes_on_from_a_cache_it_returned(tiny: Callable[..., Any]) -> None:
    model = tiny()
    start = torch.tensor([[3, 4, 5]])
    how = {"do_sample": False, "return_dict_in_generate": True, "eos_token_id": -1}
    how["pad_token_id"] = -1  # 10 occurs in what is generated
    first = model.generate(start, max_new_tokens=2, **how)
    rest = model.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=2, **how
    )
    assert torch.equal(rest.sequences, model.generate(start, max_new_tokens=4, **how).sequences)


def test_generation_stops_where_the_context_ends_and_says_so(tiny: Callable[..., Any]) -> None:
    model = tiny()
    with pytest.warns(UserWarning, match="stops here, at the end of context_length=7"):
        out = model.generate(IDS, max_new_tokens=50, do_sample=False, eos_token_id=-1)
    assert out.shape == (2, 8)  # the last position still predicts one
    with pytest.raises(ConfigError, match="9 tokens is longer than context_length=7") as caught:
        model.generate(torch.ones(1, 9, dtype=torch.long), max_new_tokens=1)
    one_line(caught.value)


def test_drafts_of_an_assistant_stop_where_the_context_ends(tiny: Callable[..., Any]) -> None:
    model, how = tiny(), {"max_new_tokens": 50, "do_sample": False, "eos_token_id": -1}
    alone = model.generate(IDS[:1], **how)
    assert alone.shape == (1, 8)
    assisted = model.generate(IDS[:1], **how, assistant_model=tiny("gradient_descent"))
    assert torch.equal(assisted, alone)
    assert torch.equal(model.generate(IDS[:1], **how, prompt_lookup_num_tokens=3), alone)


def test_generation_stops_at_strings(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    inputs = tokenizer("the", return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
    stop = tokenizer.decode(plain[4:5])
    how = {"stop_strings": [stop], "tokenizer": tokenizer, "do_sample": False}
    found = model.generate(**inputs, max_new_tokens=6, **how)[0]
    ends = next(n for n in range(4, 10) if stop in tokenizer.decode(plain[3:n]))
    assert found.tolist() == plain[:ends].tolist()
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(**inputs, max_new_tokens=1, colour="red")


def test_generation_returns_hidden_states(tiny: Callable[..., Any]) -> None:
    model = tiny()
    how = {"return_dict_in_generate": True, "do_sample": False, "eos_token_id": -1}
    out = model.generate(IDS, max_new_tokens=2, output_hidden_states=True, **how)
    full = model(out.sequences[:, :-1], output_hidden_states=True).hidden_states
    assert len(out.hidden_states) == 2
    for part, whole in zip(out.hidden_states[1], full, strict=True):
        assert torch.allclose(part[:, 0], whole[:, -1], atol=1e-5)
    with pytest.raises(ConfigError, match="output_attentions=True"):
        model.generate(IDS, max_new_tokens=1, output_attentions=True, **how)


def test_a_stopping_criterion_of_ones_own_still_counts(tiny: Callable[..., Any]) -> None:
    from transformers import MaxLengthCriteria, StoppingCriteriaList

    criteria = StoppingCriteriaList([MaxLengthCriteria(6)])
    out = tiny().generate(IDS, stopping_criteria=criteria, do_sample=False, eos_token_id=-1)
    assert out.shape == (2, 6)


def test_what_forward_returns(tiny: Callable[..., Any]) -> None:
    model = tiny()
    output = model(IDS)
    assert output.logits.shape == (2, 5, 11)
    assert output.loss is None
    assert int(output.past_key_values.get_seq_length()) == 5
    assert model(IDS, use_cache=False).past_key_values is None
    assert model.train()(IDS).past_key_values is None  # nobody decodes while training
    model.eval()
    logits, _ = model(IDS, return_dict=False)
    assert torch.equal(logits, output.logits)
    last = model(IDS, logits_to_keep=2).logits
    assert torch.allclose(last, output.logits[:, -2:], atol=1e-6)
    some = model(IDS, logits_to_keep=torch.tensor([0, 3])).logits
    assert torch.allclose(some, output.logits[:, [0, 3]], atol=1e-6)


def test_position_ids_place_the_tokens(tiny: Callable[..., Any]) -> None:
    model = tiny()
    order = torch.arange(5).expand(2, 5)
    assert torch.equal(model(IDS, position_ids=order).logits, model(IDS).logits)
    assert not torch.allclose(model(IDS, position_ids=order + 2).logits, model(IDS).logits)


@pytest.mark.parametrize("rule", ["gradient_descent", "soap"])
def test_hidden_states_are_those_between_the_blocks(tiny: Callable[..., Any], rule: str) -> None:
    model = tiny(rule)
    states = model(IDS, output_hidden_states=True).hidden_states
    plain = model.transformer
    x, state = plain.start(IDS)
    expected = [x]
    for block in plain.blocks:
        x, state = block(x, state)
        expected.append(x)
    expected[-1] = plain.norm(x)
    assert len(states) == len(expected) == 3
    for seen, wanted in zip(states, expected, strict=True):
        assert torch.equal(seen, wanted)
    assert model(IDS).hidden_states is None


def test_arguments_that_cannot_work_are_refused(tiny: Callable[..., Any]) -> None:
    model = tiny()
    for arguments, said in (
        ({"inputs_embeds": torch.zeros(1, 2, 12)}, "pass input_ids"),
        ({"input_ids": IDS, "output_attentions": True}, "keeps no weights"),
        ({"input_ids": IDS + 5}, "go from 5 to 14, but vocab_size=11; the tokenizer"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 4)}, "attention_mask has shape"),
        ({"input_ids": IDS, "labels": IDS, "logits_to_keep": 1}, "labels need all"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            model(**arguments)
        one_line(caught.value)
    with pytest.raises(TypeError, match="token_type_ids"):  # not silently ignored
        model(IDS, token_type_ids=IDS)


def test_the_pipeline_writes_text(run: Path) -> None:
    write = pipeline("text-generation", model=str(run / "model"))
    (one,) = write("the quick", max_new_tokens=5, do_sample=False)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = model.generate(**tokenizer("the quick", return_tensors="pt"), max_new_tokens=5)
    assert one["generated_text"] == tokenizer.decode(ids[0])
    several = write(["the quick", "a"], batch_size=2, max_new_tokens=5, do_sample=False)
    assert several[0][0]["generated_text"] == one["generated_text"]
    with pytest.warns(UserWarning, match="context_length=24"):  # its own default is 256 tokens
        assert write("the", do_sample=False)[0]["generated_text"].startswith("the")
