"""A small corpus, a small model and the command line, for tests that train."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from polyak import ModelConfig
from polyak.training.config import TrainingConfig
from polyak.training.run_config import RunConfig

MODEL = {"num_layers": 1, "num_heads": 2, "d_model": 16, "context_length": 16}
TRAINING = {"batch_size": 4, "eval_tokens": 256, "eval_every": 2}
SETTINGS = [
    word
    for room, fields in (("model", MODEL), ("training", TRAINING))
    for name, value in fields.items()
    for word in ("--set", f"{room}.{name}={value}")
]
"""The same sizes as words of a command line."""


def write_corpus(folder: Path, lines: int = 400) -> Path:
    """A text file of made-up sentences, always the same."""
    draw = random.Random(0)
    words = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "in", "depth")
    text = "\n".join(" ".join(draw.choices(words, k=12)) for _ in range(lines))
    path = folder / "corpus.txt"
    path.write_text(text, encoding="utf-8")
    return path


def run_config(corpus: Path, rule: str = "gradient_descent", **fields: Any) -> RunConfig:
    """A tiny run; fields are those of the model or of the recipe."""
    model = {key: value for key, value in fields.items() if key in ModelConfig.__slots__}
    training = {key: value for key, value in fields.items() if key not in model}
    return RunConfig(
        model=ModelConfig(rule=rule, **{**MODEL, "vocab_size": 256, **model}),
        training=TrainingConfig(**{**TRAINING, "steps": 6, **training}),
        corpus=str(corpus),
        device="cpu",
        threads=1,
    )


def command(*words: object) -> list[str]:
    """The installed command line as a program and its arguments."""
    script = Path(sys.executable).with_name("polyak")
    program = [str(script)] if script.exists() else [sys.executable, "-m", "polyak.cli.main"]
    return [*program, *map(str, words)]


def polyak(
    *words: object, cwd: Path, cache: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        command(*words),
        cwd=cwd,
        env=environment(cache, **variables),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def environment(cache: Path, **variables: str) -> dict[str, str]:
    """This process's environment with a cache of its own and no terminal width."""
    kept = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return {**kept, "POLYAK_CACHE": str(cache), "OMP_NUM_THREADS": "1", **variables}
