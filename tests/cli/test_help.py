from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import environment, polyak

from polyak.cli.main import COMMANDS


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=str)
def test_help_is_quick_has_examples_and_fits_80_columns(words: list[str], tmp_path: Path) -> None:
    # the entry point itself, in a process that tells afterwards what it has imported
    program = (
        "import sys; from polyak.cli.main import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as stop: code = stop.code\n"
        "print('torch' in sys.modules, code or 0, file=sys.stderr)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, *words],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stderr.split() == ["False", "0"]
    assert "examples" in found.stdout
    assert max(map(len, found.stdout.splitlines())) <= 80
    # processor time, which is the wall's on an idle machine: other tests run beside this one
    seconds = []
    for _ in range(3):
        before = os.times()
        assert polyak(*words, cwd=tmp_path, cache=tmp_path).returncode == 0
        after = os.times()
        seconds.append(
            after.children_user
            - before.children_user
            + after.children_system
            - before.children_system
        )
        if seconds[-1] < 0.5:
            break
    assert min(seconds) < 0.5


def test_every_option_is_explained(tmp_path: Path) -> None:
    for name in COMMANDS:
        words = ["study", "landscape"] if name == "study" else [name]
        text = polyak(*words, "--help", cwd=tmp_path, cache=tmp_path).stdout
        options = [line for line in text.splitlines() if line.startswith("│ --")]
        assert options
        assert "None}" not in text
        assert "None," not in text
        assert "(default: None)" not in " ".join(text.replace("│", " ").split())
        for block in re.split(r"\n│ --", text)[1:]:
            words = re.sub(r"[│╰─╯]", " ", block).split()
            assert len(words) >= 5, (name, block)  # its name, and a sentence


def test_switches_say_what_they_switch_off(tmp_path: Path) -> None:
    for name in COMMANDS:
        text = polyak(name, "--help", cwd=tmp_path, cache=tmp_path).stdout
        assert "(default: True)" not in text, name  # beside --no-…, of the opposite


def test_examples_are_not_wrapped_and_positions_have_names(tmp_path: Path) -> None:
    for name in COMMANDS:
        text = polyak(name, "--help", cwd=tmp_path, cache=tmp_path).stdout
        head = text.split("╭")[0]
        assert "PATH PATH" not in head, name
        assert "STR PATH" not in head, name
        if "examples:\n" in head:
            lines = head.split("examples:\n")[1].rstrip().splitlines()
            assert all(line.startswith("  ") for line in lines), name


def test_version_and_no_command(tmp_path: Path) -> None:
    import polyak as package

    found = polyak("--version", cwd=tmp_path, cache=tmp_path)
    assert found.stdout == f"polyak {package.__version__}\n"
    assert found.returncode == 0
    nothing = polyak(cwd=tmp_path, cache=tmp_path)
    assert nothing.returncode == 2
    assert nothing.stdout.startswith("usage: polyak COMMAND")


def test_a_terminal_without_utf8_gets_help_and_one_line_errors(tmp_path: Path) -> None:
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    for name in COMMANDS:
        found = polyak(name, "--help", cwd=tmp_path, cache=tmp_path, **ascii_only)
        assert found.returncode == 0, found.stderr
        assert found.stderr == ""
        assert max(map(len, found.stdout.splitlines())) <= 80
    wrong = polyak("compare", "--corpos", "x", cwd=tmp_path, cache=tmp_path, **ascii_only)
    assert wrong.stderr == (
        "polyak compare: Unrecognized options: --corpos, x; did you mean --corpus?\n"
    )
    assert wrong.returncode == 2
