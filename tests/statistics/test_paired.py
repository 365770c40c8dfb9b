from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from polyak.statistics.dunnett import critical_value, critical_values
from polyak.statistics.paired import differences, seeds_needed, separated, summary


# Dunnett (1964), two-sided 5%, correlation 1/2
@pytest.mark.parametrize(
    ("comparisons", "df", "published"),
    [(1, 10, 2.23), (2, 10, 2.57), (3, 10, 2.76), (2, 5, 3.03), (6, 20, 2.80), (7, 20, 2.86)],
)
def test_dunnett_critical_values_match_the_published_table(
    comparisons: int, df: int, published: float
) -> None:
    assert critical_value("control", comparisons + 1, df) == pytest.approx(published, abs=0.0055)


@pytest.mark.parametrize(("comparisons", "df"), [(2, 4), (7, 14)])
def test_dunnett_critical_values_agree_with_the_multivariate_t(comparisons: int, df: int) -> None:
    c = critical_value("control", comparisons + 1, df)
    joint = stats.multivariate_t(
        shape=0.5 + 0.5 * np.eye(comparisons), df=df, allow_singular=True, seed=0
    )
    inside = joint.cdf(
        np.full(comparisons, c), lower_limit=np.full(comparisons, -c), maxpts=200_000
    )
    assert inside == pytest.approx(0.95, abs=1e-3)


@pytest.mark.parametrize("df", [1, 2, 4, 30])
def test_for_one_comparison_dunnett_and_tukey_are_student(df: int) -> None:
    t = stats.t.ppf(0.975, df)
    assert critical_value("control", 2, df) == pytest.approx(t, rel=2e-5)
    assert critical_value("pairs", 2, df) == pytest.approx(t, rel=2e-5)


@pytest.mark.parametrize(("groups", "df"), [(3, 4), (8, 14)])
def test_all_pairs_critical_values_are_tukeys(groups: int, df: int) -> None:
    published = stats.studentized_range.ppf(0.95, groups, df) / np.sqrt(2)
    assert critical_value("pairs", groups, df) == pytest.approx(published, rel=1e-5)


def test_the_shorter_of_both_routes_covers_95_percent_and_the_paired_route_96() -> None:
    paired, unpaired = critical_values("control", 2, 2, 2)
    assert paired == pytest.approx(stats.t.ppf(0.98, 2), rel=2e-5)
    rng = np.random.default_rng(5)
    n = 400_000
    z, a, b = rng.standard_normal(n), rng.chisquare(2, n), rng.chisquare(2, n)
    reach = np.minimum(paired * np.sqrt(a / 2), unpaired * np.sqrt((a + b) / 4))
    assert np.mean(np.abs(z) < reach) == pytest.approx(0.95, abs=0.0015)


def test_with_shared_seed_effects_one_comparison_is_a_paired_t_interval() -> None:
    rng = np.random.default_rng(0)
    losses = rng.normal(size=(2, 4)) + 100 * rng.normal(size=4)
    gap = losses[1] - losses[0]
    found = differences(losses)
    expected = stats.t.ppf(0.98, 3) * gap.std(ddof=1) / 2
    assert found.mean[1] == pytest.approx(gap.mean())
    assert found.half_width[1] == pytest.approx(expected, rel=1e-4)
    assert stats.ttest_rel(losses[1], losses[0]).confidence_interval(0.96).high == pytest.approx(
        gap.mean() + expected
    )


def test_noise_is_the_residual_of_entry_and_seed_effects() -> None:
    rng = np.random.default_rng(1)
    losses = rng.normal(size=(5, 6)) + 50 * rng.normal(size=6)
    centred = losses - losses.mean(0) - losses.mean(1, keepdims=True) + losses.mean()
    found = differences(losses)
    assert (found.df_paired, found.df_unpaired, found.comparisons) == (20, 25, 4)
    # never below the pooled value, and equal to it unless a pair shows more
    assert (found.noise_sd[1:] >= np.sqrt((centred**2).sum() / 20) * (1 - 1e-9)).all()


def test_a_noisy_rule_widens_its_own_interval_most() -> None:
    rng = np.random.default_rng(2)
    losses = rng.normal(size=(8, 5)) * np.array([1, 1, 6, 1, 1, 1, 1, 1])[:, None]
    half = differences(losses).half_width[1:]
    assert half.argmax() == 1
    assert half[1] > 1.3 * np.delete(half, 1).max()


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(2, 5),
    seeds=st.integers(2, 5),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-100, 100),
    seed=st.integers(0, 1000),
)
def test_intervals_scale_with_the_losses_and_ignore_their_level_and_the_order_of_seeds(
    groups: int, seeds: int, scale: float, shift: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    losses = rng.normal(size=(groups, seeds))
    one = differences(losses)
    other = differences(scale * losses[:, rng.permutation(seeds)] + shift)
    np.testing.assert_allclose(other.mean, scale * one.mean, atol=1e-9 * (scale + abs(shift)))
    np.testing.assert_allclose(
        other.half_width, scale * one.half_width, rtol=1e-6, atol=1e-9 * (scale + abs(shift))
    )


def test_one_seed_gives_differences_without_intervals() -> None:
    found = differences([[1.5], [1.4], [1.3]])
    np.testing.assert_allclose(found.mean[1:], [-0.1, -0.2])
    assert np.isnan(found.half_width).all()
    assert found.comparisons == 0


def test_a_missing_run_leaves_the_seeds_that_both_have() -> None:
    nan = np.nan
    losses = np.array([[1.50, 1.51, 1.49], [1.40, nan, 1.41], [nan, nan, 1.3], [nan, nan, nan]])
    found = differences(losses)
    np.testing.assert_allclose(found.mean[1:3], [(-0.10 - 0.08) / 2, -0.19])
    assert found.seeds.tolist() == [3, 2, 1, 0]
    assert np.isfinite(found.half_width[1])
    assert np.isnan(found.half_width[[0, 2, 3]]).all()
    assert np.isnan(found.mean[3])
    assert found.comparisons == 1


def test_a_baseline_without_runs_compares_nothing() -> None:
    found = differences([[np.nan, np.nan], [1.0, 1.1]])
    assert np.isnan(found.mean).all()
    assert found.comparisons == 0


def test_tables_of_one_batch_must_miss_the_same_cells() -> None:
    losses = np.ones((2, 2, 3))
    losses[1, 0, 0] = np.nan
    with pytest.raises(ValueError, match="same cells"):
        differences(losses)


def test_a_batch_gives_what_its_tables_give_alone() -> None:
    losses = np.random.default_rng(3).normal(size=(4, 3, 3))
    losses[:, 2, 1] = np.nan
    batch = differences(losses)
    for i in range(4):
        alone = differences(losses[i])
        np.testing.assert_allclose(batch.mean[i], alone.mean)
        np.testing.assert_allclose(batch.half_width[i], alone.half_width)


def test_separation_is_antisymmetric_and_finds_what_is_far_apart() -> None:
    rng = np.random.default_rng(4)
    losses = rng.normal(size=(4, 3)) * 0.01 + np.array([0, 1, 1, 2])[:, None]
    below = separated(losses)
    assert below[0, 1]
    assert below[0, 3]
    assert below[1, 3]
    assert not below[1, 2]
    assert not (below & below.T).any()


def test_seeds_needed_is_the_first_count_with_80_percent_power() -> None:
    rng = np.random.default_rng(6)
    difference, sd = 0.8, 1.0
    n = seeds_needed(difference, sd, comparisons=1)
    assert n is not None

    def power(seeds: int) -> float:
        gap = difference + rng.normal(size=(100_000, seeds, 2)) @ [1.0, -1.0]
        return float(np.mean(stats.ttest_1samp(gap, 0, axis=1).pvalue < 0.05))

    assert power(n) > 0.795
    assert power(n - 1) < 0.805


def test_seeds_needed_grows_with_noise_and_comparisons_and_gives_up() -> None:
    counts = [seeds_needed(0.01, sd, 1) for sd in (0.002, 0.01, 0.05)]
    assert counts == sorted(counts)  # type: ignore[type-var]
    assert seeds_needed(0.01, 0.01, 7) > seeds_needed(0.01, 0.01, 1)  # type: ignore[operator]
    assert seeds_needed(1e-6, 0.01, 1) is None


def test_summary_of_one_value_has_no_standard_deviation() -> None:
    one, two = summary([1.5]), summary([1.0, 2.0])
    assert one is not None
    assert (one.mean, one.sd, one.n) == (1.5, None, 1)
    assert two is not None
    assert two.sd == pytest.approx(np.sqrt(0.5))
    assert summary([]) is None
