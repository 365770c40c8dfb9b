"""Samplers against direct formulas, against transformers', and in distribution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from polyak.errors import ConfigError, DivergedError
from polyak.evaluation.sampling import Sampler, candidates, draw, penalise
from polyak.evaluation.sampling_config import SamplingConfig

V = 40
CPU = torch.device("cpu")


def probabilities(logits: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """What `candidates` gives as a distribution over all ids."""
    found, ids = candidates(logits, config)
    found = found / found.sum(-1, keepdim=True)
    return (
        found
        if ids is None
        else torch.zeros(logits.shape, dtype=found.dtype).scatter(1, ids, found)
    )


def directly(row: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """The definition, one token after another."""
    p = np.exp((row - row.max()) / config.temperature)
    p /= p.sum()
    order = list(np.argsort(-p))
    if config.top_k is not None:
        order = order[: config.top_k]
        p = np.where(np.isin(np.arange(len(p)), order), p, 0)
        p /= p.sum()
    if config.top_p is not None:
        kept, total = [], 0.0
        for token in order:
            if total >= config.top_p:
                break
            kept.append(token)
            total += p[token]
        p = np.where(np.isin(np.arange(len(p)), kept), p, 0)
        p /= p.sum()
    return p


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 7, V, 1000])
@pytest.mark.parametrize("top_p", [None, 0.001, 0.6, 0.95, 1.0])
def test_distribution_is_the_definitions(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = 3 * torch.randn(5, V, dtype=torch.float64)
    found = probabilities(logits, config)
    for row, p in zip(logits.numpy(), found.numpy(), strict=True):
        np.testing.assert_allclose(p, directly(row, config), atol=1e-12)


def test_distribution_is_that_of_transformers_processors() -> None:
    transformers: Any = pytest.importorskip("transformers")
    logits = 3 * torch.randn(6, V)
    seen_ids = torch.randint(V, (6, 9))
    seen = torch.zeros(6, V, dtype=torch.bool).scatter(1, seen_ids, True)
    for penalty, temperature, top_k, top_p in (
        (1.3, 0.7, 12, 0.8),
        (0.8, 1.9, 5, 0.5),
        (2.0, 0.4, 39, 0.99),
    ):
        config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
        theirs = logits
        for processor in (
            transformers.RepetitionPenaltyLogitsProcessor(penalty),
            transformers.TemperatureLogitsWarper(temperature),
            transformers.TopKLogitsWarper(top_k),
            transformers.TopPLogitsWarper(top_p),
        ):
            theirs = processor(seen_ids, theirs)
        ours = probabilities(penalise(logits, seen, penalty), config)
        expected = torch.softmax(theirs, -1)
        torch.testing.assert_close(ours.float(), expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(ours > 0, expected > 0)


@pytest.mark.parametrize("temperature", [1e-42, 1e-50, 1e-300])
@pytest.mark.parametrize("top_p", [None, 0.9])
def test_a_tiny_temperature_is_greedy_and_not_nan(temperature: float, top_p: float | None) -> None:
    logits = torch.randn(3, V)
    found = probabilities(logits, SamplingConfig(temperature=temperature, top_p=top_p))
    assert torch.equal(found.argmax(-1), logits.argmax(-1))
    assert found.max(-1).values.tolist() == [1, 1, 1]


def test_draws_follow_the_distribution() -> None:
    config = SamplingConfig(temperature=1.3, top_k=8, top_p=0.9)
    logits = torch.randn(1, V, dtype=torch.float64)
    count = 4000
    sampler = Sampler(config, [[0]] * count, range(count), V, CPU)
    many = logits.expand(count, V)
    expected = directly(logits[0].numpy(), config)
    # the first two draws, over seeds; and 300 draws, over steps, which pass a chunk's border
    drawn = [
        *(sampler(many) for _ in range(2)),
        torch.cat([sampler(many[:])[:20] for _ in range(300)]),
    ]
    for tokens in drawn:
        counts = np.bincount(tokens.numpy(), minlength=V)
        possible = expected > 0
        assert counts[~possible].sum() == 0
        test = stats.chisquare(counts[possible], expected[possible] * counts.sum())
        assert test.pvalue > 1e-4


def test_draw_never_returns_an_impossible_token() -> None:
    p = torch.tensor([[0.0, 0.5, 0.0, 0.0, 0.25, 0.25, 0.0]], dtype=torch.float64)
    for uniform, place in ((0.0, 1), (0.5, 4), (0.75, 5), (1 - 2**-40, 5), (0.4999, 1)):
        assert draw(p, torch.tensor([uniform], dtype=torch.float64)).item() == place
    third = torch.full((1, 3), 1 / 3, dtype=torch.float64) * 1.0000001
    assert draw(third, torch.tensor([1 - 2**-40], dtype=torch.float64)).item() == 2


def test_a_row_draws_the_same_alone_and_after_others_have_ended() -> None:
    config = SamplingConfig(seed=0, repetition_penalty=1.2)
    seeds, steps = [5, 6, 7], 600
    logits = torch.randn(steps, V)
    together = Sampler(config, [[1], [2], [3]], seeds, V, CPU)
    alone = Sampler(config, [[2]], [6], V, CPU)
    for step, row in enumerate(logits):
        if step == 300:
            together.keep([1])
        count = 3 if step < 300 else 1
        found = together(row.expand(count, V))
        assert found[1 if count == 3 else 0] == alone(row[None])[0]


def test_repeated_tokens_are_penalised_once_each_and_only_where_they_occurred() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.0]])
    seen = torch.tensor([[True, True, False, True]])
    assert penalise(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0, 0.0]]
    sampler = Sampler(SamplingConfig(temperature=0, repetition_penalty=3.0), [[0]], [0], 4, CPU)
    drawn = [int(sampler(logits)) for _ in range(3)]
    assert drawn == [2, 0, 0]  # 2/3 against 1, then against 1/3


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("temperature", math.nan, "temperature=nan must be a number of at least 0"),
        ("temperature", -1, "temperature=-1 must be a number of at least 0"),
        ("temperature", math.inf, "temperature=inf must be"),
        ("top_k", 0, "top_k=0 must be a whole number of at least 1"),
        ("top_p", 0.0, "top_p=0.0 must be a number above 0, up to 1"),
        ("top_p", 1.5, "top_p=1.5 must be"),
        ("top_p", math.nan, "top_p=nan must be"),
        ("repetition_penalty", 0, "repetition_penalty=0 must be a number above 0"),
        ("max_new_tokens", 0, "max_new_tokens=0 must be"),
        ("max_new_tokens", 1.5, "max_new_tokens=1.5 must be"),
        ("seed", -1, "seed=-1 must be"),
        ("seed", 2**62, "must be below 2"),
        ("stop", ("a", ""), "stop='' would end every text"),
        ("stop", "a", "stop='a' must be a tuple"),
    ],
)
def test_what_cannot_work_is_one_line(field: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        SamplingConfig(**{field: value})
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(temperature: float) -> None:
    sampler = Sampler(SamplingConfig(temperature=temperature), [[0]], [0], 3, CPU)
    for bad in (math.nan, math.inf):
        with pytest.raises(DivergedError, match="not finite"):
            sampler(torch.tensor([[0.0, bad, 1.0]]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_penalty_that_overflows_is_not_said_to_be_the_models_fault(temperature: float) -> None:
    config = SamplingConfig(temperature=temperature, repetition_penalty=1e-50)
    with pytest.raises(ConfigError, match=r"repetition_penalty=1e-50 .* use one nearer to 1"):
        Sampler(config, [[1]], [0], 3, CPU)(torch.tensor([[0.0, 2.0, 1.0]]))
