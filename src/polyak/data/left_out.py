"""Files that a corpus does without: how many, for which reason, and the first of them by name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from polyak.reading import list_of, mapping_of, table, text, whole

FIRST = 3
"""So many are named for each reason."""


RECORD = mapping_of(table({"files": whole(), "first": list_of(text(4096), 100)}), 100)
"""What a `LeftOut.record` that is read again must be."""


class LeftOut:
    """Counts files by reason, and keeps the first names of each.

    Attributes:
        counts: reason → number of files.
        first: reason → the first names, as text that can be written.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.first: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """One more file, or folder."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.first.setdefault(reason, [])
        if len(names) < FIRST:
            names.append(os.fsencode(name).decode("utf-8", "replace"))

    def __bool__(self) -> bool:
        return bool(self.counts)

    def record(self) -> dict[str, dict[str, Any]]:
        """What a manifest, a run or results say: reason → `files` and their `first` names."""
        return {
            reason: {"files": count, "first": self.first[reason]}
            for reason, count in self.counts.items()
        }


def skipped_files(record: Mapping[str, Any]) -> dict[str, Any]:
    """What results say beside a `corpus`: `skipped_files`, where there are any."""
    return {"skipped_files": dict(record)} if record else {}


def lines(value: Any) -> list[str]:
    """A sentence for every corpus in results, however deep, that does without some files."""
    found: dict[str, None] = {}
    for part in _with_skipped(value):
        found[f"Left out of {part['corpus']}: {in_words(part['skipped_files'])}."] = None
    return list(found)


def _with_skipped(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        if value.get("skipped_files"):
            yield value
        value = list(value.values())
    for inner in value if isinstance(value, list | tuple) else ():
        yield from _with_skipped(inner)


def in_words(record: Mapping[str, Mapping[str, Any]]) -> str:
    """`20 not UTF-8 (00.txt, 01.txt, 05.txt, …), 1 hidden (.git)`, of a `LeftOut.record`."""
    return ", ".join(
        f"{kind['files']} {reason} ({', '.join(kind['first'])}"
        f"{', …' if kind['files'] > len(kind['first']) else ''})"
        for reason, kind in record.items()
    )
