"""docs/guide.md is true: its blocks run as they stand, one after the other, in one folder."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import environment

GUIDE = (Path(__file__).parents[2] / "docs/guide.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", GUIDE, flags=re.DOTALL | re.MULTILINE)
NEEDS = {
    "--tasks": "lm_eval",
    "huggingface": "transformers",
    "transformers": "transformers",
    "lm_eval": "accelerate",
}
"""Words of a block, and the module of an extra that it needs."""


def runnable(code: str) -> bool:
    return all(
        importlib.util.find_spec(module) is not None
        for word, module in NEEDS.items()
        if word in code
    )


def test_the_guide_goes_from_training_to_sharing() -> None:
    text = "".join(code for _, code in BLOCKS)
    steps = ["polyak train", "polyak generate", "polyak evaluate", "share("]
    places = [text.index(step) for step in steps]
    assert places == sorted(places)
    for target in re.findall(r"\]\(([\w.]+\.md)\)", GUIDE):
        assert (Path(__file__).parents[2] / "docs" / target).exists(), target


@pytest.mark.slow
def test_every_block_runs(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = 0
    for language, code in BLOCKS:
        if not runnable(code):
            continue
        program = ["bash", "-euo", "pipefail"] if language == "bash" else [sys.executable]
        found = subprocess.run(
            [*program, "-c", code],
            cwd=tmp_path,
            env=environment(tmp_path / "cache", PATH=path, HF_HOME=str(tmp_path / "hub")),
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == 0, f"{code}\n{found.stdout}\n{found.stderr}"
        assert found.stdout or "share(" in code
        done += 1
    assert done >= 4
