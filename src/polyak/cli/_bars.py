"""A bar with the time left where there is a terminal, and a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


NARROW = 70
"""Columns below which a bar makes room for words."""
BESIDE = 18
"""Columns of the share and the time left: an hour more, and they stay whole."""
_EVERY = 20.0  # seconds between lines


class Bar:
    """Shows the share of the work that is done, and what is under way.

    Args:
        console: where it goes.
        every: seconds between lines; None: 20.
    """

    def __init__(self, console: Console, every: float | None = None) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            *([BarColumn(bar_width=24)] if console.width >= NARROW else []),
            TextColumn("{task.percentage:3.0f}%"),
            TimeRemainingColumn(compact=True),
            TextColumn("left  {task.description}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=120,
        )
        self._task = self._bar.add_task("", total=1.0)
        self._console, self._began = console, time.monotonic()
        self._said, self._first = self._began, 0.0
        self._every = _EVERY if every is None else every
        self._room = max(1, console.width - (BESIDE + 25 if console.width >= NARROW else BESIDE))

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, share: float, what: str) -> None:
        """Move it to a share from 0 to 1."""
        end = what if len(what) <= self._room else f"…{what[1 - self._room :]}"
        self._bar.update(self._task, completed=share, description=end)
        now = time.monotonic()
        if not self._first:
            self._first, self._began = share, now  # what was there already took no time
        if self._bar.disable and now - self._said > self._every:
            self._said = now
            self._console.print(
                f"{share:4.0%}{self._left(share, now)}  {what}", markup=False, soft_wrap=True
            )

    def _left(self, share: float, now: float) -> str:
        """The time left at the pace so far, once a twentieth of the work tells it."""
        from polyak.words import duration

        if share - self._first < 0.05:
            return ""
        pace = (now - self._began) / (share - self._first)
        return f", about {duration((1 - share) * pace)} left"
