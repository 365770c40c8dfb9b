"""The examples of docs/huggingface.md, run in order."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

GUIDE = Path(__file__).parents[3] / "docs" / "huggingface.md"


def test_the_examples_of_the_guide_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs it")
    shutil.copytree(run, tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), flags=re.S | re.M)
    assert len(blocks) == 6
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
    assert names["texts"]
    assert names["story"].startswith("the")
    assert not names["encoder"].config.polyak["causal"]
    assert names["tuned"].config.polyak == names["model"].config.polyak
    assert "## Citation" in (tmp_path / "shared" / "card" / "README.md").read_text()
