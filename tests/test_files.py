"""Atomic files: all or nothing, and one clear line when the system refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from polyak.errors import DataError, RunError
from polyak.files import make_folder, read_json, sha256_of, write_atomic, write_json

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_written_files_read_back_and_leave_nothing_beside_them(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"\x00\xff")
    write_atomic(tmp_path / "a", "naïve")
    write_json(tmp_path / "b.json", {"é": [1, None, 0.5]})
    assert (tmp_path / "a").read_bytes() == "naïve".encode()
    assert read_json(tmp_path / "b.json") == {"é": [1, None, 0.5]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b.json"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_written_files_get_the_permissions_of_ordinary_ones(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    write_atomic(tmp_path / "atomic", "x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "a") == sha256_of(b"abc") == known


def test_a_killed_writer_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    size = 200_000
    code = (
        "import sys, pathlib, polyak.files as f\n"
        "print('go', flush=True)\n"
        "for i in range(10**9): f.write_json(pathlib.Path(sys.argv[1]), [i] * int(sys.argv[2]))"
    )
    for attempt in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(target), str(size)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            while not target.exists():
                time.sleep(0.01)
            time.sleep(0.15 + 0.037 * attempt)
            process.send_signal(signal.SIGKILL)
        value = read_json(target)
        assert len(value) == size
        assert len(set(value)) == 1


def test_json_that_is_missing_or_malformed_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot read .*gone\.json: No such file"):
        read_json(tmp_path / "gone.json")
    for content in (b'{"a": ', b"\xff\xfe"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.json is not valid JSON") as caught:
            read_json(tmp_path / "bad.json", error=DataError)
        assert "\n" not in str(caught.value)


def test_not_a_number_is_refused_rather_than_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_replaced_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*a: "):
        write_atomic(tmp_path / "a", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot create folder .*: Not a directory"):
        make_folder(tmp_path / "file" / "b", error=DataError)


_WRITE = """
import pathlib, sys
from polyak.errors import RunError
from polyak.files import make_folder, write_atomic
for action in (lambda p: write_atomic(p, b"x" * 200_000), lambda p: make_folder(p / "b")):
    try:
        action(pathlib.Path(sys.argv[1]) / "a")
    except RunError as problem:
        print(problem)
print(sorted(str(p) for p in pathlib.Path(sys.argv[1]).iterdir()))
"""


def test_an_unwritable_folder_is_one_clear_line(
    tmp_path: Path, python_obeying_permissions: Run
) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    result = python_obeying_permissions(_WRITE, folder)
    assert result.stdout.splitlines() == [
        f"cannot write {folder / 'a'}: Permission denied",
        f"cannot create folder {folder / 'a' / 'b'}: Permission denied",
        "[]",
    ], result.stderr


def test_a_read_only_mount_is_one_clear_line(tmp_path: Path, python_in_mount: Run) -> None:
    result = python_in_mount(_WRITE, "ro", tmp_path / "mount")
    assert result.stdout.splitlines()[0].endswith(": Read-only file system"), result.stderr
    assert result.stdout.splitlines()[2] == "[]"


def test_a_full_disk_keeps_the_old_file_and_cleans_up(tmp_path: Path, python_in_mount: Run) -> None:
    code = _WRITE.replace(
        "for action", "(pathlib.Path(sys.argv[1]) / 'a').write_text('old')\nfor action"
    )
    code += "print((pathlib.Path(sys.argv[1]) / 'a').read_text())"
    folder = tmp_path / "mount"
    result = python_in_mount(code, "size=64k", folder)
    lines = result.stdout.splitlines()
    assert lines[0] == f"cannot write {folder / 'a'}: No space left on device", result.stderr
    assert lines[-2:] == [str([str(folder / "a")]), "old"]


ODD = {
    "deep": ("[" * 200_000 + "]" * 200_000, "more than 100 values inside one another"),
    "deeper than allowed": ("[" * 101 + "]" * 101, "more than 100 values inside one another"),
    "a long integer": ("7" * 10_000, "a whole number of more than 4,300 digits"),
    "no number": ('{"a": NaN}', "NaN is not a JSON number"),
    "infinity": ('{"a": -Infinity}', "-Infinity is not a JSON number"),
    "beyond a float": ('{"a": 1e999}', "1e999 is beyond a number's range"),
    "twice": ('{"a": {"b": 1, "b": 2}}', "'b' stands twice in one object"),
    "an unpaired surrogate": ('{"a": "\\ud800"}', "an unpaired surrogate in its text"),
    "not UTF-8": (b'{"a": "\xff"}', "can't decode byte 0xff"),
    "not JSON": ("{'a': 1}", "Expecting property name"),
    "nothing": ("", "Expecting value"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_json_ends_in_one_line_that_names_the_file(name: str, tmp_path: Path) -> None:
    content, why = ODD[name]
    file = tmp_path / "a.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    for error in (RunError, DataError):
        with pytest.raises(error) as caught:
            read_json(file, error=error)
        assert str(caught.value).startswith(f"{file} is not valid JSON: ")
        assert why in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < len(str(file)) + 120


def test_json_that_is_only_unusual_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    unusual = {
        "[" * 100 + "]" * 100: None,
        "\ufeff[1]": [1],
        '["\\ud83d\\ude00", "\\\\ud800"]': ["😀", "\\ud800"],
        "7" * 4_300: int("7" * 4_300),
        "[-0.0, 1e-999]": [0.0, 0.0],
    }
    for text, value in unusual.items():
        file.write_text(text, encoding="utf-8")
        found = read_json(file)
        assert value is None or found == value


def test_a_file_too_large_to_be_held_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    with file.open("wb") as handle:
        handle.truncate((1 << 20) + 1)
    monkeypatch.setattr("polyak.files.LONGEST", 1 << 20)
    with pytest.raises(RunError, match="has more than 1,048,576 bytes"):
        read_json(file)
