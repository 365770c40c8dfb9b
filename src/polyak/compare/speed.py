"""How fast each entry trains: measured before the runs, interleaved, with nothing beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from polyak.compare.entries import Entry
from polyak.compare.plan import Plan
from polyak.data.prepare import Prepared
from polyak.errors import RunError
from polyak.files import read_json, write_json
from polyak.nn.config import ModelConfig
from polyak.reading import anything, between, fields, list_of, mapping_of, only
from polyak.statistics.intervals import spread
from polyak.training.config.run import RunConfig
from polyak.training.trainer import Trainer

ROUNDS, WARM_UP, TIMED = 5, 1, 2


def measure(
    configs: Sequence[RunConfig],
    data: Prepared,
    *,
    threads: int,
    progress: Callable[[], None] = lambda: None,
) -> list[dict[str, float] | Exception]:
    """Training tokens per second of each config: median, lowest and highest of interleaved rounds.

    Every round builds each model anew (so only one is in memory), does a warm-up step and then
    times full optimizer steps, A B C … A B C …; on one CPU thread if runs will have one each.

    Args:
        configs: one run per entry.
        data: the prepared corpus.
        threads: CPU threads of each run.
        progress: called after each of the `ROUNDS * len(configs)` measurements.

    Returns:
        {"median", "low", "high"} in tokens per second, one per config; or the error that ended
        its steps, which must not keep the others from being measured.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rates: list[list[float]] = [[] for _ in configs]
    errors: dict[int, Exception] = {}
    try:
        for _ in range(ROUNDS):
            for place, config in enumerate(configs):
                if place not in errors:
                    try:
                        rates[place].append(_tokens_per_second(Trainer(config, data)))
                    except Exception as error:  # a diverging run, or a user's rule that fails
                        errors[place] = error
                progress()
    finally:
        torch.set_num_threads(before)
    return [errors.get(place) or spread(found) for place, found in enumerate(rates)]


def _tokens_per_second(trainer: Trainer) -> float:
    trainer.model.train()
    for step in range(WARM_UP):
        trainer.step(step)
    _wait(trainer.device)
    began = time.perf_counter()
    for step in range(WARM_UP, WARM_UP + TIMED):
        trainer.step(step)
    _wait(trainer.device)
    return TIMED * trainer.tokens_per_step / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def speeds_of(
    plan: Plan, measuring: Callable[[int], Callable[[], None]]
) -> dict[str, dict[str, float]]:
    """Speeds by entry: those measured in an earlier start, and the missing ones now.

    An entry that cannot take the few steps of the measurement has none: its runs will fail too,
    and say why.

    Args:
        plan: the comparison.
        measuring: told how many measurements begin; what it returns is called after each.
    """
    known = known_speeds(plan.config.out)
    kept = {
        entry.name: known[entry.name]["tokens_per_second"]
        for entry in plan.entries
        if _as_of_today(known.get(entry.name, {}).get("for")) == _speed_key(plan, entry)
    }
    missing = [entry for entry in plan.entries if entry.name not in kept]
    if missing:
        measured = measure(
            [plan.run_config(entry) for entry in missing],
            plan.data,
            threads=plan.threads or 1,
            progress=measuring(ROUNDS * len(missing)),
        )
        for entry, found in zip(missing, measured, strict=True):
            if not isinstance(found, Exception):
                kept[entry.name] = found
            elif plan.config.match == "seconds" and entry == plan.baseline:
                raise found
    return kept


def _speed_key(plan: Plan, entry: Entry) -> Any:
    key = [entry.model.to_dict(), plan.base.training.batch_size, plan.threads]
    return json.loads(json.dumps(key))  # as it is read again: a tuple is a list there


def _as_of_today(key: Any) -> Any:
    """A kept key; settings of the model that an older version did not have are at defaults."""
    if not isinstance(key, list) or not key or not isinstance(key[0], dict):
        return None
    return [{**json.loads(json.dumps(ModelConfig().to_dict())), **key[0]}, *key[1:]]


_RATES = only(dict.fromkeys(("median", "low", "high"), between(1e-12, 1e15)))
_SPEEDS = mapping_of(only({"for": list_of(anything, 3, 3), "tokens_per_second": _RATES}), 10_000)
"""speeds.json: by entry, what was measured (model, batch, threads) and how fast it was."""


def known_speeds(out: Path) -> dict[str, Any]:
    """What an earlier start measured, by entry.

    Raises:
        RunError: speeds.json is not what such a start writes.
    """
    file = out / "speeds.json"
    if not file.exists():
        return {}
    try:
        known = fields({"speeds": read_json(file)}, str(file), {"speeds": _SPEEDS})["speeds"]
    except RunError as problem:
        raise RunError(f"{problem}; remove it, and speeds are measured again") from None
    return dict(known)


def keep_speeds(plan: Plan, speeds: Mapping[str, dict[str, float]]) -> None:
    """Write speeds.json, with the speeds of entries that an earlier start had."""
    new = {
        entry.name: {"for": _speed_key(plan, entry), "tokens_per_second": speeds[entry.name]}
        for entry in plan.entries
        if entry.name in speeds
    }
    known = known_speeds(plan.config.out)
    if {**known, **new} != known:
        write_json(plan.config.out / "speeds.json", {**known, **new})
