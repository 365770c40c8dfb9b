"""scripts/build_pages.py draws what the documentation shows, from docs/data/ alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "docs/data").glob("*.json"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "pages"
    script = ROOT / "scripts/build_pages.py"
    subprocess.run([sys.executable, script, "--out", out], check=True, capture_output=True)
    return out


@pytest.mark.slow
def test_every_file_of_results_becomes_a_page(drawn: Path):
    assert len(NAMES) > 2
    assert sorted(path.stem for path in drawn.glob("*.html")) == NAMES
    for name in NAMES:
        page = (drawn / f"{name}.html").read_text(encoding="utf-8")
        assert page.count('<svg class="figure"') > 5
        assert page.rstrip().endswith("</html>")


@pytest.mark.slow
def test_the_picture_in_the_readme_is_the_one_drawn(drawn: Path):
    kept, now = (image.imread(at / "comparison.png") for at in (ROOT / "docs", drawn))
    assert kept.shape == now.shape
    assert np.abs(kept - now).mean() < 1e-3  # other versions of a font's hinting
    assert kept.std() > 0.05  # and there is something in it


def test_no_page_is_kept_in_the_repository():
    listed = subprocess.run(
        ["git", "ls-files", "*.html"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("no git checkout")
    assert all(line.startswith("src/polyak/report/templates/") for line in listed.stdout.split())
