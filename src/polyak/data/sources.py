"""Reading users' files: text, JSONL, Parquet, and folders of them.

Documents are read as they are asked for: memory holds one text file, one line or one batch of
Parquet rows at a time, never the corpus.
"""

from __future__ import annotations

import codecs
import gzip
import importlib
import json
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from polyak.data.documents import Document, fingerprint_of
from polyak.errors import DataError, MissingExtraError
from polyak.files import sha256_of

_PIECE = 1 << 20
_PARQUET_ROWS = 256


@dataclass(frozen=True)
class _File:
    name: str  # relative to the corpus, with "/"
    path: Path
    kind: str  # "text", "jsonl" or "parquet"
    sha256: str


@dataclass(frozen=True)
class Scan:
    """What was found at a path; `documents` can be iterated any number of times."""

    files: tuple[_File, ...]
    text_field: str
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def documents(self) -> _Documents:
        """The documents of all files, in order of name."""
        return _Documents(self)

    @property
    def has_records(self) -> bool:
        """Whether some documents are records of a file rather than files."""
        return any(file.kind != "text" for file in self.files)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names and contents, and the text field where it matters."""
        kind = f"records {self.text_field}" if self.has_records else "text"
        return fingerprint_of(kind, ((file.name, file.sha256) for file in self.files))


@dataclass(frozen=True)
class _Documents:
    scan: Scan

    def __iter__(self) -> Iterator[Document]:
        for file in self.scan.files:
            try:
                yield from _READERS[file.kind](file, self.scan.text_field)
            except OSError as problem:
                raise _cannot_read(file.path, problem) from problem


def exists(path: Path) -> bool:
    """Whether something lies at `path`; a path that may not be looked at is an error."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return False
    except OSError as problem:
        raise _cannot_read(path, problem) from problem
    return True


def scan(path: Path, text_field: str) -> Scan:
    """Find and fingerprint the text files at `path`, reading each once.

    In a folder, binary files, hidden files and folders, links to folders and what is no regular
    file are left out and counted in `skipped`.

    Raises:
        DataError: unreadable, or no text at all.
        MissingExtraError: Parquet without pyarrow.
    """
    skipped: Counter[str] = Counter()
    try:
        if path.is_dir():
            candidates = sorted(_walk(path, skipped))
        elif path.is_file():
            candidates = [(path.name, path)]
        else:
            raise DataError(f"corpus {path} is neither a regular file nor a folder")
        files = []
        for name, file in candidates:
            kind, digest = _inspect(file)
            if kind == "binary":
                skipped["binary"] += 1
            else:
                files.append(_File(name, file, kind, digest))
    except OSError as problem:
        raise _cannot_read(Path(problem.filename or path), problem) from problem
    if not files:
        if skipped["binary"]:
            found = "is binary" if path.is_file() else f"holds {_count(skipped['binary'])} only"
            raise DataError(
                f"corpus {path} {found}; a corpus is UTF-8 text, .jsonl, .jsonl.gz or .parquet"
            )
        left_out = ", ".join(f"{number} {reason}" for reason, number in skipped.items())
        raise DataError(
            f"corpus {path} is empty: no files in it"
            + (f" (left out: {left_out})" * bool(left_out))
        )
    return Scan(tuple(files), text_field, dict(skipped))


def _walk(root: Path, skipped: Counter[str]) -> Iterator[tuple[str, Path]]:
    def fail(problem: OSError) -> None:
        raise problem

    for folder, folders, names in os.walk(root, onerror=fail):
        kept = []
        for name in folders:
            if name.startswith(".") or name == "__pycache__":
                skipped["hidden"] += 1
            elif Path(folder, name).is_symlink():
                skipped["links to folders"] += 1
            else:
                kept.append(name)
        folders[:] = kept
        for name in names:
            path = Path(folder, name)
            if name.startswith("."):
                skipped["hidden"] += 1
            elif not stat.S_ISREG(path.stat().st_mode):  # a pipe would block for ever
                skipped["not regular files"] += 1
            else:
                yield path.relative_to(root).as_posix(), path


def _inspect(path: Path) -> tuple[str, str]:
    """(kind, SHA-256 of the file); a binary file is given up at its first telling piece."""
    lower = path.name.lower()
    if lower.endswith((".jsonl", ".jsonl.gz")):
        return "jsonl", sha256_of(path)
    if lower.endswith(".parquet"):
        _pyarrow(path)
        return "parquet", sha256_of(path)
    digest, decoder = sha256(), codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as handle:
        try:
            while piece := handle.read(_PIECE):
                if b"\0" in piece:
                    return "binary", ""
                decoder.decode(piece)
                digest.update(piece)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "binary", ""
    return "text", digest.hexdigest()


def _read_text(file: _File, text_field: str) -> Iterator[Document]:
    try:
        # "-sig": a byte-order mark is about the encoding, not part of the text.
        yield Document(file.name, file.path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as problem:
        raise DataError(f"{file.path} changed while it was being read: {problem}") from problem


def _read_jsonl(file: _File, text_field: str) -> Iterator[Document]:
    opener = gzip.open if file.path.name.lower().endswith(".gz") else open
    try:
        with opener(file.path, "rb") as handle:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    where = f"{file.path}, line {number}"
                    text = _text_of(_record(line, where), text_field, where)
                    yield Document(f"{file.name}:{number}", text)
    except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
        raise DataError(f"{file.path} is not a whole gzip file: {problem}") from problem


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except ValueError as problem:
        raise DataError(f"{where}: not JSON: {problem}") from problem
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}")
    return record


def _read_parquet(file: _File, text_field: str) -> Iterator[Document]:
    arrow, parquet = _pyarrow(file.path)
    try:
        with parquet.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise _no_field(str(file.path), text_field, names)
            number = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    where = f"{file.path}, row {number}"
                    checked = _text_of({text_field: text}, text_field, where)
                    yield Document(f"{file.name}:{number}", checked)
    except arrow.ArrowException as problem:
        reason = str(problem).splitlines()[0]
        raise DataError(f"{file.path} is not a readable Parquet file: {reason}") from problem


def _text_of(record: dict[str, Any], text_field: str, where: str) -> str:
    if text_field not in record:
        raise _no_field(where, text_field, list(record))
    text = record[text_field]
    if not isinstance(text, str):
        found = "null" if text is None else type(text).__name__
        raise DataError(f"{where}: field {text_field!r} must be text, found {found}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise DataError(
            f"{where}: field {text_field!r} is not valid Unicode (an unpaired surrogate at "
            f"character {problem.start})"
        ) from problem
    return text


def _no_field(where: str, text_field: str, present: list[str]) -> DataError:
    return DataError(
        f"{where}: no field {text_field!r}; its fields are: {', '.join(present) or 'none'} "
        "(choose one with text_field)"
    )


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as problem:
        raise MissingExtraError(
            f"reading {path} needs pyarrow, which is not installed; pip install 'polyak[data]'"
        ) from problem


def _count(binary: int) -> str:
    return f"{binary} binary file" + ("s" if binary != 1 else "")


def _cannot_read(path: Path, problem: OSError) -> DataError:
    return DataError(f"cannot read corpus {path}: {problem.strerror or problem}")


_READERS = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
