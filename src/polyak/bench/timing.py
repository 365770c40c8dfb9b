"""Interleaved timing, and the memory that a step takes.

Nothing else should run on the machine meanwhile; the load average is recorded so that a disturbed
measurement can be told."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Measurement = dict[str, Any]


def interleave(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round; one untimed round first."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def peak_bytes(step: Callable[[], Any]) -> int:
    """Largest amount of CPU memory that torch holds at once of what `step` allocates."""
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """Standard error to nowhere: the profiler's C++ code announces itself there."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Run with this many CPU threads (None: torch's own choice), and put the number back."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def load() -> tuple[float, float, float] | None:
    """The load averages over 1, 5 and 15 minutes, where the system has them."""
    return os.getloadavg() if hasattr(os, "getloadavg") else None
