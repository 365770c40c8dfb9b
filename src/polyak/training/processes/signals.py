"""Stopping between two steps when the system, a scheduler or the user asks for it."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopSignals:
    """While open, SIGTERM and SIGINT ask for a stop instead of ending the process.

    The loop looks at `requested` after every step. A second signal acts as it would have without
    us: the user means it. Signals that the process ignores stay ignored, and outside the main
    thread nothing is changed, since Python handles signals in the main thread only.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for which in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(which) != signal.SIG_IGN:
                    self._before[which] = signal.signal(which, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        while self._before:
            which, handler = self._before.popitem()
            signal.signal(which, handler)
