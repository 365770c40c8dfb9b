"""How far a preparation has come, so that a killed one goes on: `journal.jsonl`.

The first line says what is being prepared; every further line is a place to go on from: where to
read on, and what the shards hold up to there, with hashes. A line counts if it is whole, and a
place if the shards on the disk still hash to what it says; the last such place is taken, and what
was written after it is cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from polyak.errors import DataError
from polyak.files import parse_json, write_atomic
from polyak.reading import fields, file_name, list_of, mapping_of, table, text, whole

NAME = "journal.jsonl"
_PIECE = 1 << 20


class Journal:
    """The journal in a folder.

    Args:
        folder: Where the shards are written.
        heading: What is prepared: a journal that says anything else is of no use.
    """

    def __init__(self, folder: Path, heading: dict[str, Any]) -> None:
        self._folder, self._path = folder, folder / NAME
        self._heading = _line(heading)

    def start(self) -> None:
        """Begin anew: everything in the folder is removed."""
        for path in self._folder.iterdir():
            path.unlink()
        write_atomic(self._path, self._heading, error=DataError)

    def add(self, place: dict[str, Any]) -> None:
        """Record a place; what it says of the shards must be on the disk already."""
        with self._path.open("ab") as handle:
            handle.write(_line(place).encode())
            handle.flush()
            os.fsync(handle.fileno())

    def resume(self, dtype: np.dtype[Any]) -> dict[str, Any] | None:
        """The last place that can be trusted, with the shards cut back to it; None if none can."""
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        except (OSError, UnicodeDecodeError):
            return None
        if not lines or lines[0] != self._heading:
            return None
        checked: dict[tuple[str, int], str] = {}
        for number in range(len(lines) - 1, 0, -1):
            place = _read(lines[number])
            if place is not None and self._holds(place, dtype, checked):
                self._cut(place, dtype)
                write_atomic(self._path, "".join(lines[: number + 1]), error=DataError)
                return place
        return None

    def _holds(
        self, place: dict[str, Any], dtype: np.dtype[Any], checked: dict[tuple[str, int], str]
    ) -> bool:
        for side in place["sides"].values():
            for shard in side["shards"]:
                size = int(shard["tokens"]) * dtype.itemsize
                key = (shard["file"], size)
                if key not in checked:
                    checked[key] = _hash_of_start(self._folder / shard["file"], size)
                if checked[key] != shard["sha256"]:
                    return False
        return True

    def _cut(self, place: dict[str, Any], dtype: np.dtype[Any]) -> None:
        keep = {
            shard["file"]: int(shard["tokens"]) * dtype.itemsize
            for side in place["sides"].values()
            for shard in side["shards"]
        }
        for path in self._folder.iterdir():
            if path.name in keep:
                os.truncate(path, keep[path.name])
            elif path.suffix == ".bin" or path.name == "manifest.json":
                path.unlink()


_SHARD = {"file": file_name, "tokens": whole(0, 2**40), "sha256": text(64)}
_PLACE = {
    "parts": whole(),
    "empty": whole(),
    "sides": mapping_of(table({"shards": list_of(table(_SHARD), 100_000)}), 10),
}


def _line(value: dict[str, Any]) -> str:
    content = json.dumps(value)  # in its own order: the manifest repeats some of it
    return f"{_check(content)} {content}\n"


def _read(line: str) -> dict[str, Any] | None:
    check, _, content = line.partition(" ")
    if not content.endswith("\n") or check != _check(content[:-1]):
        return None
    try:
        return fields(parse_json(content, NAME, error=DataError), NAME, _PLACE, error=DataError)
    except DataError:
        return None


def _check(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _hash_of_start(path: Path, size: int) -> str:
    """SHA-256 of a file's first `size` bytes; "" if it has fewer."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as handle:
            while size and (piece := handle.read(min(size, _PIECE))):
                digest.update(piece)
                size -= len(piece)
    except OSError:
        return ""
    return "" if size else digest.hexdigest()
