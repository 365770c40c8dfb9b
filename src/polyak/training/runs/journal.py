"""Where a run's rows go: `metrics.jsonl` first, then the trackers; nowhere on other processes."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from polyak.files import sync_file, sync_folder
from polyak.training.runs.metrics import MetricsLog
from polyak.training.runs.trackers import Tracker


class Journal:
    """Rows of one process's stretch of a run.

    Args:
        path: `metrics.jsonl`, or None on processes that write nothing.
        tracker: gets every row too.
    """

    def __init__(self, path: Path | None, tracker: Tracker | None = None) -> None:
        self._path, self._tracker = path, tracker
        self._files = ExitStack()
        self._log = self._files.enter_context(MetricsLog(path)) if path is not None else None

    def write(self, kind: str, **row: Any) -> None:
        """Append one row: `train`, `validation`, or the name of an event."""
        if self._log is not None:
            self._log.write(kind, **row)
        if self._tracker is not None:
            self._tracker.log({"kind": kind, **row})

    def sync(self) -> None:
        """Flush to the disk what was written, so that it survives a power cut too."""
        if self._path is not None:
            sync_file(self._path)
            sync_folder(self._path.parent)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            if self._tracker is not None:
                self._tracker.finish(error is None)
        finally:
            self._files.__exit__(kind, error, traceback)
