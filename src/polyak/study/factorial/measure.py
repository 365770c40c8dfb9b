"""`polyak study factorial`: train a grid of options, and take its effects apart.

The cells are the entries of a comparison, in `OUT/comparison`, which is what trains, resumes and
sweeps; here its last losses become effects, interactions and an analysis of variance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from polyak import formats
from polyak.compare.config import CompareConfig
from polyak.compare.plan import Plan
from polyak.compare.pool import Job, Message
from polyak.compare.run import Display, Silent, compare
from polyak.errors import ConfigError
from polyak.report.pages import check_out, save
from polyak.settings import override
from polyak.statistics.dunnett import LEVEL, Array
from polyak.statistics.factorial import Contrast, analysis_of_variance, contrasts, intervals
from polyak.statistics.verdict import final_loss, loss_table
from polyak.study.factorial.grid import Cell, Factor, cells_of, parse_factors
from polyak.study.factorial.page import render, write_tables
from polyak.training.config.run import RunConfig
from polyak.training.machine import heading, now

COMPARISON = "comparison"


def factorial(
    config: CompareConfig,
    factors: str,
    *,
    rule: str = "gradient_descent",
    order: int = 2,
    command: str = "",
    display: Display | None = None,
) -> dict[str, Any]:
    """Train every cell of a grid with every seed, and return the content of results.json.

    What is finished is not run again; results.json, the page and the tables are written whenever a
    run ends.

    Args:
        config: how the cells are trained, and where; `rules` and `quick` are not looked at.
        factors: see `polyak.study.factorial.grid`.
        rule: of all cells, where the rule is no factor.
        order: of how many factors at most interactions get intervals.
        command: the command line that repeats it.
        display: shows progress.

    Raises:
        PolyakError: bad input; or the folder holds other runs or is in use.
    """
    if config.match == "params":
        raise ConfigError(
            "match='params' would change one cell of the grid; choose residual_width or another "
            "field as a factor instead"
        )
    if order < 1:
        raise ConfigError(f"order={order} must be a whole number of at least 1")
    check_out(config.out, "factorial")
    parsed = parse_factors(factors)
    base = override(RunConfig(), config.set).model
    cells = cells_of(parsed, rule, base, config.out / COMPARISON)
    own = {field.name: getattr(config, field.name) for field in fields(CompareConfig)}
    own |= {"rules": ",".join(cell.text for cell in cells), "quick": False}
    given = CompareConfig(**{**own, "out": config.out / COMPARISON})
    created = _created(config.out)

    def write(comparison: Mapping[str, Any]) -> dict[str, Any]:
        found = gather(comparison, parsed, cells, order=order, command=command, created=created)
        save(config.out, found, render)
        write_tables(config.out, found)
        return found

    watched = _Watched(display or Silent(), write)
    return write(compare(given, command=command, display=watched))


class _Watched:
    """A display; the study's results are written whenever the comparison's are."""

    def __init__(self, display: Display, write: Callable[[Mapping[str, Any]], object]) -> None:
        self._display, self._write = display, write

    def measuring(self, total: int) -> Callable[[], None]:
        """As `Display`."""
        return self._display.measuring(total)

    def planned(self, plan: Plan, runs: int, finished: int, seconds: float) -> None:
        """As `Display`."""
        self._display.planned(plan, runs, finished, seconds)

    def progress(self, job: Job, message: Message) -> None:
        """As `Display`."""
        self._display.progress(job, message)

    def partial(self, results: Mapping[str, Any], report: Path) -> None:
        """As `Display`."""
        self._write(results)
        self._display.partial(results, report)


def _created(out: Path) -> str:
    file = out / "results.json"
    return str(formats.read_results(file, "factorial")["created"]) if file.exists() else now()


def gather(
    comparison: Mapping[str, Any],
    factors: Sequence[Factor],
    cells: Sequence[Cell],
    *,
    order: int,
    command: str,
    created: str,
) -> dict[str, Any]:
    """All that results.json holds, from the comparison's; runs may be missing."""
    names = [cell.entry.name for cell in cells]
    table, seeds = loss_table(comparison)
    whole = [place for place in range(len(seeds)) if np.isfinite(table[:, place]).all()]
    losses, used = table[:, whole], [seeds[place] for place in whole]
    entries = {entry["name"]: entry for entry in comparison["entries"]}
    shape = [len(factor.levels) for factor in factors]
    some = contrasts(shape, order)
    results = {
        **heading("factorial", command, status=comparison["status"], updated=now()),
        "created": created,
        "factors": [{"name": f.name, "levels": list(f.levels)} for f in factors],
        "order": order,
        "baseline": names[0],
        "entries": [_cell(cell, factors, entries[cell.entry.name]) for cell in cells],
        "seeds": used,
        "effects": _effects(losses, some, factors),
        "terms": _terms(losses, shape, factors),
        "statistics": _statistics(losses, some),
        "comparison": COMPARISON,
        **{name: comparison[name] for name in ("corpus", "settings")},
        "failed": sum(run["status"] == "failed" for run in comparison["runs"]),
        "left_out": _left_out(comparison, used),
    }
    return {**results, "sentence": sentence(results)}


def _cell(cell: Cell, factors: Sequence[Factor], entry: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("loss", "parameters", "sweep", "steps")
    return {
        "name": cell.entry.name,
        "levels": [f.levels[level] for f, level in zip(factors, cell.levels, strict=True)],
        **{name: entry[name] for name in kept},
    }


def _effects(
    losses: Array, some: Sequence[Contrast], factors: Sequence[Factor]
) -> list[dict[str, Any]]:
    if not losses.shape[1]:
        return []
    found = intervals(losses, np.array([contrast.weights for contrast in some]))
    rows = []
    for contrast, mean, half in zip(some, found.mean, found.half_width, strict=True):
        known = bool(np.isfinite(half))
        verdict = "lowers" if mean < -half else "raises" if mean > half else "unclear"
        parts = list(zip(contrast.factors, contrast.levels, strict=True))
        rows.append(
            {
                "name": " × ".join(f"{factors[f].name}={factors[f].levels[a]}" for f, a in parts),
                "factors": [factors[f].name for f, _ in parts],
                "levels": [factors[f].levels[a] for f, a in parts],
                "mean": float(mean),
                "low": float(mean - half) if known else None,
                "high": float(mean + half) if known else None,
                "verdict": verdict if known else None,
            }
        )
    return rows


def _terms(losses: Array, shape: Sequence[int], factors: Sequence[Factor]) -> list[dict[str, Any]]:
    if not losses.shape[1]:
        return []
    return [
        {
            "name": " × ".join(factors[f].name for f in term.factors),
            "df": term.df,
            "sum_of_squares": term.squares,
            "share": term.share,
            "f": term.f,
            "p": term.p,
        }
        for term in analysis_of_variance(losses, shape)
    ]


def _statistics(losses: Array, some: Sequence[Contrast]) -> dict[str, Any] | None:
    if losses.shape[1] < 2:
        return None
    found = intervals(losses, np.array([contrast.weights for contrast in some]))
    return {
        "method": "contrasts of cell means, paired by seed; simultaneous intervals (Šidák), the "
        "shorter of the paired and the unpaired route, calibrated together; noise pooled over "
        "cells, never below what a contrast's own cells show",
        "level": LEVEL,
        "comparisons": len(some),
        "df_paired": found.df_paired,
        "df_unpaired": found.df_unpaired,
        "critical_paired": found.critical_paired,
        "critical_unpaired": found.critical_unpaired,
    }


def _left_out(comparison: Mapping[str, Any], used: Sequence[int]) -> list[str]:
    """Seeds that a cell is missing of, which no effect uses."""
    lines = []
    for seed in sorted({run["seed"] for run in comparison["runs"]} - set(used)):
        runs = [run for run in comparison["runs"] if run["seed"] == seed]
        missing = [run for run in runs if final_loss(run) is None]
        first = missing[0]
        why = first["error"] or first["status"]
        lines.append(
            f"Seed {seed} is left out: {len(missing)} of {len(runs)} cells have no last loss, "
            f"such as {first['entry']} ({why})."
        )
    return lines


def sentence(results: Mapping[str, Any]) -> str:
    """What the intervals allow to say."""
    effects, seeds = results["effects"], len(results["seeds"])
    if not effects:
        return "Nothing can be said yet: no seed has a finished run in every cell."
    if seeds < 2:
        return "One seed cannot tell an effect from noise; at least 3 seeds are worth having."
    clear = [row for row in effects if row["verdict"] != "unclear"]
    over = f"Over {seeds} seeds and {len(results['entries'])} cells"
    if not clear:
        which = f"none of {len(effects)} effects can" if len(effects) > 1 else "the effect cannot"
        return f"{over}, {which} be told apart from noise."
    main = [row for row in clear if len(row["factors"]) == 1]
    mixed = len(clear) - len(main)
    said = [
        f"{row['name']} {row['verdict']} the loss by {abs(row['mean']):.3f}"
        for row in sorted(main, key=lambda row: row["mean"])
    ]
    if mixed:
        said.append(f"{mixed} interaction{'s are' if mixed > 1 else ' is'} clear of zero")
    first = ", ".join(f"{f['name']}={f['levels'][0]}" for f in results["factors"])
    what = "nats/token, simultaneous 95% intervals"
    return f"{over}, relative to {first}: {'; '.join(said)} ({what})."
