"""Parquet's rows: all of them, in every encoding, and no page that is larger than a bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyak.data.parquet.pages import largest_page, pages
from polyak.data.parquet.rows import NoColumnError, rows
from polyak.errors import DataError

TEXTS = [f"a lamp on table {n} " * (1 + n % 37) for n in range(900)]
EVERY: dict[str, dict[str, Any]] = {
    "plain": {"use_dictionary": False, "compression": "none"},
    "dictionary": {"use_dictionary": True, "compression": "snappy"},
    "zstd, second version": {"data_page_version": "2.0", "compression": "zstd"},
    "many small pages": {"data_page_size": 200, "compression": "gzip", "use_dictionary": False},
    "prefixes": {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
    "lengths": {"use_dictionary": False, "column_encoding": {"text": "DELTA_LENGTH_BYTE_ARRAY"}},
    "checksums, an index": {"write_page_checksum": True, "write_page_index": True},
}


def write(path: Path, texts: list[Any] = TEXTS, **how: Any) -> Path:
    table = pa.table({"id": list(range(len(texts))), "text": texts})
    pq.write_table(table, path, row_group_size=250, **how)
    return path


@pytest.mark.parametrize("how", EVERY)
def test_every_row_is_read_with_its_number_from_any_place_on(how: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", **EVERY[how])
    for skip in (0, 1, 249, 250, 700, 899):
        expected = list(enumerate(TEXTS, 1))[skip:]
        assert list(rows(path, "text", skip, 1 << 20)) == expected
        assert list(rows(path, "text", skip, 300_000)) == expected  # three rows at once


@pytest.mark.parametrize("how", EVERY)
def test_headers_tell_the_sizes_that_the_file_states_of_a_column(how: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", **EVERY[how])
    metadata = pq.ParquetFile(path).metadata
    for place in range(metadata.num_row_groups):
        for number in range(2):
            column = metadata.row_group(place).column(number)
            found = list(pages(path, column))
            assert sum(p.header + p.unpacked for p in found) == column.total_uncompressed_size
            assert sum(p.header + p.packed for p in found) == column.total_compressed_size
            assert largest_page(path, [column], 1 << 20) == max(p.unpacked for p in found)


def test_a_page_beyond_the_bound_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["x" * 5_000_000], compression="gzip")
    assert path.stat().st_size < 60_000
    with pytest.raises(DataError, match=r"has a page of 5,000,00\d bytes once unpacked, and 1,"):
        next(rows(path, "text", 0, 1_000_000))


def test_a_header_that_is_no_header_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    content = bytearray(path.read_bytes())
    place = pq.ParquetFile(path).metadata.row_group(0).column(1).dictionary_page_offset
    content[place : place + 12] = b"\xff" * 12
    path.write_bytes(content)
    with pytest.raises(DataError, match="a page's header is damaged"):
        next(rows(path, "text", 0, 1 << 20))


def test_how_many_rows_are_still_to_be_left_out_is_returned(tmp_path: Path) -> None:
    with pytest.raises(StopIteration) as end:
        next(rows(write(tmp_path / "a.parquet"), "text", 1000, 1 << 20))
    assert end.value.value == 100


def test_a_column_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(NoColumnError) as error:
        next(rows(write(tmp_path / "a.parquet"), "body", 0, 1 << 20))
    assert error.value.columns == ["id", "text"]
