"""The code blocks of the documentation: found, taken apart, run.

A fenced block runs, in the order of its page, unless the line before it says why not:

    <!-- no-run: it trains for an hour -->

or the page says so for all of its blocks:

    <!-- no-run on this page: a log of what was run -->

Either kind is parsed. Started as a program, this runs one page: `python blocks.py PAGE`.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polyak.training.config import recipes

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
"""Everything written for readers."""

FENCE = re.compile(r"^(?P<fence>`{3,}|~{3,})(?P<info>.*)$")
NO_RUN = re.compile(r"^<!-- *no-run(?P<page> on this page)?(?P<colon>:?) *(?P<reason>.*?) *-->$")
INDENTED_CODE = re.compile(
    r"(?: {4,}|\t)(?:"
    r"(?:\$ |(?:\S*/)?(?:polyak|python3?|pytest|pip|ruff|torchrun) |import |from \S+ import )"
    r"|\[[\w.]+\]$|\w+ = [\"\d\[]"
    r")|\s+(?:```|~~~)"
)
"""Lines outside a fence that look like commands, Python or TOML, or like a fence inside a list."""
SMALLER = {
    "README.md": {"--corpora stdlib,prose": "--corpora stdlib,prose --tokens 4096"},
    "analysis-sharpness.md": {
        "sharpness runs/mine ": "sharpness runs/mine --tokens 256 --density-probes 2 --rho 0.05 "
    },
    "guide.md": {
        "--steps 80": "--steps 10 --set training.eval_tokens=4096",
        "--tokens 8192": "--tokens 2048",
    },
    "training.md": {
        "--steps 20 ": "--steps 4 --set training.eval_tokens=4096 ",
        "--steps 30 ": "--steps 6 ",
    },
}
"""Options of a page's commands, and those that they run with here: the same, with less to do."""
CODE = ("bash", "python", "toml")
OUTPUT = "text"
"""Formulas, pictures and what a command prints."""


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    """Of its first line of code, from 1."""
    language: str
    code: str
    marked: bool
    reason: str
    """Why it is not run, or empty."""

    @property
    def place(self) -> str:
        """`page:line`, as editors read it."""
        return f"{self.page.name}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether it is run where its page is."""
        return self.language in CODE and not self.marked


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    outside = list(_outside(lines))
    marks = {number: found for number, line in outside if (found := NO_RUN.match(line))}
    whole = [mark for mark in marks.values() if mark["page"]]
    found = []
    number = 0
    while number < len(lines):
        opened = FENCE.match(lines[number])
        number += 1
        if opened is None:
            continue
        first = number
        number = lines.index(opened["fence"], first)  # a ValueError: the block has no end
        above = marks.get(first - 2)
        mark = whole[0] if whole else above if above and not above["page"] else None
        found.append(
            Block(
                page=page,
                line=first + 1,
                language=opened["info"].strip(),
                code="".join(f"{line}\n" for line in lines[first:number]),
                marked=mark is not None,
                reason=mark["reason"] if mark and mark["colon"] else "",
            )
        )
        number += 1
    return found


def smaller(page: Path) -> list[Block]:
    """The blocks of a page that run, with less to do."""
    found = [block for block in blocks(page) if block.runs]
    ours = page.is_relative_to(ROOT)
    name = page.relative_to(ROOT).as_posix().removeprefix("docs/") if ours else page.name
    for long, short in SMALLER.get(name, {}).items():
        assert any(long in block.code for block in found), f"{name}: nothing has {long!r}"
        found = [replace(block, code=block.code.replace(long, short)) for block in found]
    return found


def faults(page: Path) -> list[str]:
    """What keeps a page's code from being run or parsed: one line for each."""
    found = []
    every = blocks(page)
    for block in every:
        if block.language not in (*CODE, OUTPUT):
            found.append(f"{block.place}: ```{block.language} is not one of {CODE} or {OUTPUT}")
        if block.marked and not block.reason:
            found.append(f"{block.place}: no reason why it is not run")
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in _outside(lines):
        place = f"{page.name}:{number + 1}"
        if INDENTED_CODE.match(line):
            found.append(f"{place}: code without a fence at the left margin: {line}")
        if line.startswith("<!--") and "no-run" in line:
            mark = NO_RUN.match(line)
            if mark is None:
                found.append(f"{place}: not read as a mark: {line}")
            elif not mark["page"] and number + 3 not in [block.line for block in every]:
                found.append(f"{place}: a mark before no block")
    return found


def _outside(lines: list[str]) -> Iterator[tuple[int, str]]:
    fence = None
    for number, line in enumerate(lines):
        found = FENCE.match(line)
        if fence is None and found is None:
            yield number, line
        elif fence is None and found is not None:
            fence = found["fence"]
        elif line == fence:
            fence = None


def commands(code: str) -> list[list[str]]:
    """The words behind `polyak` of every such command of a script.

    A variable has the first value that it gets there, or 1; an array's words are left out.
    """
    values = dict(reversed(re.findall(r"^(?:for )?(\w+)(?:=| in )([\w/]+)", code, re.MULTILINE)))
    code = re.sub(r"<<'(\w+)'\n.*?^\1$", "", code, flags=re.DOTALL | re.MULTILINE)
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for words in _simple(list(lexer)):
            start = _start(words)
            if start is not None:
                kept = [word for word in words[start:] if "[@]" not in word]
                found.append(
                    [re.sub(r"\$\{?(\w+)\}?", lambda m: values.get(m[1], "1"), w) for w in kept]
                )
    return found


def _simple(words: list[str]) -> Iterator[list[str]]:
    """Cut a line at `;`, `|`, `&&` and the like."""
    part: list[str] = []
    for word in words:
        if set(word) <= set(";|&()<>"):
            yield part
            part = []
        else:
            part.append(word)
    yield part


def _start(words: list[str]) -> int | None:
    """Where the words of polyak begin, if it is polyak that is called."""
    if "polyak.cli.main" in words:
        return words.index("polyak.cli.main") + 1
    for place, word in enumerate(words):
        if Path(word).name == "polyak":
            return place + 1
        if word not in ("do", "then", "else", "time", "nohup") and "=" not in word:
            return None
    return None


def parse(block: Block) -> None:
    """See that a block is of its language, without running it; its polyak commands are apart."""
    if block.language == "python":
        ast.parse(block.code, block.place)
    elif block.language == "bash":
        done = subprocess.run(
            ["bash", "-n"], input=block.code, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, f"{block.place}: {done.stderr}"
    elif block.language == "toml":
        tomllib.loads(block.code)


def run(page: Path) -> int:
    """Run what is not marked on a page in the working folder, in order; returns how many.

    Commands that a page's reader waits for have less to do here, see `SMALLER`.

    Python blocks share their names, as they would in a notebook. A TOML block is written to the
    file that its first line names, and loaded as a recipe.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    todo = smaller(page)
    for block in todo:
        if block.language == "python":
            lines = "\n" * (block.line - 1)  # so that a traceback names the page's own line
            exec(compile(lines + block.code, str(page), "exec"), names)
        elif block.language == "bash":
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=False)
            assert done.returncode == 0, f"{block.place}: exit code {done.returncode}"
        else:
            name = re.match(r"# (\S+\.toml)$", block.code.splitlines()[0])
            assert name is not None, f"{block.place}: the first line does not name the file"
            Path(name[1]).write_text(block.code, encoding="utf-8")
            recipes.load(name[1])
    return len(todo)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
