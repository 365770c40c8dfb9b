"""The values of one column of a Parquet file, row by row."""

from __future__ import annotations

import importlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

from polyak.data.parquet.pages import largest_page
from polyak.errors import DataError, MissingExtraError

MOST_ROWS = 256
"""Rows unpacked at once; fewer where pages are large."""


class NoColumnError(Exception):
    """There is no column of that name; `columns` are those there are."""

    def __init__(self, columns: list[str]) -> None:
        super().__init__()
        self.columns = columns


def rows(path: Path, column: str, skip: int, most: int) -> Generator[tuple[int, Any], None, int]:
    """(number from 1, value) of every row after the first `skip`.

    Memory holds a few pages and a batch of rows, about `most` bytes each at most: no value is
    larger than the largest page, whether a dictionary repeats it or it repeats the one before.

    Args:
        path: the file.
        column: its name.
        skip: rows to leave out; groups of them are not unpacked.
        most: bytes of a page at most, unpacked.

    Returns:
        How many of the rows to leave out the file did not have.

    Raises:
        NoColumnError: there is no such column.
        DataError: it is no Parquet file, or damaged, or has a larger page.
        MissingExtraError: pyarrow is not installed.
    """
    arrow, parquet = pyarrow(path)
    try:
        with parquet.ParquetFile(
            path,
            thrift_string_size_limit=most,
            thrift_container_size_limit=1 << 20,
        ) as table:
            if column not in table.schema_arrow.names:
                raise NoColumnError(table.schema_arrow.names)
            number = 0
            for place in range(table.num_row_groups):
                group = table.metadata.row_group(place)
                if skip >= group.num_rows:
                    number, skip = number + group.num_rows, skip - group.num_rows
                    continue
                chunks = [group.column(n) for n in range(group.num_columns)]
                wanted = [c for c in chunks if f"{c.path_in_schema}.".startswith(f"{column}.")]
                page = largest_page(path, wanted, most)
                size = max(1, min(MOST_ROWS, most // max(1, page)))
                for batch in table.iter_batches(size, row_groups=[place], columns=[column]):
                    for value in batch.column(0):
                        number += 1
                        if skip:
                            skip -= 1
                        else:
                            yield number, value.as_py()
    except (arrow.ArrowException, OSError, ValueError, MemoryError) as problem:
        why = " ".join(str(problem).split())[:200]
        raise DataError(f"{path} is not a readable Parquet file: {why}") from problem
    return skip


def pyarrow(path: Path) -> tuple[Any, Any]:
    """`pyarrow` and `pyarrow.parquet`; `MissingExtraError` where they are not installed."""
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as problem:
        raise MissingExtraError(
            f"reading {path} needs pyarrow, which is not installed; pip install 'polyak[data]'"
        ) from problem
