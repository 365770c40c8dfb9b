"""A bar with the time left where there is a terminal, and a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


_EVERY = 20.0  # seconds between lines


class Bar:
    """Shows the share of the work that is done, and what is under way.

    Args:
        console: where it goes.
    """

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:3.0f}%"),
            TimeRemainingColumn(compact=True),
            TextColumn("left  {task.description}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=120,
        )
        self._task = self._bar.add_task("", total=1.0)
        self._console, self._said = console, time.monotonic()

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, share: float, what: str) -> None:
        """Move it to a share from 0 to 1."""
        self._bar.update(self._task, completed=share, description=what)
        if self._bar.disable and time.monotonic() - self._said > _EVERY:
            self._said = time.monotonic()
            self._console.print(f"{share:4.0%}  {what}", markup=False)
