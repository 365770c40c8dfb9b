"""The README is true: its code runs, its table is the registry's, its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from polyak import rules

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_custom_rule_is_the_file_in_docs_and_has_at_most_15_lines():
    code = (ROOT / "docs/examples/my_rule.py").read_text(encoding="utf-8")
    assert code in blocks("python")
    assert len(code.splitlines()) <= 15


def test_the_python_example_is_about_ten_lines_and_runs():
    (example,) = [block for block in blocks("python") if "Transformer(config)" in block]
    assert len(example.splitlines()) <= 12
    run = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 2


def test_the_table_of_rules_is_what_the_command_prints():
    run = subprocess.run(
        [sys.executable, "-m", "polyak.cli.main", "rules", "--format", "markdown"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() in README
    listed = re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)
    assert len(listed) == len(rules.names())


PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
"""Everything written for readers."""


@pytest.mark.parametrize("page", PAGES, ids=[path.name for path in PAGES])
def test_linked_files_and_headings_exist(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        assert linked.suffix != ".html", f"{target} is drawn by a script: link its data"
        if heading:
            assert heading in headings(linked), target


def headings(page: Path) -> set[str]:
    """Anchors of a Markdown file's headings, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("marker", ["compare --quick", "pytest"])
def test_set_up_commands_are_single_lines_that_need_only_python_and_pip(marker: str):
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    (command,) = [
        line for line in commands if line.startswith("python3 -m venv") and marker in line
    ]
    assert "pip install -q -c constraints.txt" in command
