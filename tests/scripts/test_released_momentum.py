"""scripts/released_momentum.py prints what the page on attention with momentum shows."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_pages_figures_are_the_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "scripts/released_momentum.py"), run_name="__main__")
    page = (ROOT / "docs/momentum-transformer.md").read_text(encoding="utf-8")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) > 20
    for line in printed:
        # rounding differs between machines
        stable = [cell for cell in line.split("|") if "e-16" not in cell and "e-07" not in cell]
        rows = [row for row in page.splitlines() if row.startswith("|".join(stable[:3]))]
        assert rows, line
        assert any(all(cell in row for cell in stable) for row in rows), line


def test_the_first_row_errs_by_what_the_equation_says() -> None:
    script = runpy.run_path(str(ROOT / "scripts/released_momentum.py"))
    for mu in (0.1, 0.6, 0.9):
        first, _, last, _ = script["training_form"](mu)
        assert first == pytest.approx((mu - mu**128) / (1 - mu), rel=1e-9)  # w(128) − 1
        assert last < 1e-14
