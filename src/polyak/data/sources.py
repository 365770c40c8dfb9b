"""Finding users' files: text, JSONL, Parquet, and folders of them.

Documents are read as they are asked for: memory holds one text file of up to 16 MiB, one piece of
a longer one, one line or one batch of Parquet rows at a time, never the corpus.
"""

from __future__ import annotations

import codecs
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from polyak.data.documents import Document, fingerprint_of
from polyak.data.encodings import DEFAULT, check_encoding, decoding, holds_bytes
from polyak.data.left_out import LeftOut, in_words
from polyak.data.parquet.rows import pyarrow
from polyak.data.readers import LONGEST_RECORD, File, json_of, read
from polyak.errors import DataError
from polyak.files import reason, sha256_of

_PIECE = 1 << 20


@dataclass(frozen=True)
class Scan:
    """What was found at a path; `documents` can be iterated any number of times."""

    files: tuple[File, ...]
    text_field: str
    encoding: str = DEFAULT
    left_out: LeftOut = field(default_factory=LeftOut)

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
        """SHA-256 over names and contents, and the text field and encoding where they matter."""
        kind = f"records {self.text_field}" if self.has_records else "text"
        if self.encoding != DEFAULT:
            kind = f"{kind} in {self.encoding}"
        return fingerprint_of(kind, ((file.name, file.sha256) for file in self.files))


@dataclass(frozen=True)
class _Documents:
    scan: Scan

    def __iter__(self) -> Iterator[Document]:
        return self.after(0)

    @cached_property
    def text_bytes(self) -> int | None:
        """Bytes of text in all of them; None where only reading tells, as of records."""
        if self.scan.has_records or self.scan.encoding != DEFAULT:
            return None
        try:
            return sum(file.path.stat().st_size for file in self.scan.files)
        except OSError:
            return None

    def after(self, count: int) -> Iterator[Document]:
        """The documents without the first `count`, which are not decoded."""
        for file in self.scan.files:
            try:
                count = yield from read(file, self.scan.text_field, count, self.scan.encoding)
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


def scan(path: Path, text_field: str, encoding: str = DEFAULT) -> Scan:
    """Find and fingerprint the text files at `path`, reading each once.

    In a folder, files that are not text in `encoding`, tables, hidden files and folders, links to
    folders and what is no regular file are left out, and counted in `left_out`.

    Raises:
        ConfigError: there is no such encoding.
        DataError: unreadable, or no text at all.
        MissingExtraError: Parquet without pyarrow.
    """
    encoding, left_out = check_encoding(encoding), LeftOut()
    try:
        if path.is_dir():
            candidates = sorted(_walk(path, left_out))
        elif path.is_file():
            candidates = [(path.name, path)]
        else:
            raise DataError(f"corpus {path} is neither a regular file nor a folder")
        files = []
        for name, file in candidates:
            kind, digest = _inspect(file, encoding)
            if digest:
                files.append(File(name, file, kind, digest))
            else:
                left_out.add(kind, name)
    except OSError as problem:
        raise _cannot_read(Path(problem.filename or path), problem) from problem
    if not files:
        raise _nothing_at(path, left_out)
    return Scan(tuple(files), text_field, encoding, left_out)


def _nothing_at(path: Path, left_out: LeftOut) -> DataError:
    reasons = left_out.counts
    if path.is_file():
        (reason,) = reasons
        return DataError(f"corpus {path} is {reason}; {_WHAT_IT_IS}")
    if not reasons.keys() - {"hidden", "links to folders", "not regular files"}:
        found = f" (left out: {in_words(left_out.record())})" if left_out else ""
        return DataError(f"corpus {path} is empty: no files in it{found}")
    held = in_words(left_out.record())
    return DataError(f"corpus {path} holds nothing that can be read: {held}; {_WHAT_IT_IS}")


_WHAT_IT_IS = (
    "a corpus is UTF-8 text (--encoding names another), .jsonl, .ndjson (also .gz), .json with a "
    "list of records, or .parquet"
)


def _walk(root: Path, left_out: LeftOut) -> Iterator[tuple[str, Path]]:
    def fail(problem: OSError) -> None:
        raise problem

    for folder, folders, names in os.walk(root, onerror=fail):
        kept = []
        for name in sorted(folders):
            path = Path(folder, name)
            if name.startswith(".") or name == "__pycache__":
                left_out.add("hidden", path.relative_to(root).as_posix())
            elif path.is_symlink():
                left_out.add("links to folders", path.relative_to(root).as_posix())
            else:
                kept.append(name)
        folders[:] = kept
        for name in sorted(names):
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if name.startswith("."):
                left_out.add("hidden", relative)
            elif not stat.S_ISREG(path.stat().st_mode):  # a pipe would block for ever
                left_out.add("not regular files", relative)
            else:
                yield relative, path


_RECORDS = {
    "jsonl": (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json.gz"),
    "parquet": (".parquet", ".parq", ".pq"),
}
_TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _inspect(path: Path, encoding: str) -> tuple[str, str]:
    """(kind, SHA-256 of the file), or (why it is left out, "").

    A file that is no text is given up at its first telling piece.
    """
    lower = path.name.lower()
    for kind, endings in _RECORDS.items():
        if lower.endswith(endings):
            if kind == "parquet":
                pyarrow(path)
            return kind, sha256_of(path)
    if lower.endswith(_TABLES):
        return "CSV or TSV", ""
    if lower.endswith(".json") and (records := _kind_of_json(path)) is not None:
        return records, sha256_of(path)
    digest, decoder = sha256(), codecs.getincrementaldecoder(decoding(encoding))()
    started = False
    with path.open("rb") as handle:
        try:
            while piece := handle.read(_PIECE):
                if b"\0" in piece and holds_bytes(encoding):
                    utf_16 = not started and piece.startswith(_UTF_16)
                    return (f"not {encoding}" if utf_16 else "binary"), ""
                decoder.decode(piece)
                digest.update(piece)
                started = True
            decoder.decode(b"", final=True)
        except UnicodeError:
            return f"not {'UTF-8' if encoding == DEFAULT else encoding}", ""
    return "text", digest.hexdigest()


def _kind_of_json(path: Path) -> str | None:
    """`json`: a list of objects; `jsonl`: an object a line, two at least; None: something else."""
    with path.open("rb") as handle:
        first = handle.readline(LONGEST_RECORD).removeprefix(codecs.BOM_UTF8).strip()
        while not first and (line := handle.readline(LONGEST_RECORD)):
            first = line.strip()
        if first.startswith(b"["):
            return "json" if (first + handle.read(_PIECE))[1:].lstrip().startswith(b"{") else None
        if not first.startswith(b"{") or not first.endswith(b"}"):
            return None
        second = handle.readline(_PIECE)
        while second and not second.strip():
            second = handle.readline(_PIECE)
    try:
        whole = isinstance(json_of(first, str(path)), dict)
    except DataError:
        whole = False
    return "jsonl" if whole and second.lstrip().startswith(b"{") else None


def _cannot_read(path: Path, problem: OSError) -> DataError:
    return DataError(f"cannot read corpus {path}: {reason(problem)}")
