"""Real files and real processes for the data tests; the user's cache is never touched."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Read when huggingface_hub is imported, so it is set before any test.
os.environ["HF_HOME"] = os.path.join(tempfile.gettempdir(), f"polyak-tests-hf-{os.getpid()}")

Run = Callable[..., subprocess.CompletedProcess[str]]


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


def obey_permissions() -> None:
    """In a child process: make root subject to file permissions, as any other user is."""
    if os.geteuid() == 0:
        drop_from_bounding_set = 24
        for override in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            if ctypes.CDLL(None).prctl(drop_from_bounding_set, override, 0, 0, 0) != 0:
                raise OSError("root's override of permissions cannot be dropped")


@pytest.fixture
def python_obeying_permissions(tmp_path: Path) -> Run:
    """Runs Python code in a process to which file permissions apply; skips if there is no way."""
    if not hasattr(os, "geteuid"):
        pytest.skip("this platform has no POSIX permissions")

    def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            preexec_fn=obey_permissions,
            capture_output=True,
            text=True,
        )

    forbidden = tmp_path / "forbidden"
    forbidden.mkdir(mode=0o555)
    try:
        probe = run("import sys, os; os.mkdir(sys.argv[1])", forbidden / "x")
    except (OSError, subprocess.SubprocessError) as problem:
        pytest.skip(f"tests run as root, and {problem}")
    if "PermissionError" not in probe.stderr:
        pytest.skip("tests run as root, whom permissions do not bind here")
    return run


@pytest.fixture
def python_in_mount() -> Run:
    """Runs Python code with a new tmpfs mounted on a folder; skips where it can't."""
    if shutil.which("unshare") is None:
        pytest.skip("mounting needs unshare")
    script = 'mount -t tmpfs -o "$1" polyak-test "$2" && shift 2 && exec "$@"'

    def run(
        code: str, options: str, folder: Path, *arguments: object
    ) -> subprocess.CompletedProcess[str]:
        folder.mkdir(parents=True, exist_ok=True)
        prefix = ["unshare", "--mount", "sh", "-c", script, "sh"]
        program = [sys.executable, "-c", code, str(folder), *map(str, arguments)]
        result = subprocess.run(
            [*prefix, options, str(folder), *program], capture_output=True, text=True
        )
        if "mount:" in result.stderr or "unshare:" in result.stderr:
            pytest.skip(f"no right to mount here: {result.stderr.strip()}")
        return result

    return run
