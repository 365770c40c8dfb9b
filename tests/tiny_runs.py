"""A small corpus, a small model and the command line, for tests that train."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from polyak import ModelConfig
from polyak.cli.main import main
from polyak.training.config.run import RunConfig
from polyak.training.config.training import TrainingConfig

MODEL = {"num_layers": 1, "num_heads": 2, "d_model": 16, "context_length": 16}
TRAINING = {"batch_size": 4, "eval_tokens": 256, "eval_every": 2}
SETTINGS = [
    word
    for room, fields in (("model", MODEL), ("training", TRAINING))
    for name, value in fields.items()
    for word in ("--set", f"{room}.{name}={value}")
]
"""The same sizes as words of a command line."""


def settings_beside(more: Sequence[object]) -> list[str]:
    """`SETTINGS` without those that `more` sets."""
    keys = {str(word).partition("=")[0] for word in more}
    pairs = zip(SETTINGS[::2], SETTINGS[1::2], strict=True)
    return [word for pair in pairs if pair[1].partition("=")[0] not in keys for word in pair]


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


def heeding() -> None:
    """For `preexec_fn`: heed signals, also where tests began with them ignored (`&`, nohup)."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


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


def answer(
    *words: object, cwd: Path, cache: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """As `polyak`, in this process, which has torch already: for what ends and asks for no signal.

    Warnings that are not the command's own are pytest's, and not in `stderr`.
    """
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.delenv("COLUMNS", raising=False)
        for name, value in {"POLYAK_CACHE": str(cache), **variables}.items():
            patch.setenv(name, value)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main([*map(str, words)])
            except SystemExit as stop:
                code = int(stop.code or 0)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def environment(cache: Path, **variables: str) -> dict[str, str]:
    """This process's environment with a cache of its own and no terminal width."""
    kept = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return {**kept, "POLYAK_CACHE": str(cache), "OMP_NUM_THREADS": "1", **variables}


TWIN = """
import os, time
from polyak.rules import UpdateRule

class Twin(UpdateRule):
    "gradient_descent under another name; talks, and takes its time if told to."
    def step(self, x, state, oracle):
        print("a user's rule may print")
        time.sleep(float(os.environ.get("TWIN_SECONDS", 0)))
        return x + oracle(x), state

class Late(UpdateRule):
    "Fine for three gradients, then NaN."
    gradients = 0
    def step(self, x, state, oracle):
        if x.requires_grad:
            x.register_hook(self.count)
        late = self.gradients >= 3 and self.training
        return x + oracle(x) * (float("nan") if late else 1.0), state
    def count(self, gradient):
        self.gradients += 1

class Alone(UpdateRule):
    "Forgets the state."
    def step(self, x, state, oracle):
        return x + oracle(x)
"""
"""Rules of a user's own, good and bad."""


def words(rules: str, out: Path, *more: object, seeds: int = 2, steps: int = 8) -> list[str]:
    """The command line of a tiny comparison."""
    return [
        *("compare", "--rules", rules, "--corpus", "corpus.txt", "--out", str(out)),
        *("--seeds", str(seeds), "--steps", str(steps), "--device", "cpu"),
        *settings_beside(more),
        *map(str, more),
    ]


def results_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())  # type: ignore[no-any-return]


def files(out: Path) -> dict[Path, int]:
    """Every file of the runs, and when it was last written."""
    return {p: p.stat().st_mtime_ns for p in sorted((out / "runs").rglob("*")) if p.is_file()}
