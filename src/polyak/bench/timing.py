"""Interleaved timing, and the memory that a step takes.

Nothing else should run on the machine meanwhile; the load average is recorded so that a disturbed
measurement can be told."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

Measurement = dict[str, Any]
Name = TypeVar("Name")


def interleave(
    steps: Mapping[Name, Callable[[], Any]], rounds: int, once: float = math.inf
) -> dict[Name, list[float]]:
    """Seconds of each step in each round; one untimed round first.

    A step that takes more than `once` seconds there is not repeated: that is its time in every
    round.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in steps}
    long: dict[Name, float] = {}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            if name not in long:
                step()
            took = long.get(name, time.perf_counter() - began)
            if number:
                seconds[name].append(took)
            elif took > once:
                long[name] = took
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
