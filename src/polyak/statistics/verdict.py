"""From the runs of a study to a sentence that claims no more than the intervals allow.

`complete` is the one call a runner needs: it fills in every number of `results.json` that follows
from the finished runs' curves. Nothing here trains, reads files or imports torch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polyak.statistics.dunnett import LEVEL, Array
from polyak.statistics.paired import (
    POWER,
    Differences,
    as_dict,
    differences,
    seeds_needed,
    separated,
    summary,
)
from polyak.words import fixed, listed, plural, shown

BUDGETS = {
    "tokens": "at equal tokens",
    "flops": "at equal FLOPs",
    "seconds": "at equal training time",
    "params": "at equal parameters",
}

NAMED = 7
"""So many names of a group stand in the sentence; tables have all."""


def complete(results: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `results` with losses, differences and the verdict filled in from its runs.

    Fills `loss`, `bits_per_byte` and `difference` of every entry, `statistics` (how the intervals
    were made) and `verdict`; leaves everything else alone. Safe on partial studies: entries
    without a finished run get None. A run's loss is the last point of its curve, not the best.
    """
    filled = copy.deepcopy(dict(results))
    names = [entry["name"] for entry in filled["entries"]]
    table, seeds = loss_table(filled)
    baseline = names.index(filled["baseline"])
    compared = differences(table, baseline) if seeds else None
    factor = bits_per_byte_factor(filled.get("corpus") or {})
    for row, entry in enumerate(filled["entries"]):
        per_seed = {
            str(s): float(x) for s, x in zip(seeds, table[row], strict=True) if np.isfinite(x)
        }
        entry["loss"] = _per_seed(per_seed)
        entry["bits_per_byte"] = (
            _per_seed({s: x * factor for s, x in per_seed.items()}) if factor else None
        )
        entry["difference"] = None if compared is None else difference_row(compared, row)
    filled["statistics"] = _statistics(compared)
    filled["verdict"] = verdict(filled, table, seeds)
    return filled


def loss_table(results: Mapping[str, Any]) -> tuple[Array, list[int]]:
    """(entries, seeds) final losses, NaN where there is none, and the seeds in order."""
    names = [entry["name"] for entry in results["entries"]]
    seeds = sorted({int(run["seed"]) for run in results["runs"]})
    table = np.full((len(names), len(seeds)), np.nan)
    for run in results["runs"]:
        loss = final_loss(run)
        if loss is not None:
            table[names.index(run["entry"]), seeds.index(int(run["seed"]))] = loss
    return table, seeds


def final_loss(run: Mapping[str, Any]) -> float | None:
    """The last validation loss of a finished run; None for any other run."""
    losses = (run.get("curve") or {}).get("loss") or []
    if run["status"] != "finished" or not losses:
        return None
    last = losses[-1]
    return float(last) if last is not None and math.isfinite(last) else None


def bits_per_byte_factor(corpus: Mapping[str, Any]) -> float | None:
    """What turns mean nats/token into bits/byte: tokens / (ln 2 * bytes) of the validation set."""
    tokens, size = corpus.get("validation_tokens"), corpus.get("validation_bytes")
    return float(tokens) / (math.log(2) * float(size)) if tokens and size else None


def _per_seed(values: dict[str, float]) -> dict[str, Any] | None:
    filled = as_dict(summary(values.values()))
    return None if filled is None else {**filled, "per_seed": values}


def difference_row(compared: Differences, row: int) -> dict[str, Any] | None:
    """One entry's difference as results.json holds it; None for the baseline itself."""
    mean, half, noise = (
        float(x[row]) for x in (compared.mean, compared.half_width, compared.noise_sd)
    )
    if math.isnan(mean):
        return None
    n = int(compared.seeds[row])
    if math.isnan(half):
        unknown = dict.fromkeys(("low", "high", "n", "verdict", "seeds_needed"))
        return {"mean": mean, **unknown, "n": n}
    found = "better" if mean < -half else "worse" if mean > half else "unresolved"
    needed = seeds_needed(mean, noise, compared.comparisons) if found == "unresolved" else None
    return {
        "mean": mean,
        "low": mean - half,
        "high": mean + half,
        "n": n,
        "verdict": found,
        # observed power is below one half when the interval contains zero, so more is needed
        "seeds_needed": None if needed is None else max(needed, n + 1),
    }


def _statistics(compared: Differences | None) -> dict[str, Any] | None:
    if compared is None or not compared.comparisons:
        return None
    return {
        "method": "paired differences; simultaneous intervals (Dunnett), the shorter of the paired "
        "and the unpaired route, calibrated together; noise pooled over entries, never below what "
        "a rule's own pairs show",
        "level": LEVEL,
        "comparisons": compared.comparisons,
        "df_paired": compared.df_paired,
        "df_unpaired": compared.df_unpaired,
        "critical_paired": compared.critical_paired,
        "critical_unpaired": compared.critical_unpaired,
        "power_of_seeds_needed": POWER,
    }


def verdict(results: Mapping[str, Any], table: Array, seeds: Sequence[int]) -> dict[str, Any]:
    """`{"sentence": ..., "details": [...]}` from entries whose differences are filled in."""
    baseline = results["baseline"]
    others = [entry for entry in results["entries"] if entry["name"] != baseline]
    compared = [entry for entry in others if entry["difference"]]
    details = _absences(results)
    names = [entry["name"] for entry in results["entries"]]
    runs = np.isfinite(table[names.index(baseline)]).sum() if seeds else 0
    if not compared:
        if not runs:
            sentence = f"Nothing can be compared yet: {baseline} has no finished run."
        elif not others:
            sentence = f"Only {baseline} was trained, so there is nothing to compare."
        else:
            sentence = "Nothing can be compared yet: no rule shares a seed with the baseline."
        return {"sentence": sentence, "details": details}

    with_interval = [entry for entry in compared if entry["difference"]["low"] is not None]
    so_far = "So far, over" if results.get("status") == "partial" else "Over"
    budget = BUDGETS.get((results.get("settings") or {}).get("match", ""), "")
    counts = sorted({entry["difference"]["n"] for entry in with_interval})
    if not with_interval:
        sentence = _without_interval(compared, baseline)
    else:
        over = f"{counts[0]} to {plural(counts[-1], 'seed')}" if len(counts) > 1 else ""
        over = f"{so_far} {over or plural(counts[0], 'seed')}{' and ' + budget if budget else ''}"
        one = len(others) == 1
        sentence = f"{over}, " + (
            _single(with_interval[0], baseline) if one else _several(with_interval, baseline)
        )
        if not one:
            details = [_among_better(results, table), *details]
            details += [_unresolved(entry) for entry in with_interval]
    failed = sum(run["status"] == "failed" for run in results["runs"])
    if failed:
        sentence = f"{sentence[:-1]}; {failed} of {plural(len(results['runs']), 'run')} failed."
    return {"sentence": sentence, "details": [line for line in details if line]}


def _without_interval(compared: Sequence[Mapping[str, Any]], baseline: str) -> str:
    parts = []
    for entry in compared:
        mean = entry["difference"]["mean"]
        side = "below" if mean < 0 else "above"
        parts.append(f"{entry['name']} {fixed(abs(mean), shown(entry['difference']))} {side}")
    return (
        f"One seed cannot tell a difference from noise: that run ended with {listed(parts)} "
        f"{baseline} in nats/token, and at least 3 seeds are needed for an interval worth having."
    )


def _interval(difference: Mapping[str, Any], sign: float = 1.0) -> str:
    places = shown(difference)
    low, high = sorted((sign * difference["low"], sign * difference["high"]))
    return f"{fixed(low, places)} to {fixed(high, places)}"


def _single(entry: Mapping[str, Any], baseline: str) -> str:
    gap = entry["difference"]
    size = fixed(abs(gap["mean"]), shown(gap))
    if gap["verdict"] == "unresolved":
        return (
            f"no difference between {entry['name']} and {baseline} can be told apart from noise "
            f"({fixed(gap['mean'], shown(gap))} nats/token, 95% interval {_interval(gap)}); "
            f"{_needs(gap)}."
        )
    sign, side = (-1.0, "below") if gap["verdict"] == "better" else (1.0, "above")
    return (
        f"{entry['name']} ends {size} nats/token {side} {baseline} "
        f"(95% interval {_interval(gap, sign)})."
    )


def _needs(gap: Mapping[str, Any]) -> str:
    size = fixed(abs(gap["mean"]), shown(gap))
    if gap["seeds_needed"] is None:
        return "more than 1000 seeds would be needed to resolve a difference as small as this"
    return (
        f"about {plural(gap['seeds_needed'], 'seed')} would be needed to resolve a difference of "
        f"{size}"
    )


def _several(entries: Sequence[Mapping[str, Any]], baseline: str) -> str:
    groups: dict[str, list[str]] = {"better": [], "worse": [], "unresolved": []}
    for entry in sorted(entries, key=lambda e: float(e["difference"]["mean"])):
        groups[entry["difference"]["verdict"]].append(entry["name"])
    parts = []
    if groups["better"]:
        verb = "ends" if len(groups["better"]) == 1 else "end"
        parts.append(f"{_some(groups['better'])} {verb} below {baseline}")
    if groups["worse"]:
        verb = "ends" if len(groups["worse"]) == 1 else "end"
        object_ = "it" if parts else baseline
        parts.append(f"{_some(groups['worse'])} {verb} above {object_}")
    if groups["unresolved"]:
        object_ = "it" if parts else baseline
        parts.append(f"{_some(groups['unresolved'])} cannot be told apart from {object_}")
    return f"{'; '.join(parts)} (simultaneous 95% intervals)."


def _some(names: Sequence[str]) -> str:
    """All of a few names; of many the first, and how many more there are."""
    if len(names) <= NAMED:
        return listed(names)
    first = names[: NAMED - 2]
    return f"{', '.join(first)} and {len(names) - len(first)} others"


def _among_better(results: Mapping[str, Any], table: Array) -> str:
    """Which of several better entries is separated from all the other better ones, if any."""
    names = [entry["name"] for entry in results["entries"]]
    better = [
        row
        for row, entry in enumerate(results["entries"])
        if entry["difference"] and entry["difference"]["verdict"] == "better"
    ]
    if len(better) < 2:
        return ""
    below = separated(table)
    for row in better:
        if all(below[row, other] for other in better if other != row):
            return (
                f"{names[row]} also ends below every other rule that beats {results['baseline']} "
                "(95% intervals over all pairs)."
            )
    return (
        f"Among the {len(better)} rules below {results['baseline']} none is separated from all the "
        "others (95% intervals over all pairs), so none is named the best."
    )


def _unresolved(entry: Mapping[str, Any]) -> str:
    gap = entry["difference"]
    if gap["verdict"] != "unresolved":
        return ""
    return f"{entry['name']}: {fixed(gap['mean'], shown(gap))} ({_interval(gap)}); {_needs(gap)}."


def _absences(results: Mapping[str, Any]) -> list[str]:
    """Runs that failed and entries that stand on fewer seeds than were asked for."""
    lines = [
        f"{run['entry']}, seed {run['seed']}, failed: {run.get('error') or 'no reason recorded'}"
        for run in results["runs"]
        if run["status"] == "failed"
    ]
    unfinished = sum(
        run["status"] in ("pending", "running", "interrupted") for run in results["runs"]
    )
    if unfinished:
        lines.append(f"{unfinished} of {plural(len(results['runs']), 'run')} not finished.")
    for entry in results["entries"]:
        runs = [run for run in results["runs"] if run["entry"] == entry["name"]]
        failed = sum(run["status"] == "failed" for run in runs)
        if failed and entry["loss"]:
            lines.append(
                f"{entry['name']} stands on its {plural(entry['loss']['n'], 'finished run')} of "
                f"{len(runs)}; a rule that sometimes fails is judged here only by the runs in "
                "which it did not."
            )
        elif failed:
            lines.append(f"{entry['name']} has no finished run and is not compared.")
    return lines
