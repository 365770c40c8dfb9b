"""The encoder of docs/encoders.md runs as it is printed there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import environment

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
def test_the_masked_token_example_trains_two_rules(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(DOCS / "examples" / "masked_tokens.py"), "2"],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()
    assert head.endswith("after 2 steps")
    found = {name: float(value) for name, value in (row.rsplit(maxsplit=1) for row in rows)}
    assert list(found) == ["byte frequencies", "gradient_descent", "triple_momentum"]
    assert all(0 < value < 8 for value in found.values())
    printed = (DOCS / "encoders.md").read_text(encoding="utf-8")
    assert all(re.search(rf"^ *{name} +\d", printed, re.MULTILINE) for name in found)
