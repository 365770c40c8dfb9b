"""The entropy of attention: against the definition, at its two ends, for every rule."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polyak import rules
from polyak.data.tokenizers import ByteTokenizer
from polyak.errors import RunError
from polyak.evaluation.attention import SEQUENCES, attention_entropy, entropy, probabilities
from polyak.evaluation.subjects import Subject
from polyak.rules import Oracle, State, UpdateRule
from tests.conftest import Build


def subject_of(model: torch.nn.Module) -> Subject:
    return Subject("tiny", Path("tiny"), model, ByteTokenizer(), {}, None)


@torch.no_grad()
def by_definition(attention: torch.nn.Module, x: Tensor) -> tuple[list[float], list[float]]:
    """Entropies of one sequence x (T, d) by head, number by number."""
    q, k, _ = attention.qkv(attention.norm(x)).chunk(3, -1)  # type: ignore[operator]
    heads = int(attention.num_heads)  # type: ignore[arg-type]
    size = q.shape[-1] // heads
    nats, relative = [], []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        found = []
        for i in range(len(x)):
            scores = [float(q[i, part] @ k[j, part]) / math.sqrt(size) for j in range(i + 1)]
            total = math.fsum(map(math.exp, scores))
            p = [math.exp(score) / total for score in scores]
            found.append(-math.fsum(x * math.log(x) for x in p))
        nats.append(sum(found) / len(found))
        shares = [h / math.log(i + 1) for i, h in enumerate(found) if i]
        relative.append(sum(shares) / len(shares))
    return nats, relative


def test_entropies_are_those_of_the_definition(tiny_model: Build) -> None:
    model = tiny_model("triple_momentum")
    ids = torch.randint(11, (3, 7))
    seen: list[Tensor] = []
    for block in model.blocks:
        block.attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = attention_entropy(subject_of(model), ids)
    assert found["sequences"] == 3
    assert [(row["layer"], row["call"]) for row in found["layers"]] == [(1, 1), (2, 1)]
    for layer, row in enumerate(found["layers"]):
        inputs = [x[0] for x in seen[layer::2]]
        each = [by_definition(model.blocks[layer].attention, x) for x in inputs]
        for place, name in enumerate(("nats", "relative")):
            values = torch.tensor([one[place] for one in each], dtype=torch.float64)
            assert row[name] == pytest.approx(values.mean(0).tolist(), abs=1e-12)
            error = (values.std(0) / math.sqrt(3)).tolist()
            assert row[f"{name}_se"] == pytest.approx(error, abs=1e-12)


@pytest.mark.parametrize("rule", rules.names())
def test_every_rules_attention_is_seen_and_the_model_is_left_as_it_was(
    tiny_model: Build, rule: str
) -> None:
    model = tiny_model(rule)
    ids = torch.randint(11, (2, 7))
    before = model(ids)
    found = attention_entropy(subject_of(model), ids)
    assert {row["layer"] for row in found["layers"]} == {1, 2}
    for row in found["layers"]:
        assert len(row["nats"]) == 3
        assert all(0 < share < 1 for share in row["relative"])
    assert torch.equal(before, model(ids))
    json.dumps(found, allow_nan=False)


def test_calls_are_counted_layer_by_layer(
    tiny_model: Build, registered: Callable[[str, type[UpdateRule]], str]
) -> None:
    class Twice(UpdateRule):
        def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
            return x + oracle(x + oracle(x)), state

    name = registered("twice", Twice)
    for place, calls in (
        ("1.attention", [2, 1, 1]),
        ("2.attention", [1, 2, 1]),
        ("mlp", [1, 1, 1]),
    ):
        model = tiny_model(f"{name}@{place}+gradient_descent", num_layers=3)
        found = attention_entropy(subject_of(model), torch.randint(11, (1, 7)))
        expected = [(i + 1, j + 1) for i, n in enumerate(calls) for j in range(n)]
        assert [(row["layer"], row["call"]) for row in found["layers"]] == expected


def test_equal_scores_are_as_wide_as_can_be_and_large_ones_as_narrow() -> None:
    k = torch.eye(6, dtype=torch.float64)[None, None]
    flat = entropy(*probabilities(torch.zeros_like(k), k, is_causal=True))
    assert float(flat[0]) == pytest.approx(sum(math.log(n) for n in range(1, 7)) / 6)
    assert float(flat[1]) == pytest.approx(1.0)
    sharp = entropy(*probabilities(1e4 * k, k, is_causal=True))
    assert float(sharp[0]) == pytest.approx(0.0, abs=1e-12)
    assert float(sharp[1]) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("form", ["causal", "boolean", "added", "grouped", "scaled"])
def test_the_probabilities_are_what_torch_attends_with(form: str) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 5, 3, generator=draw, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(5, 5, generator=draw) < 0.7
    mask.fill_diagonal_(True)
    call: dict[str, object] = {
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": mask},
        "added": {
            "attn_mask": torch.randn(5, 5, generator=draw).double().masked_fill(~mask, -math.inf)
        },
        "grouped": {"is_causal": True, "enable_gqa": True},
        "scaled": {"scale": 0.3},
    }[form]  # type: ignore[assignment]
    if form == "grouped":
        k, v = k[:, :2], v[:, :2]
    chances, visible = probabilities(q, k, v, **call)  # type: ignore[arg-type]
    assert not chances.masked_select(~visible.expand_as(chances)).any()
    values = v.repeat_interleave(2, 1) if form == "grouped" else v
    expected = F.scaled_dot_product_attention(q, k, v, **call)  # type: ignore[arg-type]
    torch.testing.assert_close(chances @ values, expected)


def test_rows_that_see_nothing_are_left_out() -> None:
    q = torch.zeros(1, 1, 3, 2)
    mask = torch.tensor([[False, False, False], [True, True, False], [True, True, False]])
    nats, relative = entropy(*probabilities(q, q, attn_mask=mask))
    assert float(nats) == pytest.approx(math.log(2))
    assert float(relative) == pytest.approx(1.0)


def test_many_sequences_are_thinned_evenly_and_a_model_without_attention_is_refused(
    tiny_model: Build,
) -> None:
    model = tiny_model("gradient_descent")
    ticks: list[int] = []
    found = attention_entropy(
        subject_of(model), torch.randint(11, (SEQUENCES + 9, 4)), ticks.append
    )
    assert found["sequences"] == SEQUENCES == sum(ticks)
    for block in model.blocks:
        block.attention.forward = lambda x: x
    with pytest.raises(RunError, match="made 0 calls of scaled_dot_product_attention"):
        attention_entropy(subject_of(model), torch.zeros(1, 4, dtype=torch.int64))


def test_entropy_says_where_it_does_not_apply(tiny_model: Build) -> None:
    model = tiny_model("gradient_descent", attention="momentum")
    with pytest.raises(RunError, match="does not apply: attention=momentum reads a state"):
        attention_entropy(subject_of(model), torch.zeros(1, 4, dtype=torch.int64))
