"""Draws the pages and the picture that the documentation shows: `python scripts/build_pages.py`.

Each file of docs/data/ is the results.json of a command, and becomes the page that the command
drew, docs/NAME.html, which is not kept in the repository. A comparison's picture, docs/NAME.png,
is: the README shows it. `--out FOLDER` draws both elsewhere.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polyak.compare.page import render as comparison
from polyak.compare.page import write_picture
from polyak.study.landscape.page import render as landscape
from polyak.study.runs.page import render as runs

DOCS = Path(__file__).parents[1] / "docs"
PAGES: dict[str, Callable[[Any], str]] = {
    "comparison": comparison,
    "landscape": landscape,
    "runs": runs,
}
"""What draws a page, by the kind of results."""


def build(out: Path) -> list[Path]:
    """Draw everything into `out`, and say what was written."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for data in sorted((DOCS / "data").glob("*.json")):
        results = json.loads(data.read_text(encoding="utf-8"))
        page = out / f"{data.stem}.html"
        page.write_text(PAGES[results["kind"]](results), encoding="utf-8")
        written.append(page)
        if (DOCS / f"{data.stem}.png").exists():  # shown somewhere
            written.append(write_picture(results, out / f"{data.stem}.png"))
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the documentation's pages from docs/data/.")
    parser.add_argument("--out", type=Path, default=DOCS, help="a folder instead of docs/")
    for path in build(parser.parse_args().out):
        print(path)
