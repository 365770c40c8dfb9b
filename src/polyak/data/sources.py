"""Finding users' files: text, JSONL, Parquet, and folders of them.

Documents are read as they are asked for: memory holds one text file of up to 16 MiB, one piece of
a longer one, one line or one batch of Parquet rows at a time, never the corpus.
"""

from __future__ import annotations

import codecs
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from polyak.data.documents import Document, fingerprint_of
from polyak.data.readers import File, pyarrow, read
from polyak.errors import DataError
from polyak.files import sha256_of

_PIECE = 1 << 20


@dataclass(frozen=True)
class Scan:
    """What was found at a path; `documents` can be iterated any number of times."""

    files: tuple[File, ...]
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
        return self.after(0)

    def after(self, count: int) -> Iterator[Document]:
        """The documents without the first `count`, which are not decoded."""
        for file in self.scan.files:
            try:
                count = yield from read(file, self.scan.text_field, count)
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
                files.append(File(name, file, kind, digest))
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
        pyarrow(path)
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


def _count(binary: int) -> str:
    return f"{binary} binary file" + ("s" if binary != 1 else "")


def _cannot_read(path: Path, problem: OSError) -> DataError:
    return DataError(f"cannot read corpus {path}: {problem.strerror or problem}")
