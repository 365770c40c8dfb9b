"""`metrics.jsonl`: one JSON object per line, flushed as it is written."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from polyak.errors import RunError


class MetricsLog:
    """Appends rows to a JSONL file; every row survives a kill right after it was written.

    Args:
        path: the file, created when missing.

    Raises:
        RunError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}") from error

    def write(self, kind: str, **row: Any) -> None:
        """Append one row of a kind, `train` or `validation`."""
        try:
            self._file.write(json.dumps({"kind": kind, **row}, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror}") from error

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._file.close()
        except OSError as problem:  # a full disk refuses what is left in the buffer once more
            if error is None:
                raise RunError(f"cannot write {self.path}: {problem.strerror}") from problem
