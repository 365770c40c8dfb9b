"""Generation against the plain loop over full forward passes, for every rule."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from polyak import Transformer, rules
from polyak.data.tokenizers import BPETokenizer, ByteTokenizer
from polyak.errors import ConfigError, DataError
from polyak.evaluation.decoder import Decoder
from polyak.evaluation.generation import Generation, complete, generate
from polyak.evaluation.sampling_config import SamplingConfig
from polyak.nn.decoding.one_token import OneToken

Build = Callable[..., Transformer]
GREEDY = SamplingConfig(temperature=0, max_new_tokens=12)


def tokens_of(model: Transformer, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    for row, token in Generation(model, prompts, **options):
        found[row].append(token)
    return found


@torch.no_grad()
@pytest.mark.parametrize("splitting", ["lie_trotter", "simultaneous"])
@pytest.mark.parametrize("rule", rules.names())
def test_cached_logits_of_a_padded_batch_are_those_of_each_row_alone(
    rule: str, splitting: str, tiny_model: Build
) -> None:
    model = tiny_model(rule, splitting=splitting)  # context 7
    prompts = [[1], [2, 3, 4], [5, 6, 7, 8, 9, 10, 0, 1, 2]]
    decoder, rows = Decoder(model, prompts), [row[-7:] for row in prompts]
    logits = decoder.logits()
    for step in range(9):
        # a full context goes on from its last three tokens
        rows = [row if len(row) <= 7 else row[-3:] for row in rows]
        for row, found in zip(rows, logits, strict=True):
            expected = model(torch.tensor([row]))[0, -1]
            torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
        new = torch.tensor([step % 11, (step + 4) % 11, 3])[: len(rows)]
        rows = [[*row, int(token)] for row, token in zip(rows, new, strict=True)]
        logits = decoder.logits(new)
        if step == 4:
            decoder.keep([0, 2])
            rows, logits = [rows[0], rows[2]], logits[[0, 2]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_the_batch_it_is_in(temperature: float, tiny_model: Build) -> None:
    model = tiny_model("triple_momentum", context_length=16)
    config = SamplingConfig(
        temperature=temperature, max_new_tokens=30, repetition_penalty=1.1, top_p=0.9
    )
    prompts, seeds = [[1, 2], [3], [4, 5, 6, 7, 8], [3]], [0, 1, 2, 3]
    ends = {"end_of_text": 9}
    together = tokens_of(model, prompts, config=config, seeds=seeds, **ends)
    for prompt, seed, found in zip(prompts, seeds, together, strict=True):
        assert tokens_of(model, [prompt], config=config, seeds=[seed], **ends) == [found]
    backwards = tokens_of(model, prompts[::-1], config=config, seeds=seeds[::-1], **ends)
    assert backwards == together[::-1]
    if temperature:
        assert together[1] != together[3]  # one prompt, two seeds


def test_greedy_takes_the_likeliest_token_of_the_full_forward(tiny_model: Build) -> None:
    model = tiny_model("nesterov", context_length=32)
    row = [1, 2, 3]
    (found,) = tokens_of(model, [row], config=GREEDY)
    for token in found:
        assert token == int(model(torch.tensor([row]))[0, -1].argmax())
        row = [*row, token]
    assert len(found) == 12


def test_end_of_text_ends_a_row_unless_ignored(tiny_model: Build) -> None:
    model = tiny_model("heavy_ball", context_length=32)
    config = SamplingConfig(max_new_tokens=200, temperature=1.5)
    (free,) = tokens_of(model, [[1]], config=config)
    (ended,) = tokens_of(model, [[1]], config=config, end_of_text=10)
    place = free.index(10)
    assert ended == free[: place + 1]
    ignoring = SamplingConfig(max_new_tokens=200, temperature=1.5, ignore_end_of_text=True)
    assert tokens_of(model, [[1]], config=ignoring, end_of_text=10) == [free]


def test_ids_beyond_the_tokenizer_are_never_drawn(tiny_model: Build) -> None:
    model = tiny_model("gradient_descent", context_length=64)
    config = SamplingConfig(max_new_tokens=300, temperature=100.0)
    (found,) = tokens_of(model, [[1]], config=config, vocabulary=5)
    assert set(found) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([], "prompt 2 has no tokens"),
        ([11], "prompt 2 has the token 11; the model knows 0 to 10"),
        ([-1, 3], "prompt 2 has the token -1"),
    ],
)
def test_unknown_tokens_and_no_tokens_are_one_line(
    prompt: list[int], says: str, tiny_model: Build
) -> None:
    with pytest.raises(ConfigError) as error:
        Generation(tiny_model("gradient_descent"), [[1], prompt])
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_that_sees_the_future_cannot_continue(tiny_model: Build) -> None:
    with pytest.raises(ConfigError, match="causal=False cannot continue a text"):
        Generation(tiny_model("gradient_descent", causal=False), [[1]])


@pytest.fixture
def bytes_model(tiny_model: Build) -> Transformer:
    return tiny_model("triple_momentum", vocab_size=256, context_length=48)


def test_pieces_are_the_text_and_no_piece_has_half_a_character(bytes_model: Transformer) -> None:
    tokenizer = ByteTokenizer()
    config = SamplingConfig(max_new_tokens=40, temperature=1.0, seed=3)
    (whole,) = complete(bytes_model, tokenizer, ["aß"], config)
    pieces = list(generate(bytes_model, tokenizer, ["aß"], config))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.token for piece in pieces] == list(whole.tokens)
    assert whole.text.rstrip("\ufffd") == tokenizer.decode(whole.tokens).rstrip("\ufffd")
    assert [piece.end for piece in pieces] == [None] * 39 + ["length"]


def test_stop_strings_cut_across_tokens_and_the_rest_of_the_batch_goes_on(
    bytes_model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = ByteTokenizer()
    monkeypatch.setattr(OneToken, "supports", staticmethod(lambda model: False))
    with torch.no_grad():  # a model that spells
        spelled = {ord("x"): "a", ord("a"): "b", ord("b"): "c", ord("c"): "a", ord("z"): "z"}

        def features(ids: torch.Tensor, **_: Any) -> torch.Tensor:
            return ids[..., None].double()

        class Speller(torch.nn.Module):
            def forward(self, last: torch.Tensor) -> torch.Tensor:
                logits = torch.zeros(len(last), 256, dtype=torch.float64)
                for row, (token,) in enumerate(last.tolist()):
                    logits[row, ord(spelled[int(token)])] = 9
                return logits

        bytes_model.features = features  # type: ignore[method-assign]
        bytes_model.head = Speller()  # type: ignore[assignment]
    config = SamplingConfig(temperature=0, max_new_tokens=7, stop=("cab", "zzzzzzzzz"))
    first, second = complete(bytes_model, tokenizer, ["x", "z"], config)
    assert (first.text, first.end) == ("ab", "stop string")
    assert bytes(first.tokens) == b"abcab"
    assert (second.text, second.end) == ("zzzzzzz", "length")  # held back, given at the end


def test_bpe_text_streams_like_it_decodes(tiny_model: Build) -> None:
    tokenizer = BPETokenizer.train(["the größe of the größe is great " * 20], 270)
    model = tiny_model("adam", vocab_size=300, context_length=32)  # padded, as 50,304 is
    config = SamplingConfig(max_new_tokens=20, temperature=3.0)
    for seed in range(5):
        (found,) = complete(model, tokenizer, ["the"], config, seeds=[seed])
        shown = list(found.tokens[:-1] if found.end == "end of text" else found.tokens)
        assert tokenizer.decode(shown).rstrip("\ufffd") == found.text.rstrip("\ufffd")


def test_long_prompts_and_texts_say_so_and_read_the_last_tokens(bytes_model: Transformer) -> None:
    tokenizer, long = ByteTokenizer(), "abcdefgh" * 10
    few = SamplingConfig(max_new_tokens=1, temperature=0)
    with pytest.warns(UserWarning, match=r"prompt 2 is longer than the context of 48 tokens .*80"):
        _, cut = complete(bytes_model, tokenizer, ["a", long], few)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the same tokens, and nothing to say
        (same,) = complete(bytes_model, tokenizer, [long[-48:]], few)
        complete(bytes_model, tokenizer, ["a"], SamplingConfig(max_new_tokens=48))
    assert cut == same
    more = SamplingConfig(max_new_tokens=100)
    with pytest.warns(UserWarning, match="goes on from its last 24 tokens"):
        (grown,) = complete(bytes_model, tokenizer, ["a"], more)
    assert len(grown.tokens) == 100 or grown.end == "end of text"


def test_an_empty_prompt_begins_a_document(bytes_model: Transformer) -> None:
    tokenizer = ByteTokenizer()
    with pytest.warns(UserWarning, match="prompt 1 is empty: a new document begins"):
        (found,) = complete(bytes_model, tokenizer, [""], GREEDY)
    assert tokens_of(bytes_model, [[255]], config=GREEDY)[0][:5] == list(found.tokens[:5])


def test_a_tokenizer_of_another_model_and_text_that_is_none_are_one_line(
    tiny_model: Build, bytes_model: Transformer
) -> None:
    with pytest.raises(ConfigError, match="the tokenizer has 256 ids, the model 11"):
        complete(tiny_model("gradient_descent"), ByteTokenizer(), ["a"])
    with pytest.raises(DataError, match="not valid Unicode"):
        complete(bytes_model, ByteTokenizer(), ["\udcff"])
