"""How fast each entry trains: measured before the runs, interleaved, with nothing beside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from polyak.data.prepare import Prepared
from polyak.training.loop import Trainer
from polyak.training.run_config import RunConfig

ROUNDS, WARM_UP, TIMED = 5, 1, 2


def measure(
    configs: Sequence[RunConfig],
    data: Prepared,
    *,
    threads: int,
    progress: Callable[[], None] = lambda: None,
) -> list[dict[str, float]]:
    """Training tokens per second of each config: median, lowest and highest of interleaved rounds.

    Every round builds each model anew (so only one is in memory), does a warm-up step and then
    times full optimizer steps, A B C … A B C …; on one CPU thread if runs will have one each.

    Args:
        configs: one run per entry.
        data: the prepared corpus.
        threads: CPU threads of each run.
        progress: called after each of the `ROUNDS * len(configs)` measurements.

    Returns:
        {"median", "low", "high"} in tokens per second, one per config.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rates: list[list[float]] = [[] for _ in configs]
    try:
        for _ in range(ROUNDS):
            for config, found in zip(configs, rates, strict=True):
                found.append(_tokens_per_second(Trainer(config, data)))
                progress()
    finally:
        torch.set_num_threads(before)
    return [
        {"median": statistics.median(found), "low": min(found), "high": max(found)}
        for found in rates
    ]


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
