"""Rank correlations: the coefficient, its p-value, and what counts as independent."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import spearmanr

from polyak.statistics.correlation import holm, permutation_p, rank_correlation, spearman


@pytest.mark.parametrize("ties", [False, True])
def test_rho_is_scipys(ties: bool) -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        x, y = draw.normal(size=9), draw.normal(size=9)
        if ties:
            x, y = np.round(x), np.round(y)
        assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


def test_a_constant_has_no_rank_correlation() -> None:
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    found = rank_correlation({"a": [1], "b": [1], "c": [1]}, {"a": [1], "b": [2], "c": [3]})
    assert (found.rho, found.p, found.models) == (None, None, 3)


def test_small_samples_count_every_pairing() -> None:
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0]
    assert permutation_p(x, y) == pytest.approx(2 / 120)
    y = [2.0, 1.0, 3.0, 5.0, 4.0]
    observed = abs(spearmanr(x, y).statistic)
    every = [abs(spearmanr(x, list(order)).statistic) for order in itertools.permutations(y)]
    assert permutation_p(x, y) == pytest.approx(np.mean(np.array(every) >= observed - 1e-12))


def test_random_pairings_agree_with_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = [1, 2, 3, 4, 5, 6, 7], [2, 1, 4, 3, 7, 5, 6]
    exact = permutation_p(x, y)
    monkeypatch.setattr("polyak.statistics.correlation.EXACT", 3)
    assert permutation_p(x, y, seed=1) == pytest.approx(exact, rel=0.15)
    assert permutation_p(x, y, seed=1) == permutation_p(x, y, seed=1)


def test_false_findings_stay_at_their_rate() -> None:
    draw = np.random.default_rng(3)
    small = [permutation_p(draw.normal(size=6), draw.normal(size=6)) <= 0.05 for _ in range(400)]
    assert 0.01 <= np.mean(small) <= 0.085


def test_seeds_of_one_entry_count_as_one_model() -> None:
    loss = {"a": [1.0, 1.1], "b": [2.0, 2.2], "c": [3.0, 3.1]}
    sharp = {"a": [10.0, 12.0], "b": [20.0, 19.0], "c": [30.0, 33.0]}
    found = rank_correlation(loss, sharp)
    assert (found.models, found.runs, found.exact) == (3, 6, True)
    assert found.rho == pytest.approx(1.0)
    assert found.p == pytest.approx(2 / 6)
    assert found.rho_runs is not None
    assert found.rho_runs < 1


def test_runs_without_a_value_are_left_out_in_pairs() -> None:
    loss = {"a": [1.0, None], "b": [2.0, 2.5], "c": [3.0, 3.5]}
    other = {"a": [5.0, 9.0], "b": [float("nan"), 6.0], "c": [7.0, 8.0]}
    found = rank_correlation(loss, other)
    assert (found.models, found.runs) == (3, 4)
    assert rank_correlation({"a": [1.0], "b": [2.0]}, {"a": [1.0], "b": [2.0]}).rho is None


def test_holm_by_hand() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
