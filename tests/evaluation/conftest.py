from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import run_config, write_corpus

from polyak.training.loop import train


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "evaluation-cache"


@pytest.fixture(autouse=True, scope="session")
def _own_cache(cache: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYAK_CACHE", os.fspath(cache))
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another corpus: a folder of nine short files, with letters of two bytes."""
    folder = tmp_path_factory.mktemp("other")
    for number in range(9):
        text = f"{number} straße, größer als {number + 1}; naïve café. " * (20 + number)
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A folder of two finished runs of 8 steps."""
    folder = tmp_path_factory.mktemp("runs")
    for rule in ("gradient_descent", "triple_momentum"):
        train(run_config(corpus, rule, steps=8, adam_lr=0.02), folder / rule)
    return folder


@pytest.fixture(scope="session")
def run(runs: Path) -> Path:
    return runs / "triple_momentum"
