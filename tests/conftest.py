"""Shared by every test: one thread, fixed seeds, and tiny models."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile

# before numpy and torch are loaded: workers side by side would spin on each other's cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# the key by which runs are known as this user's: not one in the home of who runs the tests
os.environ["POLYAK_CONFIG"] = tempfile.mkdtemp(prefix="polyak-tests-config-")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from polyak import ModelConfig, Transformer
from polyak.rules import UpdateRule, register
from polyak.rules._registry import RULES

Build = Callable[..., Transformer]
Run = Callable[..., subprocess.CompletedProcess[str]]


def pytest_configure(config: pytest.Config) -> None:
    """Leave `slow` tests out unless `-m` says which to run (`-m "slow or not slow"`: all)."""
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_config() -> Callable[..., ModelConfig]:
    """A small configuration; every field can be set."""

    def build(rule: str, **fields: Any) -> ModelConfig:
        small = {
            "num_layers": 2,
            "num_heads": 3,
            "d_model": 12,
            "vocab_size": 11,
            "context_length": 7,
        }
        return ModelConfig(rule=rule, **{**small, **fields})

    return build


@pytest.fixture
def tiny_model(tiny_config: Callable[..., ModelConfig]) -> Build:
    """A small float64 model with every scalar and norm weight off its initial value."""

    def build(rule: str, dtype: torch.dtype = torch.float64, **fields: Any) -> Transformer:
        model = Transformer(tiny_config(rule, **fields)).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # large enough that attention, GELU and the lookahead are far from linear
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return build


@pytest.fixture
def registered() -> Iterator[Callable[[str, type[UpdateRule]], str]]:
    """Registers a rule for one test: `registered("mine", Mine)` returns its name."""
    before = dict(RULES._registered)

    def add(name: str, rule: type[UpdateRule]) -> str:
        register(name)(rule)
        return name

    yield add
    RULES._registered.clear()
    RULES._registered.update(before)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no Chromium on this machine (looked for {', '.join(names)})")
    quiet = ("background-networking", "component-update", "sync", "gpu")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=path,
            args=["--no-sandbox", "--no-first-run", *(f"--disable-{word}" for word in quiet)],
        )
        yield opened
        opened.close()


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
