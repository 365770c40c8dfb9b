"""The README is true: its rule is the file's, its table the registry's; links lead somewhere.

That its code runs is seen to in `test_blocks.py`, with all other pages'.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import PAGES, ROOT, blocks

from polyak import rules

README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_of(language: str) -> list[str]:
    return [block.code for block in blocks(ROOT / "README.md") if block.language == language]


def test_the_custom_rule_is_the_file_in_docs_and_has_at_most_15_lines():
    code = (ROOT / "docs/examples/my_rule.py").read_text(encoding="utf-8")
    assert code in code_of("python")
    assert len(code.splitlines()) <= 15


def test_the_python_example_is_about_ten_lines():
    (example,) = [code for code in code_of("python") if "Transformer(config)" in code]
    assert len(example.splitlines()) <= 12


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
    commands = [line for code in code_of("bash") for line in code.splitlines()]
    (command,) = [
        line for line in commands if line.startswith("python3 -m venv") and marker in line
    ]
    assert "pip install -q -c constraints.txt" in command
