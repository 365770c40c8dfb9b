"""Reading the documents of one file: text, JSONL or Parquet.

Every reader can begin after some number of documents, and returns how many of those it did not
have: a killed preparation goes on without decoding what it has done.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from polyak.data.documents import Document, LongText
from polyak.data.encodings import DEFAULT, decoding, holds_bytes
from polyak.data.parquet.rows import NoColumnError, rows
from polyak.errors import DataError
from polyak.files import each_once

# Larger text files are never held in memory as a whole.
LONG_FILE = 16 << 20
# Records are held whole; a longer one is refused before it is.
LONGEST_RECORD = 256 << 20
LONG_NUMBER = 4300  # digits

Read = Generator[Document, None, int]


class File(NamedTuple):
    """A file of a corpus."""

    name: str  # relative to the corpus, with "/"
    path: Path
    kind: str  # "text", "jsonl", "json" or "parquet"
    sha256: str


def read(file: File, text_field: str, skip: int = 0, encoding: str = DEFAULT) -> Read:
    """The documents of a file without the first `skip`; returns how many more are to be skipped.

    Raises:
        DataError: a record that is not JSON, has no text, or text that is not Unicode.
        OSError: the system refuses.
    """
    return (yield from _READERS[file.kind](file, text_field, skip, encoding))


def _read_text(file: File, text_field: str, skip: int, encoding: str) -> Read:
    if skip:
        return skip - 1
    if file.path.stat().st_size > LONG_FILE:
        yield Document(file.name, LongText(file.path, encoding=encoding))
        return 0
    try:
        yield Document(file.name, file.path.read_bytes().decode(decoding(encoding)))
    except UnicodeError as problem:
        raise DataError(f"{file.path} changed while it was being read: {problem}") from problem
    return 0


def _read_jsonl(file: File, text_field: str, skip: int, encoding: str) -> Read:
    opener = gzip.open if file.path.name.lower().endswith(".gz") else open
    if not holds_bytes(encoding):
        raise DataError(f"{file.path}: JSON Lines cannot be in {encoding}; write it in UTF-8")
    try:
        with opener(file.path, "rb") as handle:
            for number, line in enumerate(_lines(handle, file.path), start=1):
                if not line.strip():
                    continue
                if skip:
                    skip -= 1
                    continue
                where = f"{file.path}, line {number}"
                record = _record(json_of(line, where, encoding), where)
                text = text_of(record, text_field, where)
                yield Document(f"{file.name}:{number}", text)
    except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
        raise DataError(f"{file.path} is not a whole gzip file: {problem}") from problem
    return skip


def _lines(handle: Any, path: Path) -> Iterator[bytes]:
    number = 0
    while line := handle.readline(LONGEST_RECORD + 1):
        number += 1
        if len(line) > LONGEST_RECORD:
            raise DataError(
                f"{path}, line {number}: a record of more than {LONGEST_RECORD:,} bytes"
            )
        yield line


def _record(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def json_of(content: bytes, where: str, encoding: str = DEFAULT) -> Any:
    """The value of a record's JSON, or of a list of them; `DataError` naming the place."""
    try:
        return json.loads(
            content.decode(decoding(encoding)),
            object_pairs_hook=each_once,
            parse_int=_whole_number,
        )
    except RecursionError:
        raise DataError(f"{where}: not read: its lists and objects are nested too deep") from None
    except ValueError as problem:
        raise DataError(f"{where}: not JSON: {problem}") from problem


def _whole_number(digits: str) -> int:
    """The number; 0 for one too long for Python, since of a record only the text is used."""
    return int(digits) if len(digits) <= LONG_NUMBER else 0


def _read_json(file: File, text_field: str, skip: int, encoding: str) -> Read:
    """A list of records."""
    with file.path.open("rb") as handle:
        content = handle.read(LONGEST_RECORD + 1)
    if len(content) > LONGEST_RECORD:
        raise DataError(
            f"{file.path} has more than {LONGEST_RECORD:,} bytes, too many for a list of records "
            "in one piece; write it as .jsonl, a record a line"
        )
    records = json_of(content, str(file.path), encoding)
    for number, record in enumerate(records[skip:], start=skip + 1):
        where = f"{file.path}, record {number}"
        yield Document(f"{file.name}:{number}", text_of(_record(record, where), text_field, where))
    return max(0, skip - len(records))


def _read_parquet(file: File, text_field: str, skip: int, encoding: str) -> Read:
    try:
        found = rows(file.path, text_field, skip, LONGEST_RECORD)
        while True:
            number, text = next(found)
            where = f"{file.path}, row {number}"
            yield Document(f"{file.name}:{number}", text_of({text_field: text}, text_field, where))
    except NoColumnError as problem:
        raise _no_field(str(file.path), text_field, problem.columns) from None
    except StopIteration as end:
        return int(end.value)


def text_of(record: dict[str, Any], text_field: str, where: str) -> str:
    """The text of a record; `DataError` naming the place where there is none."""
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
    names = ", ".join(name[:40] for name in present[:20]) or "none"
    return DataError(
        f"{where}: no field {text_field!r}; its fields are: {names}{', …' * (len(present) > 20)} "
        "(choose one with text_field)"
    )


_READERS = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "parquet": _read_parquet,
}
