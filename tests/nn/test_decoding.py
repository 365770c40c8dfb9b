"""Cached decoding and padding: the same logits as whole sequences without padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from polyak import ModelConfig, Transformer, rules
from polyak.errors import ConfigError
from polyak.nn.cache import KeyValueCache
from polyak.rules import Oracle, State, Stream, UpdateRule, unit_interval

every_rule = pytest.mark.parametrize("rule", rules.names())
both_splittings = pytest.mark.parametrize("splitting", ["lie_trotter", "simultaneous"])
Build = Callable[..., Transformer]
Register = Callable[[str, type[UpdateRule]], str]


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(11, (batch, length))


def decoded(model: Transformer, input_ids: Tensor, sizes: list[int], cache: Any) -> Tensor:
    """Logits of all tokens, fed in pieces of these sizes."""
    return torch.cat([model(piece, cache=cache) for piece in input_ids.split(sizes, 1)], 1)


def dynamic_cache(model: Transformer) -> Any:
    return pytest.importorskip("transformers").DynamicCache()


def static_cache(model: Transformer) -> Any:
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("its layers are told positions by the model")
    config = model.config
    shape = transformers.LlamaConfig(
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        hidden_size=config.d_model,
    )
    return transformers.StaticCache(shape, max_cache_len=config.context_length + 2)


CACHES: dict[str, Callable[[Transformer], Any]] = {
    "KeyValueCache": lambda model: KeyValueCache(model.config.context_length),
    "DynamicCache": dynamic_cache,
    "StaticCache": static_cache,
}


@every_rule
@both_splittings
@pytest.mark.parametrize("sizes", [[1] * 7, [3, 1, 2, 1], [7]])
def test_decoding_with_a_cache_is_the_whole_pass(
    rule: str, splitting: str, sizes: list[int], tiny_model: Build
) -> None:
    model, input_ids = tiny_model(rule, splitting=splitting), ids(2, 7)
    cache = KeyValueCache(7)
    assert (decoded(model, input_ids, sizes, cache) - model(input_ids)).abs().max() < 1e-10
    assert [cache.get_seq_length(slot) for slot in range(3)] == [7, 7, 0]  # two layers


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("rule", ["gradient_descent", "triple_momentum"])
def test_every_cache_class_serves(kind: str, rule: str, tiny_model: Build) -> None:
    model, input_ids = tiny_model(rule), ids(2, 7)
    for sizes in ([1] * 7, [3, 1, 2, 1]):
        found = decoded(model, input_ids, sizes, CACHES[kind](model))
        assert (found - model(input_ids)).abs().max() < 1e-10


@every_rule
@pytest.mark.parametrize("kind", CACHES)
def test_decoding_past_left_padding_is_the_whole_pass(
    rule: str, kind: str, tiny_model: Build
) -> None:
    model, input_ids, lengths = tiny_model(rule), ids(3, 7), [7, 4, 1]
    mask = torch.stack([torch.arange(7) >= 7 - length for length in lengths]).long()
    alone = [model(row[None, 7 - length :]) for row, length in zip(input_ids, lengths, strict=True)]
    for sizes in ([7], [5, 1, 1], [3, 4]):
        cache, end, pieces = CACHES[kind](model), 0, []
        for piece in input_ids.split(sizes, 1):
            end += piece.shape[1]
            pieces.append(model(piece, attention_mask=mask[:, :end], cache=cache))
        logits = torch.cat(pieces, 1)
        assert logits.isfinite().all()
        for row, length in enumerate(lengths):
            assert (logits[row, 7 - length :] - alone[row]).abs().max() < 1e-10


@every_rule
@both_splittings
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_real_positions(
    rule: str, splitting: str, causal: bool, side: str, tiny_model: Build
) -> None:
    model = tiny_model(rule, splitting=splitting, causal=causal)
    input_ids, lengths = ids(3, 7), [7, 4, 0]
    place = torch.arange(7)
    real = [place < n if side == "right" else place >= 7 - n for n in lengths]
    mask = torch.stack(real)
    logits = model(input_ids, attention_mask=mask)
    assert logits.isfinite().all()  # the last row is nothing but padding
    for row, keep in enumerate(real[:2]):
        alone = model(input_ids[row, keep][None])
        assert (logits[row, keep] - alone[0]).abs().max() < 1e-10
    other = torch.where(mask, input_ids, (input_ids + 3) % 11)
    changed = model(other, attention_mask=mask.long())
    assert (changed[mask] - logits[mask]).abs().max() < 1e-12


@every_rule
def test_gradients_past_padding_are_finite(rule: str, tiny_model: Build) -> None:
    model, input_ids = tiny_model(rule), ids(2, 7)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0] * 7])
    with torch.enable_grad():
        model(input_ids, attention_mask=mask).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_a_mask_of_ones_and_positions_as_they_are_change_nothing(tiny_model: Build) -> None:
    model, input_ids = tiny_model("nesterov"), ids(2, 7)
    logits = model(input_ids)
    ones, positions = torch.ones(2, 7), torch.arange(7)[None]
    assert (model(input_ids, attention_mask=ones) - logits).abs().max() < 1e-12
    assert (model(input_ids, position_ids=positions) - logits).abs().max() < 1e-12
    moved = model(input_ids, position_ids=positions.flip(1))
    assert (moved - logits).abs().max() > 1e-3
    # streams have positions, too: with x's own out of the way they still tell the difference
    model.embedding.positions.weight.zero_()
    moved = model(input_ids, position_ids=positions.flip(1))
    assert (moved - model(input_ids)).abs().max() > 1e-3


class Twice(UpdateRule):
    """Calls its oracle twice a step."""

    streams = (Stream("p"),)
    beta = unit_interval(0.5)

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        p = state.p + oracle(x + self.beta * oracle(x))
        return x + p, state.replace(p=p)


@both_splittings
@pytest.mark.parametrize("kind", ["KeyValueCache", "DynamicCache"])
def test_every_call_of_attention_has_a_slot_of_its_own(
    splitting: str, kind: str, tiny_model: Build, registered: Register
) -> None:
    model, input_ids = tiny_model(registered("twice", Twice), splitting=splitting), ids(2, 7)
    cache = CACHES[kind](model)
    found = decoded(model, input_ids, [3, 1, 1, 2], cache)
    assert (found - model(input_ids)).abs().max() < 1e-10
    assert cache.get_seq_length(3) == 7


def test_a_cache_follows_a_choice_of_rows_and_goes_back(tiny_model: Build) -> None:
    model, input_ids = tiny_model("heavy_ball"), ids(3, 7)
    cache = KeyValueCache(7)
    model(input_ids[:, :5], cache=cache)
    rows = torch.tensor([2, 0, 0, 1])
    cache.select(rows)
    found = model(input_ids[rows, 5:], cache=cache)
    assert (found - model(input_ids[rows])[:, 5:]).abs().max() < 1e-10
    cache.crop(2)
    assert cache.get_seq_length() == 2
    found = model(input_ids[rows, 2:6], cache=cache)
    assert (found - model(input_ids[rows, :6])[:, 2:]).abs().max() < 1e-10
    assert cache.nbytes == 2 * 2 * 4 * 7 * 12 * 8  # k and v of 2 layers, float64


@every_rule
def test_blocks_take_the_context_one_by_one(rule: str, tiny_model: Build) -> None:
    model, input_ids = tiny_model(rule), ids(2, 7)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    x, state = model.start(input_ids, attention_mask=mask)
    context = model.context(input_ids, mask)
    for block in model.blocks:
        x, state = block(x, state, context)
    assert torch.equal(model.head(model.norm(x)), model(input_ids, attention_mask=mask))
    assert model.context(input_ids) is None


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"attention_mask": torch.ones(2, 5)},
        r"attention_mask has shape \(2, 5\), but input_ids need \(2, 4\)",
    ),
    ({"attention_mask": torch.ones(2, 1, 4, 4)}, r"attention_mask has shape \(2, 1, 4, 4\)"),
    (
        {"position_ids": torch.arange(4)},
        r"position_ids has shape \(4,\), but input_ids need \(2, 4\)",
    ),
    (
        {"position_ids": torch.arange(4, 8)[None]},
        "position_ids run from 4 to 7; a model of context_length=7 has 0 to 6",
    ),
    ({"position_ids": torch.tensor([[-1, 0, 1, 2]])}, "position_ids run from -1 to 2"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_arguments_that_do_not_fit_are_refused(
    arguments: dict[str, Any], message: str, tiny_model: Build
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_model("adam")(ids(2, 4), **arguments)


def test_a_cache_that_cannot_serve_is_refused(tiny_model: Build) -> None:
    model, cache = tiny_model("adam"), KeyValueCache(5)
    model(ids(2, 4), cache=cache)
    with pytest.raises(ConfigError, match="KeyValueCache of length=5 has no room for 6"):
        model(ids(2, 2), cache=cache)
    with pytest.raises(ConfigError, match=r"8 tokens \(4 of them cached\) is longer than context"):
        model(ids(2, 4), cache=cache)
    with pytest.raises(ConfigError, match="the cache holds 2 sequences, not 3"):
        model(ids(3, 1), cache=cache)
    with pytest.raises(ConfigError, match=r"shape \(2, 1\), but input_ids after 4 cached tokens"):
        model(ids(2, 1), attention_mask=torch.ones(2, 1), cache=cache)
    with torch.enable_grad(), pytest.raises(ConfigError, match="decode under torch"):
        model(ids(2, 1), cache=KeyValueCache(7))
    with pytest.raises(ConfigError, match="causal=False see later ones"):
        tiny_model("adam", causal=False)(ids(2, 1), cache=KeyValueCache(7))
    with pytest.raises(ConfigError, match="length=0 must be a whole number of at least 1"):
        KeyValueCache(0)


def test_half_precision_decodes(tiny_config: Callable[..., ModelConfig]) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = Transformer(tiny_config("triple_momentum")).to(dtype).eval()
        input_ids = ids(2, 7)
        found = decoded(model, input_ids, [4, 1, 1, 1], KeyValueCache(7))
        assert found.dtype == dtype
        assert (found - model(input_ids)).abs().max() < 0.05
