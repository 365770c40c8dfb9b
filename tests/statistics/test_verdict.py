"""The verdict claims no more than the data allow: checked by simulation and by its words."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from polyak.statistics.paired import differences, separated
from polyak.statistics.verdict import complete, loss_table
from polyak.words import fixed
from tests.made_up_results import fail, made_up

SIMULATIONS = 20_000
ALLOWANCE = 0.005  # more than three Monte-Carlo s.d. at 5%
PAIR = ["gradient_descent", "triple_momentum"]


def noise(groups: int, seeds: int, kind: str, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Tables in which nothing differs but, by kind, the noise of some entries."""
    shape = (SIMULATIONS, groups, seeds)
    values = rng.standard_t(5, shape) if kind == "t5" else rng.standard_normal(shape)
    scale = np.ones((groups, 1))
    if kind == "noisy rule":
        scale[1] = 3
    if kind == "noisy baseline":
        scale[0] = 2
    if kind == "spread":
        scale = np.linspace(0.5, 1.5, groups)[:, None]
    if kind == "seed effects":
        values += 2 * rng.standard_normal((SIMULATIONS, 1, seeds))
    return np.asarray(values * scale)


def false_winners(losses: np.ndarray[Any, Any]) -> float:
    """How often any entry, the baseline included, is said to differ."""
    found = differences(losses)
    return float((np.abs(found.mean) > found.half_width).any(-1).mean())


@pytest.mark.parametrize("groups", [2, 3, 8])
@pytest.mark.parametrize("kind", ["normal", "seed effects", "t5"])
def test_at_most_5_percent_false_winners_when_nothing_differs(groups: int, kind: str) -> None:
    rng = np.random.default_rng(10)
    assert false_winners(noise(groups, 3, kind, rng)) <= 0.05 + ALLOWANCE


@pytest.mark.parametrize("groups", [2, 3, 8])
@pytest.mark.parametrize("kind", ["noisy rule", "noisy baseline", "spread"])
def test_false_winners_stay_near_5_percent_when_entries_differ_in_noise(
    groups: int, kind: str
) -> None:
    rng = np.random.default_rng(11)
    assert false_winners(noise(groups, 3, kind, rng)) <= 0.06 + ALLOWANCE


@pytest.mark.parametrize("seeds", [2, 5])
def test_at_most_5_percent_false_winners_with_other_seed_counts(seeds: int) -> None:
    rng = np.random.default_rng(12)
    assert false_winners(noise(8, seeds, "normal", rng)) <= 0.05 + ALLOWANCE


def test_at_most_5_percent_false_winners_with_missing_runs() -> None:
    losses = noise(8, 3, "normal", np.random.default_rng(13))
    losses[:, 3, 0] = losses[:, 7, 2] = np.nan
    assert false_winners(losses) <= 0.05 + ALLOWANCE


# "5 s.d." read both ways: of one entry's loss over seeds (the demanding one) and of the paired
# difference, which is larger by the square root of two.
@pytest.mark.parametrize("groups", [2, 3, 8])
@pytest.mark.parametrize("difference", [5.0, 5.0 * np.sqrt(2)])
def test_three_seeds_find_a_difference_of_5_standard_deviations(
    groups: int, difference: float
) -> None:
    losses = noise(groups, 3, "normal", np.random.default_rng(14))
    losses[:, 1] -= difference
    found = differences(losses)
    assert (found.mean[:, 1] < -found.half_width[:, 1]).mean() >= 0.90


def test_seed_effects_do_not_hide_a_difference_of_5_standard_deviations_of_the_pair() -> None:
    losses = noise(2, 3, "seed effects", np.random.default_rng(15))
    losses[:, 1] -= 5 * np.sqrt(2)
    found = differences(losses)
    assert (found.mean[:, 1] < -found.half_width[:, 1]).mean() >= 0.90


@pytest.mark.parametrize("equal", [2, 4, 7])
def test_equally_good_rules_almost_never_yield_a_named_best(equal: int) -> None:
    losses = noise(8, 3, "normal", np.random.default_rng(16))
    losses[:, 1 : 1 + equal] -= 20
    found = differences(losses)
    better = found.mean < -found.half_width
    below = separated(losses)
    others = better[:, None, :] & ~np.eye(8, dtype=bool)
    named = better & (below | ~others).all(-1) & (better.sum(-1, keepdims=True) > 1)
    wrong = (np.abs(found.mean[:, 1 + equal :]) > found.half_width[:, 1 + equal :]).any(-1)
    assert (wrong | named[:, 1 : 1 + equal].any(-1)).mean() <= 0.05 + ALLOWANCE


def with_losses(table: list[list[float]], **kwargs: Any) -> dict[str, Any]:
    """Completed results whose runs end at these losses."""
    names = ["gradient_descent", "triple_momentum", "nesterov", "adam"][: len(table)]
    results = made_up(names, len(table[0]), **kwargs)
    for run in results["runs"]:
        run["curve"]["loss"][-1] = table[names.index(run["entry"])][run["seed"]]
    return complete(results)


def test_verdicts_in_results_are_those_of_the_simulated_procedure() -> None:
    for seed in range(5):
        results = complete(made_up(sd=0.012, seed=seed))
        table, _ = loss_table(results)
        found = differences(table)
        for row, entry in enumerate(results["entries"][1:], start=1):
            gap = entry["difference"]
            said = -1 if gap["verdict"] == "better" else gap["verdict"] == "worse"
            assert said == np.sign(found.mean[row]) * (abs(found.mean[row]) > found.half_width[row])
            assert gap["low"] == pytest.approx(found.mean[row] - found.half_width[row])


def test_a_resolved_difference_is_said_with_its_interval() -> None:
    results = with_losses([[1.495, 1.502, 1.492], [1.476, 1.470, 1.462]])
    assert results["verdict"]["sentence"] == (
        "Over 3 seeds and at equal tokens, triple_momentum ends 0.027 nats/token below "
        "gradient_descent (95% interval 0.008 to 0.046)."
    )
    assert results["verdict"]["details"] == []


def test_a_rule_that_ends_above_is_said_to_end_above() -> None:
    results = with_losses([[1.476, 1.470, 1.462], [1.495, 1.502, 1.492]])
    assert (
        "triple_momentum ends 0.027 nats/token above gradient_descent"
        in (results["verdict"]["sentence"])
    )
    assert results["entries"][1]["difference"]["verdict"] == "worse"


def test_an_unresolved_difference_names_the_seeds_it_would_take() -> None:
    results = with_losses([[1.495, 1.502, 1.492], [1.489, 1.503, 1.479]])
    sentence = results["verdict"]["sentence"]
    needed = results["entries"][1]["difference"]["seeds_needed"]
    assert "no difference between triple_momentum and gradient_descent" in sentence
    assert f"about {needed} seeds would be needed to resolve a difference of 0.006" in sentence
    assert needed > 3


def test_one_seed_claims_nothing() -> None:
    results = with_losses([[1.50], [1.40]])
    assert results["verdict"]["sentence"].startswith("One seed cannot tell")
    assert results["entries"][1]["difference"]["verdict"] is None
    assert results["entries"][1]["loss"]["sd"] is None
    assert results["statistics"] is None


def test_several_entries_are_grouped_and_no_best_is_named_among_the_close() -> None:
    base = [1.500, 1.501, 1.499]
    results = with_losses(
        [base, [1.450, 1.451, 1.452], [1.451, 1.450, 1.452], [1.502, 1.500, 1.499]]
    )
    sentence, details = results["verdict"]["sentence"], results["verdict"]["details"]
    assert "triple_momentum and nesterov end below gradient_descent" in sentence
    assert "adam cannot be told apart from it" in sentence
    assert details[0].startswith("Among the 2 rules below gradient_descent none is separated")


def test_a_best_is_named_only_when_separated_from_the_other_better_ones() -> None:
    base = [1.500, 1.501, 1.499]
    results = with_losses(
        [base, [1.350, 1.351, 1.352], [1.451, 1.450, 1.452], [1.602, 1.600, 1.599]]
    )
    assert "adam ends above it" in results["verdict"]["sentence"]
    assert results["verdict"]["details"][0].startswith("triple_momentum also ends below every")


def test_failed_runs_are_said_and_left_out() -> None:
    results = complete(fail(made_up(PAIR), "triple_momentum", 1))
    verdict = results["verdict"]
    assert verdict["sentence"].endswith("; 1 of 6 runs failed.")
    assert any("loss became NaN at step 160" in line for line in verdict["details"])
    assert any("2 finished runs of 3" in line for line in verdict["details"])
    assert results["entries"][1]["loss"]["per_seed"].keys() == {"0", "2"}
    assert results["entries"][1]["difference"]["n"] == 2


def test_a_rule_whose_every_run_failed_has_no_numbers() -> None:
    results = made_up(PAIR)
    for seed in range(3):
        fail(results, "triple_momentum", seed)
    results = complete(results)
    assert results["entries"][1]["loss"] is None
    assert results["entries"][1]["difference"] is None
    assert "Nothing can be compared yet" in results["verdict"]["sentence"]
    assert (
        "triple_momentum has no finished run and is not compared."
        in (results["verdict"]["details"])
    )


@pytest.mark.parametrize("status", ["pending", "running", "interrupted"])
def test_unfinished_runs_count_for_nothing(status: str) -> None:
    results = made_up(PAIR, status="partial")
    results["runs"][-1]["status"] = status
    results = complete(results)
    assert results["entries"][1]["loss"]["n"] == 2
    assert results["verdict"]["sentence"].startswith("So far, over 2 seeds")
    assert "1 of 6 runs not finished." in results["verdict"]["details"]


def test_the_loss_is_the_last_one_not_the_best_and_bits_follow_from_it() -> None:
    results = made_up(PAIR)
    for run in results["runs"]:
        run["curve"]["loss"][-2] = 0.5
    filled = complete(results)
    last = [r["curve"]["loss"][-1] for r in results["runs"] if r["entry"] == PAIR[0]]
    entry = filled["entries"][0]
    assert entry["loss"]["mean"] == pytest.approx(np.mean(last))
    assert entry["loss"]["sd"] == pytest.approx(np.std(last, ddof=1))
    ratio = 262_144 / (np.log(2) * 261_900)
    assert entry["bits_per_byte"]["mean"] == pytest.approx(ratio * np.mean(last))


def test_complete_changes_nothing_it_was_given_and_repeats_itself() -> None:
    results = made_up(PAIR)
    before = copy.deepcopy(results)
    once = complete(results)
    assert results == before
    assert complete(once) == once


def test_numbers_have_true_minus_signs_and_no_negative_zero() -> None:
    assert fixed(-0.0271, 3) == "−0.027"
    assert fixed(-0.0001, 3) == "0.000"
