"""Losses on any text: what is scored, from how much context, and what the standard errors are."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import run_config

from polyak import Transformer
from polyak.data.batches import ValidationBatches
from polyak.errors import PolyakError
from polyak.evaluation.losses import (
    by_position,
    clusters,
    difference,
    documents,
    ratio,
    summary,
    token_losses,
    windows,
)
from polyak.evaluation.subjects import Subject, corpus_of, load_subject, side_of, token_set


@pytest.fixture(scope="module")
def subject(run: Path) -> Subject:
    return load_subject(run)


@torch.no_grad()
def one_by_one(subject: Subject, side: np.ndarray, start: int, end: int) -> float:
    """The loss of the token at `end` from the inputs start…end−1, alone."""
    ids = torch.from_numpy(side[start : end + 1].astype(np.int64))
    logits = subject.model(ids[None, :-1])[0, -1]
    return float(F.cross_entropy(logits, ids[-1]))


@pytest.mark.parametrize("stride", [1, 5, 8, 16])
def test_every_token_is_scored_once_with_at_least_the_context_that_is_promised(
    subject: Subject, corpus: Path, stride: int
) -> None:
    length = subject.context_length
    side = side_of(corpus_of(subject, str(corpus)), "validation")
    starts = ValidationBatches(side, length, 32, 5 * length).starts
    scored: dict[int, int] = {}
    for window in windows(starts, length, stride):
        assert window.length <= length
        for back in range(window.scored):
            target = window.start + window.length - back
            assert target not in scored
            scored[target] = target - window.start  # inputs before it
    assert sorted(scored) == [int(s) + 1 + i for s in starts for i in range(length)]
    full = min(length, length - stride + 1)
    assert all(n >= min(full, target) for target, n in scored.items())
    # and the losses are those of these windows, computed alone
    found = token_losses(subject, str(corpus), tokens=5 * length, stride=stride)
    order = [int(s) + 1 + i for s in starts for i in range(length)]
    for place in (0, 3, 16, 21, 47, 79):
        target = order[place]
        alone = one_by_one(subject, side[:], target - scored[target], target)
        assert found.nats.ravel()[place] == pytest.approx(alone, abs=2e-6)


def test_a_stride_of_the_whole_context_is_the_plain_form_and_the_runs_own_loss(
    subject: Subject, run: Path
) -> None:
    plain = token_losses(subject, tokens=256)
    assert np.array_equal(plain.nats, token_losses(subject, tokens=256, stride=16).nats)
    found = summary(plain)
    assert found["loss"]["value"] == pytest.approx(
        json.loads((run / "result.json").read_text())["loss"], rel=1e-6
    )
    assert found["fingerprint"] == subject.settings["validation"]["fingerprint"]
    blocks = token_set(subject, tokens=256)
    assert (found["tokens"], found["bytes"]) == (blocks.tokens, blocks.bytes)
    bits = found["loss"]["value"] * found["tokens"] / found["bytes"] / math.log(2)
    assert found["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-12)
    assert found["perplexity"]["value"] == pytest.approx(math.exp(found["loss"]["value"]))
    json.dumps(found, allow_nan=False)


def test_documents_end_with_their_end_of_text(subject: Subject, other: Path) -> None:
    side = side_of(corpus_of(subject, str(other)), "train")
    starts = ValidationBatches(side, 16, 32, None).starts
    end = subject.tokenizer.end_of_text
    found = documents(side, starts, 16, end)
    flat = [int(s) + 1 + i for s in starts for i in range(16)]
    ids = side[:]
    number = np.concatenate([[0], np.cumsum(ids == end)])  # ends before each place
    assert np.array_equal(found.ravel(), number[flat])
    assert len(np.unique(found)) == 8  # of nine files one is held out


def test_standard_errors_are_those_of_the_spread_over_clusters() -> None:
    draw = np.random.default_rng(0)
    sums = draw.normal(10, 2, 40)
    value, error = ratio(sums, np.full(40, 16.0))
    assert value == pytest.approx(sums.mean() / 16)
    assert error == pytest.approx(sums.std(ddof=1) / math.sqrt(40) / 16)
    assert ratio(sums[:1], np.ones(1))[1] is None


def test_intervals_cover_the_truth_where_documents_differ_and_have_different_lengths() -> None:
    # tokens of a document share its level: errors over single tokens would be far too small
    draw = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        counts = draw.integers(20, 200, 50).astype(np.float64)
        levels = 2 + 0.3 * draw.standard_normal(50)
        sums = counts * levels + draw.standard_normal(50) * np.sqrt(counts)
        value, error = ratio(sums, counts)
        assert error is not None
        covered += abs(value - 2) < 2.01 * error
    assert 0.92 < covered / 1000 < 0.97


def test_the_larger_error_is_reported_and_said_over_what(subject: Subject, other: Path) -> None:
    found = token_losses(subject, str(other), tokens=10**6, split="train")
    of = summary(found)["loss"]["se_of"]
    assert summary(found)["loss"]["se"] == max(of.values())
    assert summary(found)["se_over"] == max(of, key=of.get)
    assert len(set(clusters(found, "documents"))) == summary(found)["documents"] == 8
    one = dataclasses.replace(
        found, nats=found.nats[:1], bytes=found.bytes[:1], documents=found.documents[:1]
    )
    assert summary(one)["se_over"] is None
    assert summary(one)["perplexity"]["se"] is None


def test_differences_are_paired_on_equal_tokens_only(runs: Path, corpus: Path) -> None:
    first, second = (load_subject(runs / r) for r in ("gradient_descent", "triple_momentum"))
    base, other = (token_losses(s, tokens=256) for s in (first, second))
    found = difference(other, base)
    assert found is not None
    values = [summary(losses)["loss"]["value"] for losses in (other, base)]
    assert found["value"] == pytest.approx(values[0] - values[1])
    assert difference(base, base) == {"value": 0.0, "se": 0.0}
    assert difference(token_losses(second, tokens=128), base) is None
    assert difference(token_losses(second, tokens=256, stride=8), base) is None


def test_positions_average_to_the_loss(subject: Subject) -> None:
    losses = token_losses(subject, tokens=256)
    found = by_position(losses)
    assert found["position"] == list(range(1, 17))
    assert np.mean(found["loss"]) == pytest.approx(losses.nats.mean())
    assert found["se"][3] == pytest.approx(losses.nats[:, 3].std(ddof=1) / 4)


def test_bad_input_is_one_line(subject: Subject, corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, causal=False)
    seeing = dataclasses.replace(subject, name="seer", model=Transformer(config.model).eval())
    broken = load_subject(subject.folder)
    with torch.no_grad():
        next(broken.model.parameters()).fill_(math.nan)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    short = tmp_path / "short.txt"
    short.write_text("short")
    for who, where, fields, says in (
        (seeing, None, {}, "seer is not causal"),
        (broken, None, {}, "losses that are not finite on corpus.txt"),
        (subject, str(empty), {}, "empty"),
        (subject, str(short), {}, "too short"),
        (subject, "nothing", {}, "unknown corpus 'nothing'"),
        (subject, None, {"stride": 17}, "stride=17 must be from 1 to 16"),
        (subject, None, {"stride": 0}, "stride=0 must be from 1 to 16"),
        (subject, None, {"tokens": 0}, "tokens=0 is less than one block"),
    ):
        with pytest.raises(PolyakError, match=says) as caught:
            token_losses(who, where, **{"tokens": 64, **fields})  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_damaged_shards_of_a_prepared_folder_are_named(
    subject: Subject, other: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "prepared"
    shutil.copytree(corpus_of(subject, str(other)).folder, folder)
    shard = folder / "validation-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(PolyakError, match=r"validation-00000\.bin is truncated"):
        token_losses(subject, str(folder), tokens=64)
