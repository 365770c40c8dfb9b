"""Effects of a grid: closed forms, what two-cell grids have in common with pairs, and coverage."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from polyak.statistics.factorial import analysis_of_variance, contrasts, intervals, sets_of
from polyak.statistics.paired import differences


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def weights(shape: tuple[int, ...], order: int | None = None) -> np.ndarray:
    return np.array([contrast.weights for contrast in contrasts(shape, order)])


def test_a_two_by_two_grid_has_the_effects_of_the_textbook() -> None:
    a, b, c, d = 1.0, 1.5, 3.0, 7.0  # (0,0), (0,1), (1,0), (1,1)
    found = intervals(np.array([[a], [b], [c], [d]]), weights((2, 2))).mean
    assert found == pytest.approx([(c + d - a - b) / 2, (b + d - a - c) / 2, d - c - b + a])


@pytest.mark.parametrize("shape", [(2,), (3,), (2, 3), (3, 2, 2), (2, 2, 2, 3)])
def test_effects_of_an_additive_table_are_its_parts_and_interactions_are_zero(
    shape: tuple[int, ...],
) -> None:
    parts = [drawn(place, count) for place, count in enumerate(shape)]
    cells = np.array([sum(values) for values in itertools.product(*parts)])
    seeds = drawn(9, 4)  # what seeds share changes nothing
    found = intervals(cells[:, None] + seeds, weights(shape))
    for contrast, mean in zip(contrasts(shape), found.mean, strict=True):
        if len(contrast.factors) == 1:
            (factor,), (level,) = contrast.factors, contrast.levels
            assert mean == pytest.approx(parts[factor][level] - parts[factor][0])
        else:
            assert mean == pytest.approx(0, abs=1e-12)
        assert contrast.weights.sum() == pytest.approx(0, abs=1e-12)
    assert found.noise_sd == pytest.approx(np.zeros(len(found.mean)), abs=1e-7)


def test_the_number_of_contrasts_is_that_of_degrees_of_freedom() -> None:
    shape = (4, 3, 2)
    assert len(contrasts(shape)) == 4 * 3 * 2 - 1
    assert len(contrasts(shape, 1)) == 3 + 2 + 1
    assert len(contrasts(shape, 2)) == 6 + 6 + 3 + 2
    assert sets_of(3, 2) == [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]
    assert np.linalg.matrix_rank(weights(shape)) == 23


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_two_cells_are_a_pair(seeds: int) -> None:
    losses = drawn(seeds, 2, seeds) + 3 * drawn(5, seeds)
    pair, grid = differences(losses), intervals(losses, weights((2,)))
    assert grid.mean[0] == pytest.approx(pair.mean[1])
    assert grid.half_width[0] == pytest.approx(pair.half_width[1])
    assert grid.noise_sd[0] == pytest.approx(pair.noise_sd[1])


def test_levels_of_one_factor_have_at_least_dunnetts_intervals() -> None:
    losses = drawn(1, 4, 6)
    control, grid = differences(losses), intervals(losses, weights((4,)))
    assert grid.mean == pytest.approx(control.mean[1:])
    assert grid.critical_paired is not None
    assert control.critical_paired is not None
    assert control.critical_paired < grid.critical_paired < 1.03 * control.critical_paired


@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (2, 3, 2)])
def test_sums_of_squares_add_up_and_are_those_of_least_squares(shape: tuple[int, ...]) -> None:
    cells, seeds = int(np.prod(shape)), 3
    y = drawn(2, cells, seeds)
    terms = analysis_of_variance(y, shape)
    between = seeds * ((y.mean(1) - y.mean()) ** 2).sum()
    assert sum(term.squares for term in terms) == pytest.approx(between)
    assert sum(term.df for term in terms) == cells - 1
    assert sum(term.share for term in terms) == pytest.approx(1)
    for term in terms:  # what regression on its own columns explains
        rows = _rows_of(shape, term.factors)
        explained = np.linalg.pinv(rows) @ rows @ y.mean(1)
        assert term.squares == pytest.approx(seeds * (explained**2).sum())


def _rows_of(shape: tuple[int, ...], chosen: tuple[int, ...]) -> np.ndarray:
    """Rows that span a term: Kronecker products of centred indicators and of means."""
    made = np.ones((1, 1))
    for factor, count in enumerate(shape):
        part = np.eye(count) - 1 / count if factor in chosen else np.full((1, count), 1 / count)
        made = np.kron(made, part)
    return made


def test_the_test_of_one_factor_is_that_of_randomised_blocks() -> None:
    y = drawn(3, 3, 5)
    (term,) = analysis_of_variance(y, (3,))
    centred = y - y.mean(0) - y.mean(1, keepdims=True) + y.mean()
    f = 5 * y.mean(1).var(ddof=1) / ((centred**2).sum() / 8)
    assert term.f == pytest.approx(f)
    assert term.p == pytest.approx(stats.f.sf(f, 2, 8))


def test_one_seed_has_estimates_only() -> None:
    found = intervals(drawn(0, 4, 1), weights((2, 2)))
    assert np.isfinite(found.mean).all()
    assert np.isnan(found.half_width).all()
    assert [term.p for term in analysis_of_variance(drawn(0, 4, 1), (2, 2))] == [None] * 3


@pytest.mark.parametrize("shape", [(2, 2), (3, 2, 2)])
@pytest.mark.parametrize("shared", [0.0, 2.0])
def test_all_intervals_of_a_grid_hold_together(shape: tuple[int, ...], shared: float) -> None:
    tables, seeds = 4000, 3
    cells = int(np.prod(shape))
    truth = drawn(7, cells, 1)
    losses = truth + drawn(8, tables, cells, seeds) + shared * drawn(6, tables, 1, seeds)
    w = weights(shape)
    found = intervals(losses, w)
    off = np.abs(found.mean - (w @ truth)[:, 0]) > found.half_width
    covered = 1 - off.any(-1).mean()
    assert covered > 0.945  # 0.95 less 1.5 standard errors of 4,000 tables
    assert covered < 0.999  # and no wider than that needs
