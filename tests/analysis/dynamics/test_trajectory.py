"""What a forward pass shows is what the model does: states, logits, losses, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polyak import Transformer, rules
from polyak.analysis.dynamics.curve import loss_curve
from polyak.analysis.dynamics.lens import Lens
from polyak.analysis.dynamics.path import motion
from polyak.analysis.dynamics.trajectory import Watched
from polyak.errors import ConfigError, DataError
from polyak.nn import attention
from polyak.nn.presets import preset_fields
from polyak.rules import Stream, UpdateRule

Build = Callable[..., Transformer]

EVERY: list[dict[str, Any]] = [
    *({"rule": name} for name in rules.names()),
    *({"attention": name} for name in attention.names()),
    *(preset_fields(name, num_heads=2) for name in ("gpt2", "llama", "momentum_transformer")),
    {"splitting": "simultaneous", "rule": "triple_momentum"},
    {"embedding_norm": "layer", "rule": "heavy_ball", "stream_start": "x"},
    {"residual_width": 12, "rule": "triple_momentum"},
    {"rule": "residual_momentum@attention+gradient_descent@mlp"},
]


@pytest.mark.parametrize("fields", EVERY, ids=str)
def test_every_model_s_curve_ends_at_its_loss_and_its_path_adds_up(
    fields: dict[str, Any], ids: Tensor, tiny: Build
) -> None:
    model = tiny(**fields)
    watched = Watched(model)
    made = watched.run(ids[:, :-1])
    x, state = model.start(ids[:, :-1])
    context = model.context(ids[:, :-1])
    steps = len(model.blocks[0].rules)  # type: ignore[union-attr, arg-type]
    for layer, block in enumerate(model.blocks):  # the states are those from block to block
        torch.testing.assert_close(made.xs[layer * steps], x, rtol=0, atol=1e-12)
        x, state = block(x, state, context)
    torch.testing.assert_close(made.xs[-1], x, rtol=0, atol=1e-12)
    for substep in made.substeps:
        assert len(substep.values) == len(substep.points) > 0
    curve, moved = loss_curve(watched, ids), motion(watched, ids)
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert curve.loss[-1].value == pytest.approx(float(loss.detach()), abs=1e-9)
    total = curve.loss[0].value + sum(one.value for one in curve.change)
    assert total == pytest.approx(float(loss.detach()), abs=1e-9)
    assert len(curve.labels) == len(made.xs) == len(curve.loss) == 2 * steps + 1
    detour = moved.numbers["whole/detour"]
    assert detour.quantiles is not None
    assert detour.quantiles[0] >= 1 - 1e-12
    names = {key.split("/")[1] for key in moved.numbers if key.count("/") == 2}
    assert names == {stream.name for step in made.substeps for stream in step.rule.streams}


def test_a_middle_loss_is_that_of_a_model_that_ends_there(ids: Tensor, tiny: Build) -> None:
    model = tiny(rule="heavy_ball", num_layers=3)
    shorter = copy.deepcopy(model)
    del shorter.blocks[1:]
    expected = F.cross_entropy(shorter(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert loss_curve(Watched(model), ids).loss[2].value == pytest.approx(float(expected.detach()))


def test_what_a_layer_adds_again_is_in_what_its_first_substep_takes(
    ids: Tensor, tiny: Build
) -> None:
    model = tiny(embedding_reinjection=True)
    watched = Watched(model)
    made = watched.run(ids[:, :-1])
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert loss_curve(watched, ids).loss[-1].value == pytest.approx(float(loss.detach()))
    x, state = model.start(ids[:, :-1])
    first: Any = model.blocks[0]
    torch.testing.assert_close(made.xs[0], first.reinjected(x, state))


def test_the_model_is_not_changed(ids: Tensor, tiny: Build) -> None:
    model = tiny(rule="adam")
    before = model(ids[:, :-1])
    motion(Watched(model, torch.float32), ids)
    assert torch.equal(model(ids[:, :-1]), before)
    assert not any("step" in vars(rule) for block in model.blocks for rule in block.rules.values())  # type: ignore[union-attr, operator]


def test_a_lens_on_states_that_are_affine_in_the_first_finds_the_last(tiny: Build) -> None:
    model = tiny(num_layers=2, context_length=12)
    with torch.no_grad():  # every oracle is silent
        for block in model.blocks:
            block.attention.out.weight.zero_()  # type: ignore[union-attr]
            block.mlp.down.weight.zero_()  # type: ignore[union-attr]
    ids = torch.randint(11, (8, 13), generator=torch.Generator().manual_seed(2))
    watched = Watched(model)
    curve = loss_curve(watched, ids, lens=Lens(watched, ids))
    assert curve.lens is not None
    for plain, seen in zip(curve.loss, curve.lens, strict=True):  # x never moves: A = I, b = 0
        assert seen.value == pytest.approx(plain.value, abs=1e-4)
    with pytest.raises(DataError, match=r"give at least 18"):
        Lens(watched, ids[:1])


def test_a_lens_lowers_the_distance_to_the_last_state(ids: Tensor, tiny: Build) -> None:
    watched = Watched(tiny())
    other = torch.randint(11, (40, 7), generator=torch.Generator().manual_seed(3))
    lens, made = Lens(watched, other), watched.run(other[:, :-1])
    for place, x in enumerate(made.xs[:-1]):
        assert (lens(place, x) - made.xs[-1]).norm() <= (x - made.xs[-1]).norm()
    assert lens(len(made.xs) - 1, made.xs[-1]) is made.xs[-1]


def plain_model(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=11, n_positions=8, n_embd=8, n_layer=3, n_head=2, attn_implementation="sdpa"
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_plain_hugging_face_models_have_a_curve_and_a_path(kind: str, ids: Tensor) -> None:
    model = plain_model(kind)
    watched = Watched(model)
    curve, moved = loss_curve(watched, ids), motion(watched, ids)
    logits = model.double()(ids[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert curve.loss[-1].value == pytest.approx(float(loss.detach()), abs=1e-9)
    assert curve.labels == ("start", "1", "2", "3")
    assert {"3/turn", "3/update", "whole/detour"} <= set(moved.numbers)
    assert not any(key.count("/") == 2 for key in moved.numbers)


class Forgetful(UpdateRule):
    """x ← x + O(x); its stream is lost."""

    streams = (Stream("v", start="zeros"),)

    def step(self, x: Tensor, state: Any, oracle: Callable[[Tensor], Tensor]) -> Any:
        return x + oracle(x), state.replace(v=state.v.sum())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_layers": 1}, "the model has 1 layer"),
        ({"causal": False}, "not causal"),
        ({"dropout": 0.5}, "dropout is on"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(
    fields: dict[str, Any], says: str, ids: Tensor, tiny: Build
) -> None:
    model = tiny(**fields)
    model.train("dropout" in fields)
    with pytest.raises(ConfigError, match=says):
        loss_curve(Watched(model), ids)


def test_streams_that_cannot_be_read_are_refused(ids: Tensor, tiny: Build) -> None:
    model = tiny(rule="heavy_ball")
    for block in model.blocks:
        for kind in block.rules:  # type: ignore[union-attr]
            block.rules[kind] = Forgetful(8, 2)  # type: ignore[union-attr, index, operator]
    with pytest.raises(ConfigError, match="streams of rule Forgetful cannot be read: 'v'"):
        Watched(model).run(ids[:, :-1])


def test_one_sequence_and_unknown_models_are_refused(ids: Tensor, tiny: Build) -> None:
    with pytest.raises(DataError, match="errors are over sequences"):
        motion(Watched(tiny()), ids[:1])
    with pytest.raises(ConfigError, match="does not say how many layers"):
        Watched(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="must be float64 or float32"):
        Watched(tiny(), torch.bfloat16)
