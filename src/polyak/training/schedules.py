r"""Learning-rate schedules: the factor on every peak rate at a step. Imports no torch."""

from __future__ import annotations

import math

from polyak.training.config.training import TrainingConfig


def factor(step: int, config: TrainingConfig) -> float:
    r"""Factor on every peak rate at `step`, counted from 0.

    With n = `steps`, w = round(warmup·n), s = round(decay_start·n) and f = `final_rate`:

    - every schedule: step/w while step < w, so the first step has rate 0;
    - `cosine`: f + (1−f)·½(1 + cos(π (step−w)/(n−w)));
    - `wsd`: 1 while step < s, then 1 − (1−f)(step−s)/(n−s);
    - `constant`: 1.

    Both falling schedules reach f at step n, one after the last that is taken. Published (the
    release of arXiv:2605.24425): w = 3,000, s = 25,000 of n = 30,000 on OpenWebText; w = 1,000,
    s = 8,300 of n = 10,000 on TinyStories; f = 0.1.
    """
    assert 0 <= step <= config.steps, f"step {step} is not from 0 to {config.steps}"
    warmup = _round(config.warmup, config)
    if step < warmup:
        return step / warmup
    drop = 1 - config.final_rate
    if config.schedule == "cosine":
        progress = _progress(step, warmup, config)
        return config.final_rate + drop * 0.5 * (1 + math.cos(math.pi * progress))
    if in_decay(step, config):
        return 1 - drop * _progress(step, _round(config.decay_start, config), config)
    return 1.0


def in_decay(step: int, config: TrainingConfig) -> bool:
    """Whether `step` (from 0) is in the decay of `wsd`: from step round(decay_start·steps) on.

    The first of these steps still has the peak rate. Always false for the other schedules.
    """
    return config.schedule == "wsd" and step >= decay_begins(config)


def decay_begins(config: TrainingConfig) -> int:
    """The first step (from 0) of `wsd`'s decay: round(decay_start·steps)."""
    return _round(config.decay_start, config)


def _round(fraction: float, config: TrainingConfig) -> int:
    return round(fraction * config.steps)


def _progress(step: int, start: int, config: TrainingConfig) -> float:
    return (step - start) / max(1, config.steps - start)
