"""What a corpus is made of."""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from polyak.data.encodings import DEFAULT, decoding
from polyak.errors import DataError

_READ = 1 << 20


class LongText:
    """The characters start…stop−1 of a large text file, read anew by every iteration.

    Iterating yields strings that join to the text; memory holds about a megabyte of it.

    Args:
        path: The file; a byte-order mark at its beginning is not part of the text.
        start: The first character.
        stop: The character after the last; None for all there are.
        encoding: Of the file.
    """

    def __init__(
        self, path: Path, start: int = 0, stop: int | None = None, encoding: str = DEFAULT
    ) -> None:
        self.path, self.start, self.stop, self.encoding = path, start, stop, encoding

    def __len__(self) -> int:
        """The number of characters; reads the file."""
        return sum(map(len, self))

    def __bool__(self) -> bool:
        return True  # a large file holds characters; counting them would read it all

    def __iter__(self) -> Iterator[str]:
        position = 0
        for part in _decoded(self.path, self.encoding):
            begin, end = position, position + len(part)
            position = end
            if end > self.start:
                last = end if self.stop is None else min(end, self.stop)
                if last > max(begin, self.start):
                    yield part[max(self.start - begin, 0) : last - begin]
            if self.stop is not None and end >= self.stop:
                return

    def cut(self, position: int) -> tuple[LongText, LongText]:
        """The text before and from a character of the whole file on."""
        before = LongText(self.path, 0, position, self.encoding)
        return before, LongText(self.path, position, None, self.encoding)


Text = str | LongText


class Document(NamedTuple):
    """One text with a name that is unique in its corpus and the same on every machine."""

    name: str
    text: Text
    side: str | None = None
    """The side of a split that the corpus itself decides."""


@runtime_checkable
class Reader(Protocol):
    """Documents from some place of a corpus on, and the place to go on from."""

    def __iter__(self) -> Iterator[Document]:
        """The documents that follow."""
        ...

    def position(self) -> Any:
        """Where to go on after the last document that was read: a JSON value."""
        ...

    def before(self) -> Any:
        """Where to go on so that the last document comes once more; None if that is unknown."""
        ...


class CountingReader:
    """A reader of documents whose place is their number."""

    def __init__(self, documents: Iterable[Document], position: int | None) -> None:
        self._count = position or 0
        after = getattr(documents, "after", None)
        if after is not None:
            self._rest: Iterator[Document] = after(self._count)
        else:
            self._rest = itertools.islice(iter(documents), self._count, None)

    def __iter__(self) -> Iterator[Document]:
        for document in self._rest:
            self._count += 1
            yield document

    def position(self) -> int:
        """The number of documents read."""
        return self._count

    def before(self) -> int:
        """The number of documents read before the last one."""
        return self._count - 1


def open_reader(documents: Iterable[Document], position: Any = None) -> Reader:
    """A reader that goes on from `position`, or from the beginning if that is None."""
    own = getattr(documents, "reader", None)
    reader: Reader = own(position) if own is not None else CountingReader(documents, position)
    return reader


def parts_of(text: Text) -> Iterator[str]:
    """The text as strings that join to it."""
    if isinstance(text, str):
        yield text
    else:
        yield from text


def fingerprint_of(kind: str, files: Iterable[tuple[str, str]]) -> str:
    """SHA-256 over what the files are read as, their names and the SHA-256 of each content."""
    digest = sha256(json.dumps([kind]).encode())
    for name, content in files:
        digest.update(json.dumps([name, content]).encode())
    return digest.hexdigest()


def _decoded(path: Path, encoding: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(decoding(encoding))()
    try:
        with path.open("rb") as handle:
            while piece := handle.read(_READ):
                yield decoder.decode(piece)
            yield decoder.decode(b"", final=True)
    except UnicodeError as problem:
        raise DataError(f"{path} changed while it was being read: {problem}") from problem
    except OSError as problem:
        raise DataError(f"cannot read corpus {path}: {problem.strerror or problem}") from problem
