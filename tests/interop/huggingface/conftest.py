from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import run_config, write_corpus

import polyak.interop.huggingface as hf
from polyak.training.loop import train

Make = Callable[..., Any]

FEW = ("gradient_descent", "triple_momentum", "soap")
"""Rules without streams, with one, and with one of another shape: for what is not a rule's own."""


def if_few(rule: str) -> pytest.MarkDecorator | tuple[()]:
    """The mark of a rule where the few stand for all by default."""
    return () if rule in FEW else pytest.mark.slow


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYAK_CACHE", str(tmp_path_factory.getbasetemp() / "interop-cache"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of triple_momentum on bytes; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYAK_CACHE", str(tmp_path_factory.getbasetemp() / "interop-cache"))
        train(run_config(corpus, "triple_momentum", steps=3, context_length=24), folder)
    return folder


@pytest.fixture
def tiny(tiny_config: Callable[..., Any]) -> Make:
    """A small model of transformers with every weight off its initial value, in eval mode."""

    def build(rule: str = "triple_momentum", **fields: Any) -> Any:
        config = hf.PolyakConfig(
            tiny_config(rule, **fields).to_dict(), bos_token_id=10, eos_token_id=10, pad_token_id=10
        )
        kind = hf.PolyakForCausalLM if fields.get("causal", True) else hf.PolyakForMaskedLM
        model = kind(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return build


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text
    assert "\n" not in text
    return text


def python(code: str, *, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, with a Hugging Face cache of its own."""
    home = str(cwd / "hf-home")
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "HF_HOME": home, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
