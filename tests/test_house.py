"""The house is in order: rooms of a readable size, and tests under the names of the rooms."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = [path.parent for path in (ROOT / "src/polyak").rglob("__init__.py")]
MOST = 22
"""Modules of a room."""


def test_no_room_has_more_modules_than_a_reader_can_hold():
    sizes = {room.name: len(list(room.glob("*.py"))) - 1 for room in ROOMS}
    assert len(sizes) > 20
    assert {name: size for name, size in sizes.items() if size > MOST} == {}


def test_tests_lie_in_folders_named_as_rooms():
    inside = {path.relative_to(ROOT / "src/polyak").as_posix() for path in ROOMS}
    others = {"conformance", "docs", "releases", "scripts"}
    folders = {
        path.parent.relative_to(ROOT / "tests").as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
    }
    assert folders - inside - others == set()


def test_no_two_test_modules_have_one_name():
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_contributing_names_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)/` \|", text, flags=re.MULTILINE))
    top = {room.name for room in ROOMS if room.parent.name == "polyak" and room.name != "polyak"}
    assert named == top


@pytest.mark.slow
def test_every_process_collects_the_same_tests():
    """The name of a set, say, depends on the process; workers that run side by side must agree."""
    found = []
    for seed in ("1", "2", "3"):
        words = ("pytest", "--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider")
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:]
        found.append([line for line in done.stdout.splitlines() if "::" in line])
    assert len(found[0]) > 5000
    assert found[0] == found[1] == found[2]
