"""Real files and real processes for the data tests; the user's cache is never touched."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Read when huggingface_hub is imported, so it is set before any test.
os.environ["HF_HOME"] = os.path.join(tempfile.gettempdir(), f"polyak-tests-hf-{os.getpid()}")


@pytest.fixture(scope="session", autouse=True)
def _own_hub_cache() -> Iterator[None]:
    yield
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYAK_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of 60 short texts that differ."""
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    for number in range(60):
        name = f"sub/{number:02}.txt" if number % 3 else f"{number:02}.txt"
        lines = [
            f"Line {line} of text {number}: naïve café, 数 {number * line}." for line in range(9)
        ]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
