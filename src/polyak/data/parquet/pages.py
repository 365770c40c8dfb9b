"""How large the pages of a Parquet file are once unpacked, told by their headers alone.

pyarrow makes room for a page of the size that its header states, up to 2 GiB, and a small file can
state it many times over. Here the headers are read without unpacking anything: each is a struct
of Thrift's compact protocol, followed by so many bytes of the page as it says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from polyak.errors import DataError

LONGEST_HEADER = 1 << 20
"""Bytes; a header may hold the least and the largest value of its page."""
_DATA, _DATA_V2 = 0, 3
"""Kinds of pages, in whose headers a field says how many values they hold."""


class Page(NamedTuple):
    """Sizes of a page in bytes: of its header, and of what follows, unpacked and as it is."""

    header: int
    unpacked: int
    packed: int


def largest_page(path: Path, columns: Sequence[Any], most: int) -> int:
    """Bytes of the largest page of some column chunks, unpacked.

    Args:
        path: the file.
        columns: pyarrow's metadata of the chunks.
        most: bytes of a page at most.

    Raises:
        DataError: a page is larger, or a header cannot be read.
        OSError: the system refuses.
    """
    largest = 0
    for column in columns:
        for page in pages(path, column):
            largest = max(largest, page.unpacked)
            if largest > most:
                raise DataError(
                    f"{path} has a page of {largest:,} bytes once unpacked, and {most:,} are the "
                    "most that polyak reads; write it with a smaller data_page_size"
                )
    return largest


def pages(path: Path, column: Any) -> Iterator[Page]:
    """The pages of a column chunk, as pyarrow would come to them."""
    place, first = column.data_page_offset, column.dictionary_page_offset
    if first is not None and 0 < first < place:
        place = first
    seen = 0
    with path.open("rb") as file:
        while seen < column.num_values:
            file.seek(place)
            header, size = _header(file.read(LONGEST_HEADER), path)
            sizes: list[Any] = [header.get(field) for field in (1, 2, 3)]
            kind, unpacked, packed = sizes
            if not all(isinstance(n, int) and n >= 0 for n in sizes):
                raise DataError(
                    f"{path} is not a readable Parquet file: a page's header has no sizes"
                )
            yield Page(size, unpacked, packed)
            about = header.get({_DATA: 5, _DATA_V2: 8}.get(kind, 0))
            seen += max(0, about.get(1) or 0) if isinstance(about, dict) else 0
            place += size + packed


def _header(content: bytes, path: Path) -> tuple[dict[int, Any], int]:
    """A page's header by number of field, and how many bytes it takes."""
    try:
        reader = _Compact(content)
        return reader.struct(0), reader.place
    except (IndexError, ValueError):
        raise DataError(
            f"{path} is not a readable Parquet file: a page's header is damaged, or longer than "
            f"{LONGEST_HEADER:,} bytes"
        ) from None


class _Compact:
    """Reads Thrift's compact protocol: whole numbers and structs of them; skips the rest.

    Raises:
        IndexError, ValueError: the bytes end too early, or are something else.
    """

    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 0

    def struct(self, depth: int) -> dict[int, Any]:
        """Field → value, or None for one that is skipped."""
        if depth > 8:
            raise ValueError
        found: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            delta, kind = head >> 4, head & 15
            number = number + delta if delta else self._signed()
            found[number] = self._value(kind, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # true and false, in the type itself
            return kind == 1
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 12:
            return self.struct(depth + 1)
        if kind in (3, 7):
            self._skip(1 if kind == 3 else 8)
        elif kind == 8:
            self._skip(self._unsigned())
        elif kind in (9, 10):
            self._list(depth)
        else:  # maps, which no page header has
            raise ValueError
        return None

    def _list(self, depth: int) -> None:
        head = self._byte()
        count = head >> 4
        count = self._unsigned() if count == 15 else count
        if count > len(self.content) or depth > 8:
            raise ValueError
        for _ in range(count):
            kind = head & 15
            if kind in (1, 2):
                self._skip(1)
            else:
                self._value(kind, depth + 1)

    def _byte(self) -> int:
        self._skip(1)
        return self.content[self.place - 1]

    def _skip(self, count: int) -> None:
        if self.place + count > len(self.content):
            raise IndexError
        self.place += count

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
