"""What a landscape study found: every property of every run, differences, and correlations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyak.errors import unknown
from polyak.statistics.correlation import holm, rank_correlation
from polyak.statistics.paired import as_dict, differences, summary
from polyak.statistics.verdict import difference_row
from polyak.words import fixed, listed, plural

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Property:
    """A number that a study knows of every run.

    Attributes:
        key: its name in results.json.
        label: for tables and axes.
        part: the measurement it comes from.
        path: where it stands in what that part found.
        about: one line for the page.
        places: decimals, or None for three significant digits.
    """

    key: str
    label: str
    part: str
    path: tuple[str, ...]
    about: str
    places: int | None = None

    def of(self, run: Run) -> float | None:
        """The run's value; None where it was not measured, or is a bound only."""
        found: Any = run["measured"].get(self.part)
        for name in self.path:
            if not isinstance(found, Mapping) or name not in found:
                return None
            found = found[name]
        number = isinstance(found, int | float) and not isinstance(found, bool)
        return float(found) if number and math.isfinite(found) else None


def put_first(results: dict[str, Any], baseline: str | None) -> None:
    """Make a kind of model the baseline, and the first of the entries.

    Raises:
        UnknownNameError: no kind has that name; the nearest is offered.
    """
    entries = results["entries"]
    names = [entry["name"] for entry in entries]
    if baseline is None:
        plain = [entry["name"] for entry in entries if entry["rule"] == "gradient_descent"]
        baseline = (plain or names)[0]
    if baseline not in names:
        raise unknown("baseline", baseline, names)
    results["baseline"] = baseline
    entries.sort(key=lambda entry: entry["name"] != baseline)  # stable: the others stay in order


def complete(results: Mapping[str, Any], properties: Sequence[Property]) -> dict[str, Any]:
    """`results` with `values` in every run, `summaries` and `correlations`.

    Differences are paired by seed, with 95% intervals that hold together over the entries of one
    property (`polyak.statistics.paired`), not over the properties.
    """
    filled = {**results, "runs": [{**run, "values": {}} for run in results["runs"]]}
    present = []
    for wanted in properties:
        for run in filled["runs"]:
            run["values"][wanted.key] = wanted.of(run)
        if any(run["values"][wanted.key] is not None for run in filled["runs"]):
            present.append(wanted)
    filled["properties"] = [dataclasses.asdict(wanted) for wanted in present]
    filled["summaries"] = {wanted.key: _summaries(filled, wanted.key) for wanted in present}
    filled["correlations"] = _correlations(filled, [wanted.key for wanted in present])
    return filled


def value_of(estimate: Mapping[str, Any] | None) -> float | None:
    """An estimate's value; None where it is a bound."""
    known = estimate is not None and estimate.get("kind") == "value"
    return estimate["value"] if known and estimate is not None else None


def table_of(results: Mapping[str, Any], key: str) -> tuple[np.ndarray, list[int]]:
    """(entries, seeds) values of a property, NaN where there is none, and the seeds in order."""
    names = [entry["name"] for entry in results["entries"]]
    seeds = sorted({int(run["seed"]) for run in results["runs"]})
    table = np.full((len(names), len(seeds)), np.nan)
    for run in results["runs"]:
        value = run["values"][key]
        if value is not None:
            table[names.index(run["entry"]), seeds.index(int(run["seed"]))] = value
    return table, seeds


def _summaries(results: Mapping[str, Any], key: str) -> dict[str, Any]:
    """By entry: mean, s.d. and number of seeds, and the difference from the baseline."""
    table, _ = table_of(results, key)
    names = [entry["name"] for entry in results["entries"]]
    baseline = names.index(results["baseline"])
    compared = differences(table, baseline)
    return {
        name: {
            "value": as_dict(summary(table[row][np.isfinite(table[row])])),
            "difference": difference_row(compared, row),
        }
        for row, name in enumerate(names)
    }


def _correlations(results: Mapping[str, Any], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Every pair of properties, Holm-adjusted together."""
    by_entry: dict[str, dict[str, list[float | None]]] = {
        key: {
            entry["name"]: [
                run["values"][key] for run in results["runs"] if run["entry"] == entry["name"]
            ]
            for entry in results["entries"]
        }
        for key in keys
    }
    rows = []
    for place, first in enumerate(keys):
        for second in keys[place + 1 :]:
            found = rank_correlation(by_entry[first], by_entry[second])
            rows.append({"first": first, "second": second, **dataclasses.asdict(found)})
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = adjusted
    return rows


def sentence(results: Mapping[str, Any]) -> str:
    """What the page says first: how many models, and which differences from the baseline hold."""
    entries, runs = results["entries"], results["runs"]
    start = f"{plural(len(runs), 'run')} of {len(entries)} kinds of model on {results['corpus']}."
    if len(entries) == 1:
        return start
    said = []
    for wanted in results["properties"]:
        below, above = _resolved(results, wanted["key"])
        if below or above:
            parts = [f"lower for {listed(below)}"] if below else []
            parts += [f"higher for {listed(above)}"] if above else []
            said.append(f"{wanted['label']} {' and '.join(parts)}")
    if not said:
        return f"{start} No property differs from {results['baseline']}'s by more than the seeds."
    return f"{start} Against {results['baseline']}: {'; '.join(said[:3])}."


def _resolved(results: Mapping[str, Any], key: str) -> tuple[list[str], list[str]]:
    sides: dict[str, list[str]] = {"better": [], "worse": []}
    for name, found in results["summaries"][key].items():
        gap = found["difference"]
        if gap and gap["verdict"] in sides:
            sides[gap["verdict"]].append(name)
    return sides["better"], sides["worse"]


def number(value: float | None, places: int | None = None) -> str:
    """A value as text: fixed decimals, or three significant digits."""
    if value is None:
        return "–"
    if places is not None:
        return fixed(value, places)
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return fixed(value, max(0, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:.2e}".replace("e-0", "e−").replace("e+0", "e").replace("-", "−")
