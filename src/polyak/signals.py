"""Stopping when the system, a scheduler or the user asks for it.

SIGTERM is a scheduler's or `kill`'s, SIGINT Ctrl-C's, SIGHUP a closed terminal's or a lost ssh
connection's, SIGUSR1 what many SLURM scripts send ahead of the end. A signal that this process
was started to ignore (`nohup`; SIGINT behind `&` in a script) stays ignored.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOPPED = 75
"""Exit code of work that was told to stop: EX_TEMPFAIL of sysexits.h, "try again"."""

_MEANT = ("SIGTERM", "SIGINT")
"""A second one of these acts as it would have without us: somebody means it."""
_ONCE = ("SIGHUP", "SIGUSR1")
"""These often come twice, from the shell and the kernel, or beside a SIGTERM: once is enough."""


class Stopped(KeyboardInterrupt):
    """A signal other than SIGINT asked for the end; whatever cleans up after Ctrl-C does here.

    Attributes:
        name: of the signal.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class StopSignals:
    """While open, signals ask for a stop instead of ending the process; a loop looks between steps.

    Signals that the process ignores stay ignored, and outside the main thread nothing is changed,
    since Python handles signals in the main thread only.

    Attributes:
        requested: the name of the first signal that came, or of whoever asked; None before.
    """

    names: tuple[str, ...] = (*_MEANT, *_ONCE)

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for which in _known(self.names):
                if signal.getsignal(which) != signal.SIG_IGN:
                    self._before[which] = signal.signal(which, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore((*_MEANT, *_ONCE) if self.requested is None else _MEANT)
        for which in self._before:  # a second one must not end what follows the stop
            signal.signal(which, signal.SIG_IGN)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name in _MEANT:
            self._restore(_MEANT)
        self.ask(name)

    def ask(self, name: str) -> None:
        """Ask for a stop as a signal would; from any thread.

        Args:
            name: who asks, for the message.
        """
        if self.requested is None:
            self.requested = name
            self.asked(name)

    def asked(self, name: str) -> None:
        """What happens at once when the first signal comes: nothing, the loop looks."""

    def _restore(self, names: tuple[str, ...]) -> None:
        for which in _known(names):
            if which in self._before:
                signal.signal(which, self._before.pop(which))


class RaiseAtSignals(StopSignals):
    """While open, the first SIGTERM, SIGHUP or SIGUSR1 raises `Stopped`, as Ctrl-C raises."""

    names = ("SIGTERM", *_ONCE)

    def asked(self, name: str) -> None:
        """Raise `Stopped`."""
        raise Stopped(name)


def leave_to_parent(*, but: tuple[str, ...] = ()) -> None:
    """Ignore what a terminal or scheduler sends to a whole group: the parent decides.

    Args:
        but: names of signals that are left as they are.
    """
    for which in _known((*_MEANT, *_ONCE)):
        if which.name not in but:
            signal.signal(which, signal.SIG_IGN)


def _known(names: tuple[str, ...]) -> list[signal.Signals]:
    """Those that the system has: Windows knows no SIGHUP."""
    return [getattr(signal, name) for name in names if hasattr(signal, name)]
