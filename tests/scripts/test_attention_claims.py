"""scripts/attention_claims.py prints the pairs that a comparison has, and names the others."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from polyak.nn.rule_text import parse_rule

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/attention_claims.py"


def test_pairs_are_entries_that_can_be_compared() -> None:
    pairs = runpy.run_path(str(SCRIPT))["PAIRS"]
    assert len(pairs) == len(set(pairs)) == 10
    for entry in {entry for pair in pairs for entry in pair}:
        assert parse_rule(entry).label == entry


def test_of_the_family_one_pair_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(SCRIPT))["main"](ROOT / "docs/data/comparison.json")
    said = capsys.readouterr().out
    assert said.count("missing: ") == 9
    assert "| triple_momentum | gradient_descent | −0.120 | " in said
